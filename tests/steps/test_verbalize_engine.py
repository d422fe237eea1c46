"""What step verbalize asks of its engine."""

from __future__ import annotations

import pytest
from running import tiny_recipe
from tiny import write_data

from pipeline.recipe.resolve import load_recipe
from pipeline.runtime.loop import Job
from pipeline.runtime.ranks import Ranks
from pipeline.steps import verbalize


class _Asked(Exception):
    """Ends the step where it makes its engine."""


def test_each_verb_ffn_of_both_models_is_clipped_by_its_own_norm(tiny_models, tmp_path, monkeypatch):
    """One norm for all would couple what has nothing to do with one another (tests/distributed/test_clip_apart.py)."""

    def engine(module, recipe, training, ranks, clipped_apart=()):
        raise _Asked(module, list(clipped_apart))

    monkeypatch.setattr(verbalize, "Engine", engine)
    recipe = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", write_data(tmp_path / "data", 8), zero="zero0")
    with pytest.raises(_Asked) as asked:
        verbalize.run(Job(load_recipe(recipe).recipe, Ranks()))
    module, parts = asked.value.args
    assert len(parts) == 4 + 2, "the teacher's and the student's target layers"
    of_parts = [id(weight) for part in parts for weight in part.parameters()]
    assert sorted(of_parts) == sorted(id(weight) for weight in module.parameters() if weight.requires_grad)
    assert [len({id(one) for one in part.parameters()}) for part in parts] == [4] * 6, "gate, up, down and norm"
