"""Verbalizers: the logit lens at first, the model's own words at the last layer, the formula in between."""

from __future__ import annotations

import pytest
import torch
from tiny import KINDS, MORE_KINDS, chats
from torch.nn import functional as F

from pipeline.vlm.backbone import load_vlm, run_backbone
from pipeline.vlm.parts import decoder_layers, final_norm, image_parts, set_trainable
from pipeline.vlm.processing import ChatEncoder, collate, load_processor
from pipeline.vlm.verb_ffns import initial_verb_ffns
from pipeline.vlm.verbalizer import VerbalizedVLM, VerbFFN

LAYERS = (1, 2, 4)


def build(folder, form="residual", vocab=265):
    model = load_vlm(folder, torch.float32).eval()
    return VerbalizedVLM(model, LAYERS, initial_verb_ffns(LAYERS, 32, form, torch.float32, seed=0), vocab)


def batch_of(folder, count=4):
    encoder = ChatEncoder(load_processor(folder), 512)
    return collate([encoder(k, r["messages"], i) for k, r, i in chats(count)], encoder.filler(), 0)


def logits_of(verbalized, unembedding):
    return unembedding.logits(verbalized)


@pytest.mark.parametrize("kind", KINDS + MORE_KINDS)
def test_untrained_verbalizers_are_the_logit_lens_and_the_last_layer_is_the_model(kind, tiny_models):
    folder = tiny_models[kind, "teacher"]
    side, batch = build(folder), batch_of(folder)
    with torch.no_grad():
        hidden = run_backbone(side.backbone, batch.inputs, side.all_layers(), batch.positions)
        ours = side.head(logits_of, side.verbalize_states(hidden))
        output = side.backbone(**batch.inputs, output_hidden_states=True)
    norm, head = final_norm(side.backbone), side.backbone.get_output_embeddings()
    for row, layer in enumerate(LAYERS):
        lens = head(norm(output.hidden_states[layer])).flatten(0, 1)[batch.positions]
        torch.testing.assert_close(ours[row], lens)
    torch.testing.assert_close(ours[-1], output.logits.flatten(0, 1)[batch.positions])


def test_the_formula():
    torch.manual_seed(0)
    hidden = torch.randn(5, 16, dtype=torch.float64)
    block = VerbFFN(16, "residual", torch.float64)
    normed = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    change = (F.silu(normed @ block.gate.weight.T) * (normed @ block.up.weight.T)) @ block.down.weight.T
    torch.testing.assert_close(block(hidden), hidden + change)
    literal = VerbFFN(16, "paper", torch.float64)
    expected = (F.silu(hidden @ literal.gate.weight.T) * (hidden @ literal.up.weight.T)) @ literal.down.weight.T
    torch.testing.assert_close(literal(hidden), expected)
    assert sum(p.numel() for p in literal.parameters()) == 3 * 16 * 16


def test_padding_rows_of_the_head_are_cut_off(tiny_models, tmp_path):
    import tiny

    folder = tiny.write_vlm(tmp_path / "padded", "qwen2_vl", 5, 32, rows=300)
    side = build(folder, vocab=265)
    assert side.head(logits_of, torch.randn(1, 3, 32)).shape == (1, 3, 265)


@pytest.mark.parametrize("kind", KINDS + MORE_KINDS)
def test_everything_trains_but_the_vision_tower(kind, tiny_models):
    model = load_vlm(tiny_models[kind, "student"], torch.float32)
    set_trainable(model, ("decoder", "projector", "head"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all("visual." in name or "vision_tower." in name for name in frozen)
    assert not any("merger" in name or "projector" in name for name in frozen)
    set_trainable(model, ("decoder", "projector", "vision", "head"))
    assert all(p.requires_grad for p in model.parameters())
    set_trainable(model, ("decoder", "head"))
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    parts = image_parts(model)
    assert still > frozen and still == {n for n, _ in model.named_parameters() if any(f"{p}." in n for p in parts)}


def test_hidden_states_are_raw_layer_outputs_at_the_positions_only(tiny_models):
    folder = tiny_models["qwen2_vl", "teacher"]
    model, batch = load_vlm(folder, torch.float32).eval(), batch_of(folder, 2)
    seen = {}
    stack = decoder_layers(model)
    handle = stack[-1].register_forward_hook(lambda m, i, o: seen.update(last=o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        (last,) = run_backbone(model, batch.inputs, [6], batch.positions)
    handle.remove()
    assert last.shape == (len(batch.labels), 32)
    torch.testing.assert_close(last, seen["last"].flatten(0, 1)[batch.positions])
    assert not stack[-1]._forward_hooks, "hooks must not outlive the call"
