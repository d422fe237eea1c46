"""The recipe's attention: each kind gives the same numbers, and what cannot be had is refused before anything loads."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from running import deepspeed, tiny_recipe
from tiny import KINDS, MORE_KINDS, chats, write_data

from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.vlm import attention as module
from pipeline.vlm.attention import check_attention
from pipeline.vlm.backbone import load_vlm, run_backbone
from pipeline.vlm.processing import ChatEncoder, collate, load_processor


@pytest.fixture
def nothing_loads(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("a model was loaded, only to be refused")

    monkeypatch.setattr(tf.AutoModelForImageTextToText, "from_pretrained", fail)


def states(folder, dtype: torch.dtype, attention: str) -> torch.Tensor:
    """Hidden states of all layers at response positions, of a batch with padding and an image."""
    model = load_vlm(folder, dtype, attention).eval()
    assert model.config.get_text_config()._attn_implementation == attention
    encoder = ChatEncoder(load_processor(folder), 512)
    batch = collate([encoder(k, r["messages"], i) for k, r, i in chats(4)], encoder.filler(), 0).to("cpu", dtype)
    with torch.no_grad():
        return torch.stack(run_backbone(model, batch.inputs, (1, 2, 3), batch.positions)).double()


@pytest.mark.parametrize("kind", KINDS + MORE_KINDS)
def test_eager_gives_what_sdpa_gives(kind, tiny_models):
    """Both are as near to float64 as their dtype allows."""
    folder = tiny_models[kind, "student"]
    truth = states(folder, torch.float64, "eager")
    for dtype in (torch.float32, torch.bfloat16):
        errors = {name: (states(folder, dtype, name) - truth).norm() / truth.norm() for name in ("sdpa", "eager")}
        # Three layers and a tower of some ten roundings each, in a random direction: below ten units in the last place.
        assert all(error < 10 * torch.finfo(dtype).eps for error in errors.values()), (dtype, errors)


def test_flash_attention_is_refused_with_all_that_is_lacking(tiny_models, nothing_loads, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    told = "needs a GPU, and torch finds none; the package flash-attn, .*; precision: bf16, and the models' is float32"
    with pytest.raises(RecipeError, match=told + ".*Set attention: sdpa"):
        load_vlm(tiny_models["qwen2_vl", "student"], torch.float32, "flash_attention_2")
    with pytest.raises(RecipeError) as refused:
        check_attention("flash_attention_2", torch.bfloat16)
    assert "precision" not in str(refused.value)
    for attention in ("sdpa", "eager"):
        check_attention(attention, torch.float32)


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(RecipeError, match=r"compute capability 8\.0 or more, and this one has 7\.5"):
        check_attention("flash_attention_2", torch.bfloat16)


def test_a_family_without_it_is_refused_before_its_weights_load(tiny_models, nothing_loads, monkeypatch):
    monkeypatch.setattr(tf.Qwen2VLForConditionalGeneration, "_supports_sdpa", False)
    with pytest.raises(RecipeError, match=r"transformers has none for model_type 'qwen2_vl'\. Set attention: eager"):
        load_vlm(tiny_models["qwen2_vl", "student"], torch.float32, "sdpa")


def test_a_step_is_refused_at_once_and_an_unknown_kind_in_the_recipe(tiny_models, tmp_path):
    data = write_data(tmp_path / "data", 8)
    recipe = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", data, attention="flash_attention_2")
    said = deepspeed(1, "train.py", "--stage", 1, "--recipe", recipe, check=2)
    assert "attention: flash_attention_2 needs" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "verbalize").exists()
    with pytest.raises(RecipeError, match="attention: .*'sdpa', 'flash_attention_2' or 'eager', found 'flash'"):
        load_recipe(recipe, ["attention=flash"])
