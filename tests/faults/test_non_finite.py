"""A loss or gradient that is not finite on one rank: no rank takes the step, and the samples are written down."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import deepspeed, tiny_recipe
from safetensors.torch import load_file
from small_engine import on_ranks, small_recipe
from tiny import write_data
from torch import nn

from data_prep.shards import ShardFolder
from pipeline.errors import DivergedError
from pipeline.runtime.data.batches import DataOrder, derived_seed
from pipeline.runtime.data.data_wait import STARTING
from pipeline.runtime.faults.non_finite import SkippedUpdates
from pipeline.runtime.folder import read_metrics
from pipeline.runtime.ranks import Ranks

CONFIGS = [
    ("zero0", "fp32", False),
    ("zero0", "fp32", True),
    ("zero1", "bf16", False),
    ("zero1", "bf16", True),
    ("zero2", "fp32", True),
    ("zero2", "bf16", False),
    ("zero3", "fp32", False),
    ("zero3", "bf16", True),
    ("zero3_offload", "fp32", False),
]
"""(DeepSpeed config, precision, whether parts are clipped apart)"""
BAD = 3
"""The update, of six from 1, whose global batch has the sample."""


def trained(ranks) -> dict[str, tuple]:
    """For each config: which updates moved, the weights after them, and those after the good ones alone."""
    return {config: (*_train(ranks, *config, "gibdng"), _train(ranks, *config, "gg")[1]) for config in CONFIGS}


def _train(ranks, zero: str, precision: str, apart: bool, kinds: str):
    """Updates g: good; i: rank 1's gradient is infinite; b: rank 1's loss is NaN; d, n: to be discarded, the one good,
    the other without a token."""
    from pipeline.runtime.engine import Engine

    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
    module.forward = lambda x: sum(one(x).pow(2).sum() for one in module)
    recipe = small_recipe(zero, precision, batch_size=2, micro_batch_size=1, clip=0.5)
    engine = Engine(module, recipe, recipe.verbalize, ranks, clipped_apart=list(module) if apart else ())
    engine.train()
    moved = []
    for kind in kinds:
        x = torch.full((2, 5), 0.3 + ranks.rank)
        if ranks.rank == 1 and kind in "ib":
            x = x * {"i": 1e30, "b": math.nan}[kind]
        engine.backward(engine(x.to(engine.dtype)).float() * (kind != "n"), 4)
        moved.append(engine.step(1e-2, discard=kind in "dn"))
    weights = engine.gathered(engine.module)
    engine.close()
    return moved, {name: weight.tolist() for name, weight in weights.items()}


def test_a_skipped_update_leaves_weights_and_optimizer_as_they_were(tmp_path):
    runs = on_ranks(2, tmp_path, trained)
    for name, (moved, weights, others) in runs[0].items():
        assert moved == [True, False, False, False, False, True], name
        assert weights == others, f"{name}: bitwise, so AdamW's moments have not moved either"
    assert runs[0].keys() == runs[1].keys() and all(runs[0][name][0] == runs[1][name][0] for name in runs[0])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch_of(*keys: str) -> SimpleNamespace:
    return SimpleNamespace(batches={"student": SimpleNamespace(keys=keys)})


def test_too_many_in_a_row_stop_the_step_with_the_keys_written_down(tmp_path):
    skips = SkippedUpdates(tmp_path, "interact", 2, Ranks())
    micros = [batch_of("a", "b"), batch_of("c")]
    said = skips.skipped(1, micros, [torch.tensor(1.0), torch.tensor(math.inf)])
    assert said.startswith("interact: update 1 was skipped, for its loss is not finite: one of c (all in ")
    skips.moved()
    said = skips.skipped(3, micros, [torch.tensor(1.0), torch.tensor(2.0)])
    assert "for its gradient is not finite: one of a, b, c (" in said
    resumed = SkippedUpdates(tmp_path, "interact", 2, Ranks())
    resumed.resume(skips.state())
    with pytest.raises(
        DivergedError, match="2 updates in a row were skipped, as many as interact.max_skipped_in_a_row"
    ):
        resumed.skipped(4, micros, [torch.tensor(math.nan), torch.tensor(2.0)])
    written = [(one["update"], one["micro_step"], one["loss"], one["keys"]) for one in lines(skips.path)]
    assert written == [
        (1, 2, "inf", ["c"]),
        (3, 1, "finite", ["a", "b"]),
        (3, 2, "finite", ["c"]),
        (4, 1, "nan", ["a", "b"]),
    ]


def test_a_sample_that_is_not_finite_on_one_rank_is_skipped_by_both(tiny_models, tmp_path, monkeypatch, survived):
    data = write_data(tmp_path / "data", 24)
    recipe = tiny_recipe(
        tmp_path, tiny_models, "qwen2_vl", data, interact={"steps": 0}, reinforce={"steps": 6, "batch_size": 4}
    )
    folder = ShardFolder(data)
    order = DataOrder(len(folder), derived_seed(0, "reinforce"))
    keys = {folder.keys[order[position].sample] for position in range(4 * (BAD - 1), 4 * BAD)}
    bad = next(one.key for one in map(folder.read, range(len(folder))) if one.key in keys and one.images)
    monkeypatch.setenv("NAN_KEY", bad)
    program = ["../tests/faults/nan_sample.py", "--stage", 2, "--only", "reinforce", "--recipe", recipe]
    said = deepspeed(2, *program)
    assert said.count(f"reinforce: update {BAD} was skipped, for its loss is not finite: one of ") == 1, said
    run = tmp_path / "run"
    (line,) = lines(run / "non_finite.jsonl")
    assert line["update"] == BAD and bad in line["keys"] and len(line["keys"]) == 2, "one rank's micro-batch alone"
    logged = {one["update"]: one for one in read_metrics(run, "reinforce")}
    assert [update for update, one in logged.items() if one.get("skipped")] == [BAD] and len(logged) == 6
    assert all("cross_entropy" in one for update, one in logged.items() if update != BAD)
    waited = sum(one["data_wait"] * one["update_s"] for one in list(logged.values())[STARTING:])
    share = waited / sum(one["update_s"] for one in list(logged.values())[STARTING:])
    notice = re.search(r"reinforce: (\d+)% of the time of the last 4 updates was spent on waiting for data", said)
    assert notice and abs(int(notice[1]) - 100 * share) < 1, "the share that metrics.jsonl has, said in the run"
    weights = load_file(run / "student" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    said = deepspeed(2, *program, "--set", f"run={tmp_path / 'strict'}", "reinforce.max_skipped_in_a_row=1", check=2)
    assert said.count("1 updates in a row were skipped, as many as reinforce.max_skipped_in_a_row allows") == 1, said
    survived(faults=1)
