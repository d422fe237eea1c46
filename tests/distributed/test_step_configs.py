"""A run whose steps have different ZeRO stages; and what interaction leaves in memory when reinforcement begins."""

from __future__ import annotations

import json

import pytest
from running import ROOT, deepspeed, tiny_recipe
from safetensors.torch import load_file
from tiny import write_data

KIND = "qwen2_vl"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "train", 24)


def test_each_step_runs_under_its_own_zero_stage_and_leaves_nothing_to_the_next(
    tiny_models, data, tmp_path, monkeypatch
):
    configs = {"verbalize": "zero3_hpz", "interact": "zero3_cpu", "reinforce": "zero1"}
    own = {step: {"steps": 2, "deepspeed": f"{ROOT}/ds_configs/{name}.json"} for step, name in configs.items()}
    recipe = tiny_recipe(tmp_path, tiny_models, KIND, data, "zero0", precision="bf16", **own)
    scale = tmp_path / "scale.jsonl"
    monkeypatch.setenv("SCALE", str(scale))
    deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    said = deepspeed(2, "../tests/distributed/leftover.py", "--stage", 2, "--recipe", recipe)
    assert "bf16_optimizer" not in said, "ZeRO-1's optimizer prints the memory at each of its steps of starting"
    interact, reinforce = (json.loads(line) for line in scale.read_text().splitlines())
    assert (interact["step"], interact["stage"]) == ("interact", 3)
    assert (reinforce["step"], reinforce["stage"]) == ("reinforce", 1)
    weights = load_file(tiny_models[KIND, "student"] / "model.safetensors").values()
    size = sum(weight.numel() * 2 for weight in weights)  # in bfloat16
    left = reinforce["bytes"] - interact["bytes"]
    assert left < size / 10, f"{left} bytes of the interaction, whose student has {size}"
