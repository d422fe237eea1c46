"""Tokenizer, chat template and image settings of the demo models: the same for teacher and student of a pair.

A word of WORDS is one token, with or without the space before it; anything else falls apart into bytes. So every text
survives encoding and decoding, and the vocabulary stays small.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
"""What the plain puzzles and easy-VQA are made of."""

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
    "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
    "temporal_patch_size": 2,
}
"""A plain puzzle of 96 x 384 is scaled down to 32 x 128, which makes 2 x 8 image tokens."""


@dataclass(frozen=True)
class Inputs:
    """What the models of a pair read."""

    words: tuple[str, ...] = WORDS
    """Words that are one token each."""
    max_pixels: int = 64 * 64
    """Larger pictures are scaled down."""

    @property
    def image_settings(self) -> dict[str, Any]:
        """What preprocessor_config.json holds."""
        return IMAGE_SETTINGS | {"size": IMAGE_SETTINGS["size"] | {"longest_edge": self.max_pixels}}

    @property
    def image_tokens(self) -> int:
        """Image tokens of a picture of max_pixels."""
        return self.max_pixels // (PATCH * MERGE) ** 2


PLAIN = Inputs()
INPUTS = {
    "puzzles": PLAIN,
    "easy-vqa": PLAIN,
    "puzzles-deep": Inputs((*WORDS, "fifth", "sixth"), 32 * 192),
}
"""Pair -> what its models read. A deep puzzle of 96 x 576 becomes 32 x 192: 2 x 12 image tokens."""


def build_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Make the tokenizer: control tokens, then 256 bytes, then the words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, *dict.fromkeys(form for word in words for form in (word, "Ġ" + word))]
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


def write_processor(folder: Path, inputs: Inputs = PLAIN) -> None:
    """Write tokenizer, chat template and image settings into a model folder."""
    tokenizer = build_tokenizer(inputs.words)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(inputs.image_settings, indent=2) + "\n", "utf-8")
