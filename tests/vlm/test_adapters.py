"""Adapters: which layers get one, and that those kept beside a merged student are that student, as peft reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel

from pipeline.errors import RecipeError
from pipeline.recipe.schema import Interact
from pipeline.steps.reinforce import Finetuned
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.export import save_student
from pipeline.vlm.lora import adapter_beside, add_lora, merge_lora, save_adapter
from pipeline.vlm.parts import decoder_layers, lm_head, set_trainable
from pipeline.vlm.processing import ChatEncoder, collate, load_processor

EPS = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""A few roundings, of sums over a width of 32 and of three layers one after the other."""


def logits(model, folder: Path, dtype: torch.dtype) -> torch.Tensor:
    encoder = ChatEncoder(load_processor(folder), 512)
    batch = collate(
        [encoder(key, record["messages"], images) for key, record, images in tiny.chats(3)], encoder.filler(), 0
    )
    with torch.no_grad():
        return model.eval()(**batch.to("cpu", dtype).inputs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_kept_adapter_on_its_base_is_the_merged_student(kind, dtype, tiny_models, tmp_path):
    base, training = tiny_models[kind, "student"], Interact(batch_size=1, lora_rank=4, lora_alpha=8, lora_dropout=0.5)
    model = load_vlm(base, dtype)
    add_lora(model, training, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as after training: it starts at zero
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(dtype)
    trained = logits(model, base, dtype)
    weights, student = {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "student"
    save_adapter(weights, training, base, adapter_beside(student))
    save_student(model, merge_lora(weights, 4, 8), base, student)
    adapted: torch.nn.Module = PeftModel.from_pretrained(load_vlm(base, dtype), adapter_beside(student))
    merged = logits(load_vlm(student, dtype), base, dtype)
    scale = float(merged.abs().max())
    for ours in (trained, logits(adapted, base, dtype)):
        assert (ours - merged).abs().max() <= EPS[dtype] * 4 * scale
    assert (logits(load_vlm(base, dtype), base, dtype) - merged).abs().max() > EPS[dtype] * 16 * scale, "it moved"
    theirs, mine = adapted.merge_and_unload().state_dict(), load_vlm(student, dtype).state_dict()
    assert theirs.keys() == mine.keys()
    for name, weight in mine.items():
        assert (theirs[name] - weight).abs().max() <= torch.finfo(dtype).eps * 4 * weight.abs().max(), name
    config = json.loads((adapter_beside(student) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 4 and config["lora_alpha"] == 8


def test_named_layers_alone_get_adapters_and_an_unknown_name_says_which_there_are(tiny_models):
    model = load_vlm(tiny_models["qwen2_vl", "student"], torch.float32)
    with pytest.raises(
        RecipeError, match="lora_targets: the decoder has no linear layer qproj; it has down_proj, gate_"
    ):
        add_lora(model, Interact(batch_size=1, lora_rank=2, lora_targets=("qproj",)), seed=0)
    add_lora(model, Interact(batch_size=1, lora_rank=2, lora_targets=("q_proj", "v_proj")), seed=0)
    adapted = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapted) == 2 * len(decoder_layers(model)) and all(
        name.endswith(("q_proj", "v_proj")) for name in adapted
    )


def test_without_peft_the_error_names_the_extra(tiny_models, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(RecipeError, match=r"peft is not installed: pip install -e '.\[lora\]'"):
        add_lora(
            load_vlm(tiny_models["qwen2_vl", "student"], torch.float32), Interact(batch_size=1, lora_rank=2), seed=0
        )


@pytest.mark.parametrize("tie", [False, True])
def test_each_part_trains_alone(tie, tmp_path):
    """A tied head is the embeddings too, which are the decoder's: both must be named."""
    model = load_vlm(tiny.write_vlm(tmp_path / "m", "qwen2_vl", 2, 32, tie=tie), torch.float32)
    embeddings, head = model.get_input_embeddings().weight, lm_head(model).weight
    assert (embeddings is head) == tie

    def trained(*train: str) -> set[str]:
        set_trainable(model, train)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    every = {name for name, _ in model.named_parameters()}
    parts = {part: trained(part) for part in ("decoder", "projector", "vision", "head")}
    assert all(".layers." in name or "norm" in name or "embed_tokens" in name for name in parts["decoder"])
    assert parts["projector"] and all("merger" in name for name in parts["projector"])
    assert parts["vision"] and all("visual" in name and "merger" not in name for name in parts["vision"])
    assert parts["head"] == (set() if tie else {"lm_head.weight"})
    assert trained("decoder", "projector", "vision", "head") == every
    trained("decoder")
    assert embeddings.requires_grad != tie
    trained("decoder", "head")
    assert embeddings.requires_grad and head.requires_grad


@pytest.mark.parametrize("part", ["decoder", "projector", "vision", "head"])
def test_an_update_moves_the_part_that_trains_alone(part, tiny_models):
    """Gradients reach it through what is frozen, also with recomputed layers."""
    folder = tiny_models["qwen2_vl", "student"]
    model = load_vlm(folder, torch.float32)
    set_trainable(model, (part,))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    encoder = ChatEncoder(load_processor(folder), 512)
    chats = [encoder(key, record["messages"], images) for key, record, images in tiny.chats(3)]
    batch, module = collate(chats, encoder.filler(), 0), Finetuned(model, len(encoder.processor.tokenizer)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    module(batch).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
