"""evaluate --run, answer --run and trace load a run's models with its recipe's attention."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
import yaml

from pipeline.__main__ import main
from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import ModelParts
from pipeline.results.answer.plan import make_plan
from pipeline.results.trace.models import load_traced_model, run_models


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of the run whose recipe asks for eager attention."""
    shutil.copytree(made.run, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(made.run), str(tmp_path / "run")) + "attention: eager\n")
    return tmp_path / "run"


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What from_pretrained is asked for, as it goes on to load."""
    found, load = [], tf.AutoModelForImageTextToText.from_pretrained

    def spy(*args, **kwargs):
        found.append(kwargs["attn_implementation"])
        return load(*args, **kwargs)

    monkeypatch.setattr(tf.AutoModelForImageTextToText, "from_pretrained", spy)
    return found


def test_evaluation_of_a_run(run, asked):
    assert main(["evaluate", "--run", str(run), "--limit", "1", "--max-new-tokens", "1"]) == 0
    assert asked == ["eager"] * 3


def test_trace_of_a_run(run, asked):
    assert main(["trace", "--run", str(run), "--sample", "s00001", "--max-new-tokens", "1"]) == 0
    assert asked == ["eager"] * 3


def test_answers_of_a_run(run, asked, tmp_path):
    command = ["answer", "--run", str(run), "--output", str(tmp_path / "out"), "--max-new-tokens", "1"]
    main([*command, "--max-bad-share", "1"])
    assert asked == ["eager"]


def test_parts_that_the_recipe_names_are_those_of_the_runs_teacher_alone(run, tmp_path):
    sizes: Any = {"batch_size": 1, "max_new_tokens": 1}
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["teacher"]["parts"] = {"head": "lm_head"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert make_plan(None, run, None, tmp_path / "out", **sizes).parts == ModelParts(head="lm_head")
    another = Path(recipe["student"]["path"])
    assert make_plan(another, run, None, tmp_path / "out", **sizes).parts is None


def test_what_cannot_be_had_is_refused(run, asked, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = load_recipe(run / "recipe.yaml", ["attention=flash_attention_2"]).recipe
    with pytest.raises(RecipeError, match="flash_attention_2 needs a GPU"):
        traced = run_models(run, recipe)
        load_traced_model(traced.models[0], traced.limits, traced.attention)
    assert not asked
