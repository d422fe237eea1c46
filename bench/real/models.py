"""The pair before it has learnt to read pictures: LLaVA's architecture, SmolLM2's weights, one pretrained tower.

  python -m bench.real.models        writes build/real/base/teacher and build/real/base/student, once

The teacher has all 30 layers of SmolLM2, the student ten of them: LAYERS. Both have the same width, tower and
tokenizer; only the projector starts from random weights. How they then learn to answer is in bench/real/learn.py.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from bench.real.language import IMAGE, load_language
from bench.real.pictures import FOLDER, SIDE
from bench.real.tower import MEAN, STD, train_tower

BASE = FOLDER / "base"
LAYERS: dict[str, Sequence[int]] = {"teacher": range(30), "student": (0, 3, 6, 9, 12, 15, 18, 21, 25, 29)}
"""Role -> the layers of SmolLM2 that it has."""
PADDED = 64
"""The embedding has a multiple of so many rows."""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's template with pictures, and without its system prompt."""


def main() -> None:
    """`python -m bench.real.models`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.real.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tower-steps", type=int, default=700, metavar="N", help="updates of the tower (default 700)")
    parser.add_argument("--seed", type=int, default=0, help="of the tower and the projectors (default 0)")
    options = parser.parse_args()
    if all((BASE / role / "processor_config.json").exists() for role in LAYERS):
        return
    language, tokenizer = load_language()
    tower = train_tower(options.tower_steps, options.seed)
    for role, layers in LAYERS.items():
        torch.manual_seed(options.seed)
        _compose(language, layers, tower, tokenizer).to(torch.bfloat16).save_pretrained(BASE / role)
        _processor(tokenizer).save_pretrained(BASE / role)


def _compose(
    language: LlamaForCausalLM, layers: Sequence[int], tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """A LLaVA with some of the language model's layers; its embedding of the picture token is never read."""
    text = copy.deepcopy(language.config)
    text.num_hidden_layers = len(layers)
    rows = -(-len(tokenizer) // PADDED) * PADDED
    text.vocab_size = rows
    config = LlavaConfig(
        text_config=text,
        vision_config=tower.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    decoder = model.model.language_model
    embedding = language.model.embed_tokens.weight.detach()
    with torch.no_grad():
        # New rows, the picture token's among them, start as the mean: they are never right, and rarely likely.
        decoder.embed_tokens.weight[: len(embedding)] = embedding
        decoder.embed_tokens.weight[len(embedding) :] = embedding.mean(0)
    decoder.norm.load_state_dict(language.model.norm.state_dict())
    for ours, theirs in zip(decoder.layers, layers, strict=True):
        ours.load_state_dict(language.model.layers[theirs].state_dict())
    model.tie_weights()
    return model


def _processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=12,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


if __name__ == "__main__":
    main()
