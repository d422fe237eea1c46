"""Both stages on one device under ZeRO-3, in bfloat16: NCCL and the fused kernel on a card, their twins on a CPU."""

import json
import math

import pytest
from running import cache_folder, deepspeed, tiny_recipe
from safetensors import safe_open
from tiny import KINDS, write_data, write_vlm

pytestmark = pytest.mark.gpu
CONFIGS = {"cuda": "zero3", "cpu": "zero3_cpu"}


def test_two_updates_of_each_step_and_an_export(device, tmp_path):
    kind = KINDS[0]
    models = {
        (kind, role): write_vlm(tmp_path / role, kind, layers, 32, seed=layers)
        for role, layers in (("teacher", 6), ("student", 3))
    }
    data = write_data(tmp_path / "data", 8)
    two = {step: {"steps": 2, "batch_size": 4} for step in ("verbalize", "interact", "reinforce")}
    recipe = tiny_recipe(tmp_path, models, kind, data, zero=CONFIGS[device], precision="bf16", **two)
    for stage in (1, 2):
        deepspeed(1, "train.py", "--stage", stage, "--recipe", recipe)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {
        step: [line[name] for line in lines if line["step"] == step]
        for step, name in (("verbalize", "teacher/6"), ("interact", "last"), ("reinforce", "cross_entropy"))
    }
    for step, values in losses.items():
        assert len(values) == 2 and all(map(math.isfinite, values)), step
    assert json.loads((cache_folder(run) / "manifest.json").read_text())["tokens"] > 0
    with safe_open(run / "student" / "model.safetensors", "pt") as weights:
        assert {str(weights.get_tensor(name).dtype) for name in weights.keys()} == {"torch.bfloat16"}  # noqa: SIM118
