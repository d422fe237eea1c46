"""The vision-language models: families, processing, backbones, verbalizers, and two of them in one engine."""
