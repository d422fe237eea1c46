"""evaluate --run and trace load a run's models with its recipe's attention."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers as tf

from pipeline.__main__ import main
from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.results.trace.terminal import load_traced_model, traced_models


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


def test_what_cannot_be_had_is_refused(run, asked, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = load_recipe(run / "recipe.yaml", ["attention=flash_attention_2"]).recipe
    with pytest.raises(RecipeError, match="flash_attention_2 needs a GPU"):
        load_traced_model(traced_models(run, recipe)[0][0], run, recipe)
    assert not asked
