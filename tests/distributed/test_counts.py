"""What a step does and how often, on two ranks under ZeRO-3: layers recomputed, heads gathered, ranks without words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from running import deepspeed, tiny_recipe

KIND, LAYERS = "qwen2_vl", 3
UPDATES, MICRO_STEPS = 3, 2
TRAINING = {"steps": UPDATES, "batch_size": 8, "micro_batch_size": 2}
COUNTED = "../tests/distributed/counted.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "train", 16, shards=2)


def counted(recipe: Path, folder: Path, stage: int, only: str, monkeypatch) -> dict:
    monkeypatch.setenv("TALLY", str(folder / f"{only}.json"))
    deepspeed(2, COUNTED, "--stage", stage, "--only", only, "--recipe", recipe)
    return json.loads((folder / f"{only}.json").read_text())


def losses(run: Path, step: str) -> list[dict]:
    return [x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if x["step"] == step]


@pytest.fixture(scope="module")
def verbalized(tiny_models, data, tmp_path_factory):
    """(recipe, folder, tally) after stage 1."""
    folder = tmp_path_factory.mktemp("counts")
    recipe = tiny_recipe(
        folder, tiny_models, KIND, data, **dict.fromkeys(("verbalize", "interact", "reinforce"), TRAINING)
    )
    with pytest.MonkeyPatch.context() as patch:
        tally = counted(recipe, folder, 1, "verbalize", patch)
    deepspeed(2, "cache.py", "--recipe", recipe)
    return recipe, folder, tally


def of_heads(tally: dict) -> dict:
    return {name: times for name, times in tally["gathered"].items() if name.endswith("head.weight")}


def test_a_head_is_gathered_once_a_step_forward_and_at_most_once_backward(verbalized, monkeypatch):
    recipe, folder, tally = verbalized
    for told, heads in ((tally, 2), (counted(recipe, folder, 2, "interact", monkeypatch), 1)):
        assert len(of_heads(told)) == heads, told
        for name, times in of_heads(told).items():
            assert times["forward"] == UPDATES * MICRO_STEPS, (name, times)
            assert times["backward"] <= UPDATES * MICRO_STEPS, (name, times)


@pytest.mark.parametrize("step", ["interact", "reinforce"])
def test_recomputation_runs_each_layer_twice_and_changes_no_loss(verbalized, tmp_path, step, monkeypatch):
    recipe, folder, _ = verbalized
    runs, tallies = [], []
    for again in (False, True):
        run = tmp_path / str(again)
        run.mkdir()
        for part in ("verbalize", "cache"):
            (run / part).symlink_to(folder / "run" / part)
        settings = [f"run={run}", f"gradient_checkpointing={again}"] + ["interact.steps=0"] * (step == "reinforce")
        monkeypatch.setenv("TALLY", str(run / "tally.json"))
        steps = ["--stage", 2, "--only", step, "--recipe", recipe, "--set", *settings]
        deepspeed(2, COUNTED, *steps)
        runs.append(losses(run, step))
        tallies.append(json.loads((run / "tally.json").read_text())["layers"])
    assert tallies == [UPDATES * MICRO_STEPS * LAYERS, 2 * UPDATES * MICRO_STEPS * LAYERS]
    name = "last" if step == "interact" else "cross_entropy"
    assert [one[name] for one in runs[1]] == pytest.approx([one[name] for one in runs[0]], rel=1e-5)
    assert runs[0][0][name] != runs[0][-1][name]


def test_a_rank_without_any_response_token_takes_part(tiny_models, tmp_path):
    """One sample a rank and micro-step, of every three samples one can be used: the others leave their rank none."""
    data = tiny.write_data(tmp_path / "data", 18, shards=2, good=3)
    found = []
    for ranks, micro, zero in ((1, 4, "zero0"), (2, 1, "zero3_cpu")):  # one micro-step an update, and two
        training = {"steps": 6, "batch_size": 4, "micro_batch_size": micro}
        sections = dict.fromkeys(("verbalize", "interact", "reinforce"), training)
        recipe = tiny_recipe(tmp_path / zero, tiny_models, KIND, data, zero, **sections)
        lenient = ["--recipe", recipe, "--set", "data.max_bad_share=1", "interact.matching=uniform"]
        deepspeed(ranks, "train.py", "--stage", 1, *lenient)
        deepspeed(ranks, "train.py", "--stage", 2, *lenient)
        run = tmp_path / zero / "run"
        assert len((run / "rejects.jsonl").read_text().splitlines()) >= 3 * 6
        found.append({step: losses(run, step) for step in sections})
    for step, name in (("verbalize", "student/2"), ("interact", "layer/2"), ("reinforce", "cross_entropy")):
        one, two = (run[step] for run in found)
        assert [x["tokens"] for x in one] == [x["tokens"] for x in two]
        assert [x.get("skipped", False) for x in one] == [not x["tokens"] for x in one], "no token, no step"
        one, two = ([x[name] for x in lines if x["tokens"]] for lines in (one, two))
        assert len(one) > 3 and two == pytest.approx(one, rel=5e-4)
