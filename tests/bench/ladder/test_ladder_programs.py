"""The arms that have a program of their own, as the ladder runs them: one stage 1 for both, then their evaluation."""

import json

import pytest
import torch
from running import ROOT
from safetensors.torch import load_file

from bench.ladder.arms import BY_NAME
from bench.ladder.cells import Cell
from bench.ladder.jobs import run_jobs
from bench.ladder.plan import SeedFolder, Tried

ARMS = ("features_l2", "distil_lens")
CELL = Cell("small", "", "puzzles", 0.4, samples=64, updates=4, held_out=8)


@pytest.fixture(scope="module")
def seed_folder(tmp_path_factory):
    found = SeedFolder(tmp_path_factory.mktemp("ladder") / "small", CELL, 0, other_task=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run_jobs(found.jobs([Tried(BY_NAME[arm], 3e-3) for arm in ARMS]), workers=2, title="test")
    return found


def test_both_share_one_stage_1(seed_folder):
    assert [path.name for path in seed_folder.folder.glob("stage-1*.done")] == ["stage-1-features_l2.done"]


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_its_verbalizers_change_nothing(seed_folder, role):
    weights = load_file(seed_folder.folder / "stage-1-features_l2" / "verbalize" / f"{role}.safetensors")
    down = [value for name, value in weights.items() if name.endswith("down.weight")]
    assert down and not any(value.any() for value in down)


@pytest.mark.parametrize("arm", ARMS)
def test_the_student_is_trained_and_exported_without_what_the_arm_added(seed_folder, arm):
    run = seed_folder.folder / f"{arm}-0.003"
    before = load_file(ROOT / "demo" / "models" / "puzzles" / "student" / "model.safetensors")
    after = load_file(run / "student" / "model.safetensors")
    assert before.keys() == after.keys()
    decoder = [name for name in before if ".layers." in name]
    assert decoder and not any(torch.equal(before[name], after[name]) for name in decoder)
    assert "exact_match" in seed_folder.results()[run.name]  # it loads, and it answers
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["match"] for line in lines] == [[2, 4, 7]] * CELL.updates
    assert set(lines[0]) >= {"layer/1", "layer/2", "layer/3", "last"}
    assert all(line["last"] > 0 and 0 < line["layer/1"] < 100 for line in lines)


def test_the_lenses_are_bounded_by_their_share_of_log_2(seed_folder):
    path = seed_folder.folder / "distil_lens-0.003" / "metrics.jsonl"
    for line in map(json.loads, path.read_text().splitlines()):
        assert all(line[f"layer/{layer}"] < 0.6932 / 3 for layer in (1, 2, 3))
