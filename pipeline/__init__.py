"""VLsI: Verbalized Layers-to-Interactions (arXiv 2412.01822) on DeepSpeed."""
