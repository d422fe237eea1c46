"""With torchvision and without it a model's processor makes the same tokens of a chat: make test-torchvision."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
from tiny import png, turn
from tiny_families import FAMILIES, NEED_TORCHVISION, write_family
from transformers import AutoImageProcessor
from transformers.utils import is_torchvision_available

from pipeline.vlm.image_only import load_image_only
from pipeline.vlm.processing import ChatEncoder, load_processor

pytestmark = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision: make test-torchvision")
VIDEO = {
    "qwen2_vl": tf.Qwen2VLVideoProcessor,
    "qwen2_5_vl": tf.Qwen2VLVideoProcessor,
    "qwen3_vl": tf.Qwen3VLVideoProcessor,
    "qwen3_vl_moe": tf.Qwen3VLVideoProcessor,
    "qwen3_5": tf.Qwen3VLVideoProcessor,
    "llava_onevision": tf.LlavaOnevisionVideoProcessor,
    "internvl": tf.InternVLVideoProcessor,
}
"""Processors with a video part, which transformers builds with torchvision alone. SmolVLM's also needs num2words."""
KINDS = (*tiny.KINDS, *tiny.MORE_KINDS, *(kind for kind in FAMILIES if kind not in NEED_TORCHVISION))
SIZES = ((56, 56), (28, 28), (100, 37), (31, 90), (200, 200))


def encoders(folder: Path, kind: str) -> tuple[ChatEncoder, ChatEncoder]:
    """A family's encoder as it is with torchvision, and as it is without."""
    write_family(folder, kind, 2) if kind in FAMILIES else tiny.write_vlm(folder, kind, 2, 32)
    if kind in VIDEO:
        VIDEO[kind]().save_pretrained(folder)
    whole, without = load_processor(folder), load_image_only(folder) or load_processor(folder)
    without.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert not type(whole.image_processor).__name__.endswith("Pil")
    assert (kind in VIDEO) == (getattr(whole, "video_processor", None) is not None)
    return ChatEncoder(whole, 4096), ChatEncoder(without, 4096)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_the_same(kind, tmp_path):
    """Of pictures of several sizes and of text. Pixels differ by how each rounds a resized one."""
    whole, without = encoders(tmp_path, kind)
    chats = [([turn("user", "<image>", "what?")], [png(size=size, seed=1)]) for size in SIZES]
    for question, pictures in [*chats, ([turn("user", "what?")], [])]:
        chat = [*question, turn("assistant", "abab")]
        ours, theirs = (encoder("k", chat, pictures) for encoder in (whole, without))
        assert torch.equal(ours.response, theirs.response) and ours.inputs.keys() == theirs.inputs.keys()
        for name, value in ours.inputs.items():
            other = theirs.inputs[name]
            if value.is_floating_point():
                assert value.shape == other.shape
                assert (value - other).abs().mean() < 0.02 * (value.amax() - value.amin()), name
            else:
                assert torch.equal(value, other), name
