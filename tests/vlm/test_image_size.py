"""Images are as large as the recipe allows, for every family alike, and where they leave no room the knob is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import KINDS, MORE_KINDS, png, turn

from pipeline.errors import SampleError
from pipeline.vlm.image_size import NO_LIMITS, PixelLimits
from pipeline.vlm.processing import ChatEncoder, load_processor

CHAT = [turn("user", "<image>", "what?"), turn("assistant", "a page")]


@given(width=st.integers(1, 900), height=st.integers(1, 900), low=st.integers(1, 9000), more=st.integers(0, 90_000))
def test_an_image_is_scaled_into_the_limits_and_keeps_its_shape(width, height, low, more):
    limits, image = PixelLimits(low, low + more), Image.new("L", (width, height))
    scaled = limits.apply(image)
    area, before = scaled.width * scaled.height, width * height
    if low <= before <= low + more:
        assert scaled is image
    elif before > low + more:
        assert area <= low + more or 1 in scaled.size
    else:
        assert area >= low
    if min(scaled.size) > 8:
        assert abs(scaled.width / scaled.height / (width / height) - 1) < 0.15
    assert NO_LIMITS.apply(image) is image


def image_tokens(encoder: ChatEncoder, image: bytes) -> int:
    encoded = encoder("k", CHAT, [image])
    return int((encoded.inputs["input_ids"] == encoder.processor.image_token_id).sum())


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_processor_that_scales_by_area_takes_the_limits(kind, tiny_models):
    """The same tokens as the processor gives by itself with these limits: what a user of the export will get."""
    folder, page = tiny_models[kind, "student"], png(size=(170, 220))
    patch = load_processor(folder).image_processor.patch_size * 2
    largest = ChatEncoder(load_processor(folder), 4096, PixelLimits(None, 9 * patch * patch))
    smallest = ChatEncoder(load_processor(folder), 4096, PixelLimits(16 * patch * patch, 64 * patch * patch))
    by_itself = load_processor(folder)
    by_itself.image_processor.size = {"shortest_edge": patch * patch, "longest_edge": 9 * patch * patch}
    assert image_tokens(largest, page) == image_tokens(ChatEncoder(by_itself, 4096), page) <= 9
    assert image_tokens(smallest, png(size=(20, 20))) == 16


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_other_processors_get_images_within_the_limits(kind, tiny_models, monkeypatch):
    encoder = ChatEncoder(load_processor(tiny_models[kind, "student"]), 4096, PixelLimits(400, 900))
    seen = []
    process = encoder._process
    monkeypatch.setattr(encoder, "_process", lambda text, images: seen.extend(images) or process(text, images))
    encoder("k", CHAT, [png(size=(170, 220))])
    encoder.prompt(CHAT[:1], [png(size=(4, 4))])
    assert [image.size for image in seen] == [(26, 34), (20, 20)]


@pytest.mark.parametrize("kind", KINDS + MORE_KINDS)
def test_where_images_leave_no_room_the_knob_is_named(kind, tiny_models):
    encoder = ChatEncoder(load_processor(tiny_models[kind, "student"]), 20)
    with pytest.raises(SampleError, match=r"max_length=20 tokens: 1 image\(s\) come before it. Lower data.max_pixels"):
        encoder("k", CHAT, [png(size=(56, 56))])
    with pytest.raises(SampleError, match=r"max_length=20 tokens \(data.max_length\)$"):
        encoder("k", [turn("user", "x" * 50), CHAT[1]], [])
