"""Whole runs of families that stand in no table, on two processes under ZeRO-3: both stages, export, evaluate, trace.

Gemma 3 (token types, norms with an offset, sliding attention) and Qwen3-VL with experts in every run of the tests;
the others with -m families.
"""

from __future__ import annotations

import json

import pytest
import torch
from running import ROOT, deepspeed, python, tiny_recipe
from tiny import MORE_KINDS, chats, write_data, write_vlm
from tiny_families import FAMILIES, as_parameter, write_family

from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.processing import ChatEncoder, collate, load_processor

ALWAYS = ("gemma3", "qwen3_vl_moe")


@pytest.mark.parametrize(
    "kind",
    [as_parameter(kind, *([] if kind in ALWAYS else [pytest.mark.families])) for kind in (*FAMILIES, *MORE_KINDS)],
)
def test_both_stages_export_evaluate_and_trace(kind, tmp_path):
    """Ranks have chats with images and without, and experts that one rank's tokens chose and the other's did not."""
    data = write_data(tmp_path / "data", 20, shards=2)
    depths = {"teacher": 5, "student": 3}
    write = write_family if kind in FAMILIES else write_vlm
    models = {(kind, role): write(tmp_path / role, kind, depth, 32) for role, depth in depths.items()}
    config = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # as of a real model, no weight stays whole
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    recipe = tiny_recipe(
        tmp_path,
        models,
        kind,
        data,
        teacher={"layers": [1, 2, 3]},
        verbalize={"steps": 8},
        interact={"steps": 3},
        deepspeed=str(tmp_path / "zero3.json"),
    )
    run = tmp_path / "run"
    deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    verbalize = [line for line in lines if line["step"] == "verbalize"]
    for role, layer in (("teacher", 2), ("student", 1)):
        assert verbalize[-1][f"{role}/{layer}"] < verbalize[0][f"{role}/{layer}"], "its verbalizers learn"
    reinforce = [line["cross_entropy"] for line in lines if line["step"] == "reinforce"]
    assert reinforce[-1] < reinforce[0]
    assert _loss(run / "student") < reinforce[0], "the export is what was trained"
    said = python("-m", "pipeline", "evaluate", "--run", run, "--data", data, "--max-new-tokens", 4)
    assert "perplexity" in said.lower()
    assert "layer" in python("-m", "pipeline", "trace", "--run", run, "--data", data, "--sample", "s00000").lower()


def _loss(folder) -> float:
    """The response loss of a folder as transformers loads it, in float64 from its own logits."""
    model, encoder = load_vlm(folder, torch.float32).eval(), ChatEncoder(load_processor(folder), 512)
    batch = collate([encoder(k, r["messages"], i) for k, r, i in chats(20)], encoder.filler(), 0)
    with torch.no_grad():
        logits = model(**batch.inputs).logits.double().flatten(0, 1)[batch.positions]
    return float(torch.nn.functional.cross_entropy(logits, batch.labels))
