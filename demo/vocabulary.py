"""One tokenizer, chat template and image settings for all demo models, so that teacher and student speak alike.

A word of WORDS is one token, with or without the space before it; anything else falls apart into bytes. So every text
survives encoding and decoding, and the vocabulary stays small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2-VL's control tokens, in its order."""

WORDS = tuple(
    word
    for line in (
        "system user assistant",
        "What comes next is the first second third fourth tile with a dot ring cross",
        "red orange yellow green blue purple circle square triangle star heart",
        "what color shape of image in present does contain there not no yes rectangle teal gray brown black",
    )
    for word in line.split()
)
"""What the puzzles and easy-VQA are made of."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PATCH = 8
"""Pixels along a side of a patch."""
MERGE = 2
"""Patches along a side of what becomes one image token."""
MAX_PIXELS = 64 * 64
"""Larger pictures are scaled down: a puzzle of 96 x 384 to 32 x 128, which makes 2 x 8 image tokens."""

IMAGE_SETTINGS: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": MERGE,
    "patch_size": PATCH,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 16 * 16, "longest_edge": MAX_PIXELS},
    "temporal_patch_size": 2,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer: control tokens, then 256 bytes, then the words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, *dict.fromkeys(form for word in WORDS for form in (word, "Ġ" + word))]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    # ignore_merges: a piece that is in the vocabulary is taken whole, and no merge is needed to arrive at it.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def write_processor(folder: Path) -> None:
    """Write tokenizer, chat template and image settings into a model folder."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_SETTINGS, indent=2) + "\n", "utf-8")
