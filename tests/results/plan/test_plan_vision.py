"""Operations of the image encoder, of families that make a token of one patch or of many, against torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from bench.families.inputs import QUESTION, RESPONSE, probe_rows
from bench.families.shrink import shrunk_config
from bench.steps.measures import CPU_ATTENTION_FLOPS
from pipeline.recipe.schema import Model
from pipeline.recipe.shipped import CONFIGS
from pipeline.results.plan.models import PlannedModel, Vision, planned_model, vision_of
from pipeline.results.plan.operations import Sample, vision_forward
from pipeline.vlm.parts import recognise
from pipeline.vlm.processing import TOKEN_KEYS


def counted(model, images) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
        model.base_model.get_image_features(**images)
    return counter.get_total_flops()


def of_images(tokens: float, images: float = 1.0) -> Sample:
    return Sample(tokens=0, response=0, image=tokens, images=images)


def shipped(name: str) -> Vision:
    return vision_of(planned_model("student", Model(path=CONFIGS / name, layers=(1,))))


@pytest.mark.parametrize(
    ("kind", "patches"),
    [("qwen2_vl", 4), ("qwen2_5_vl", 4), ("internvl", 4), ("idefics3", 4), ("smolvlm", 4), ("granite_docling", 16),
     ("gemma3", 4), ("mistral3", 4), ("aya_vision", 4), ("gemma4", 9), ("llava", 1)],
)  # fmt: skip
def test_a_token_of_many_patches_costs_all_of_them(kind, patches):
    """Within 6 %: CLIP's and InternVL's encoders have a patch more, which is one of 17 here."""
    config = shrunk_config(kind)
    config.vision_config.vision_use_head = False  # as Gemma 3 is published; the default has one
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    recognise(model)
    row, _ = probe_rows(model)
    tokens = row.inputs["input_ids"].numel() - len(QUESTION) - len(RESPONSE)
    images = {name: value for name, value in row.inputs.items() if name not in TOKEN_KEYS}
    vision = vision_of(PlannedModel("student", model, (1,)))
    assert vision.patches_per_token == patches
    assert vision_forward(vision, of_images(tokens)) == pytest.approx(counted(model, images), rel=0.06)


def test_blocks_with_windows_attend_within_them(tiny_models):
    """8 x 8 patches in four windows in the first block, and all of them in the second."""
    folder = tiny_models["qwen2_5_vl", "student"]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    images = {"pixel_values": torch.randn(64, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    vision = vision_of(planned_model("student", Model(path=folder, layers=(1,))))
    assert vision_forward(vision, of_images(16)) == pytest.approx(counted(model, images), rel=0.001)


def test_the_shipped_models_patches():
    names = ("qwen2_vl_7b", "qwen2_5_vl_7b", "qwen3_vl_8b", "llava_onevision_qwen2_7b_ov_hf", "internvl3_1b_hf")
    assert [shipped(name).patches_per_token for name in (*names, "smolvlm_256m")] == [4, 4, 4, 1, 4, 16]


def test_attention_is_within_an_image_or_a_tile():
    """By Qwen2-VL's images of any size, and by InternVL's tiles of 256 tokens, however many a sample has."""
    grid, tiled = shipped("qwen2_vl_7b"), shipped("internvl3_1b_hf")
    assert vision_forward(grid, of_images(800, 2)) == pytest.approx(2 * vision_forward(grid, of_images(400)))
    assert vision_forward(tiled, of_images(2560)) == pytest.approx(10 * vision_forward(tiled, of_images(256)))
    assert vision_forward(grid, of_images(800)) > 2 * vision_forward(grid, of_images(400))
    assert vision_forward(grid, of_images(0, 0)) == 0
