"""Any chat with any pictures under any template: it is rejected with a reason, or its loss is a number."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_chat_template import TEMPLATES, USABLE, texts, turns
from tiny import turn

from pipeline.errors import SampleError
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.image_size import PixelLimits
from pipeline.vlm.processing import ChatEncoder, collate, load_processor

IMAGE = "{% for c in m['content'] if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endfor %}"


def picture(mode: str, size: tuple[int, int], kind: str, cut: bool) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind)
    return out.getvalue()[: 20 if cut else None]


pictures = st.one_of(
    st.builds(
        picture,
        st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA", "I;16"]),
        st.tuples(st.integers(1, 90), st.integers(1, 90)) | st.sampled_from([(1, 300), (2001, 10)]),
        st.just("PNG"),
        st.booleans(),
    ),
    st.builds(picture, st.sampled_from(["RGB", "CMYK", "L"]), st.just((30, 20)), st.just("JPEG"), st.just(False)),
    st.binary(max_size=30),
)
asked = st.builds(lambda text, before: turn("user", *["<image>"] * before, text), texts, st.integers(0, 2))


@pytest.fixture(scope="module")
def model(tiny_models):
    folder = tiny_models["qwen2_vl", "student"]
    return load_vlm(folder, torch.float32).eval(), load_processor(folder)


@given(
    name=st.sampled_from(USABLE),
    chat=st.lists(turns | asked, max_size=5),
    images=st.lists(pictures, max_size=3),
    limits=st.sampled_from([PixelLimits(), PixelLimits(None, 900), PixelLimits(4000, 9000)]),
)
@settings(max_examples=150, deadline=None)
def test_rejected_with_a_reason_or_a_loss(model, name, chat, images, limits):
    vlm, processor = model
    processor.chat_template = TEMPLATES[name].replace("{{ t", IMAGE + "{{ t")
    encoder = ChatEncoder(processor, 200, limits)
    encoder.check()
    try:
        encoded = encoder("k", chat, images)
    except SampleError as error:
        assert len(str(error)) > 15
        return
    batch = collate([encoded], encoder.filler(), pad_id=0)
    with torch.no_grad():
        hidden = vlm(**batch.inputs).logits.flatten(0, 1)[batch.positions]
    assert torch.isfinite(torch.nn.functional.cross_entropy(hidden, batch.labels)) and batch.counts[0] > 0
