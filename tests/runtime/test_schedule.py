"""The learning rate's schedule against the number of updates that epochs come to."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from small_engine import small_recipe

from pipeline.errors import RecipeError
from pipeline.recipe.schema import Training
from pipeline.runtime.loop import Job, train
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.schedule import check_warmup


def test_a_warm_up_as_long_as_the_step_is_refused_before_anything_is_computed(tmp_path):
    """With `steps` the recipe's check refuses it; with `epochs` the learning rate never reached the one asked for."""
    job = Job(small_recipe("zero0").model_copy(update={"run": tmp_path}), Ranks())
    training = Training(epochs=2, batch_size=32, warmup_steps=62)
    engine = SimpleNamespace(train=lambda: None)
    expected = "reinforce.warmup_steps: expected fewer than the step's 62 updates (reinforce.epochs: 2.0), found 62"
    with pytest.raises(RecipeError, match=re.escape(expected)):
        train(job, "reinforce", training, 62, engine, [], lambda *_: None)
    check_warmup("reinforce", training, 63)
    check_warmup("verbalize", Training(steps=0, batch_size=32), 0)
