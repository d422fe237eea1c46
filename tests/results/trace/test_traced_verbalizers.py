"""Which verb-FFNs the distilled student is traced with: those trained with it where there are any, else stage 1's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import write_verb_ffns

from pipeline.recipe.resolve import load_recipe
from pipeline.results.trace.models import load_traced_model, run_models
from pipeline.runtime.folder import trained_verb_ffns


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of the run; its recipe and shared parts stay where they are."""
    shutil.copytree(made.run, tmp_path / "run")
    return tmp_path / "run"


def traced(run: Path, *settings: str) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """({model: values of its verb-FFNs}, what is left out)."""
    recipe = load_recipe(run / "recipe.yaml", settings).recipe
    found = run_models(run, recipe)
    loaded = {one.name: load_traced_model(one, found.limits)[1] for one in found.models}
    return {name: side.verb_ffns.state_dict() for name, side in loaded.items()}, list(found.missing)


def same(found: dict[str, torch.Tensor], path: Path) -> bool:
    stored = load_file(path)
    return found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)


def write_trained(run: Path) -> Path:
    write_verb_ffns(trained_verb_ffns(run), "student", moved=True)  # other random values than stage 1's
    return trained_verb_ffns(run)


def test_a_run_that_trained_them_is_traced_with_the_trained_ones(run):
    trained, stage_1 = write_trained(run), run / "verbalize" / "student.safetensors"
    found, missing = traced(run, "interact.train_verbalizers=true")
    assert not missing and same(found["distilled"], trained) and same(found["untouched"], stage_1)
    assert not same(found["distilled"], stage_1), "the test's two files should differ"


@pytest.mark.parametrize("settings", [(), ("interact.train_verbalizers=true", "interact.steps=0")])
def test_a_run_that_did_not_is_traced_with_stage_1_s(run, settings):
    found, missing = traced(run, *settings)
    assert not missing and same(found["distilled"], run / "verbalize" / "student.safetensors")


def test_without_their_file_the_distilled_student_is_left_out_not_shown_with_others(run):
    found, missing = traced(run, "interact.train_verbalizers=true")
    assert set(found) == {"teacher", "untouched"}
    (line,) = missing
    assert "distilled is left out: no" in line and "interact/student_verbalizers.safetensors" in line
    assert "launch/train.py --stage 2" in line


def test_with_another_run_s_cache_the_teacher_is_traced_with_that_run_s_verbalizers(run, made):
    (run / "verbalize" / "teacher.safetensors").unlink()
    found, missing = traced(run, f"cache_from={made.run}")
    assert not missing and same(found["teacher"], made.run / "verbalize" / "teacher.safetensors")
    assert same(found["untouched"], run / "verbalize" / "student.safetensors")
