"""On GPUs: a model on one, and in parts on two, against the same model on the CPU, in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import KINDS, png, turn, write_vlm

from pipeline.recipe.schema import Data
from pipeline.results.evaluate.scoring import response_loss
from pipeline.results.generate import Vlm, load
from pipeline.results.trace.layers import trace
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.parts import decoder_layers
from pipeline.vlm.placement import device_map, weight_bytes
from pipeline.vlm.verb_ffns import initial_verb_ffns
from pipeline.vlm.verbalizer import VerbalizedVLM

pytestmark = pytest.mark.gpu

LAYERS = (1, 3)
MESSAGES = [turn("user", "<image>", "what comes next?"), turn("assistant", "nothing")]
PICTURE = [png(seed=5)]


def measured(vlm: Vlm):
    """(nats, tokens) of a response, and the tokens that each layer says to its question."""
    ffns = initial_verb_ffns(LAYERS, 32, "residual", torch.float32, seed=1)
    for layer in LAYERS:
        ffns[str(layer)].to(next(decoder_layers(vlm.model)[layer - 1].parameters()).device)
    side = VerbalizedVLM(vlm.model, LAYERS, ffns, vocab=len(vlm.tokenizer))
    found = trace("it", vlm, side, vlm.encoder.prompt(MESSAGES[:1], PICTURE), 4)
    return response_loss(vlm, [vlm.encoder("key", MESSAGES, PICTURE)]), [
        one.token for layer in found.layers for one in layer.free
    ]


@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpus", [1, 2])
def test_devices_change_no_answer(tmp_path, monkeypatch, kind, gpus, tie):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPU(s)")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # else the pictures' patches are not in float32
    on_cpu = load(write_vlm(tmp_path, kind, 4, 32, tie=tie), Data(train="x", max_length=512))
    size = weight_bytes(tmp_path, torch.float32)
    places = device_map(tmp_path, torch.float32, {0: size, 1: size}) if gpus == 2 else {"": 0}
    model = load_vlm(tmp_path, torch.float32, device_map=places).eval()
    assert {weight.device.index for weight in model.parameters()} == set(range(gpus))
    on_gpus = replace(on_cpu, model=model, device=model.get_input_embeddings().weight.device)
    ((nats, tokens), said), ((expected_nats, expected_tokens), expected) = measured(on_gpus), measured(on_cpu)
    assert nats == pytest.approx(expected_nats, rel=1e-4) and tokens == expected_tokens
    assert said == expected
