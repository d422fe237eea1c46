"""A step that is resumed reads the data that it began with, or says why it does not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_engine import small_recipe
from tiny import write_data
from torch import nn

from data_prep.shards import ShardFolder
from pipeline.errors import CheckpointError
from pipeline.recipe.schema import Recipe
from pipeline.runtime.checkpoint.files import read_index, write_index
from pipeline.runtime.checkpoint.trained_state import TrainedState
from pipeline.runtime.data.batches import ChatDataset
from pipeline.runtime.loop import Job, _Loop
from pipeline.runtime.ranks import Ranks

UPDATES, STOPPED, SAMPLES, A_SHARD = 4, 2, 8, 4


class PlainEngine:
    """What the loop asks of an Engine for its checkpoints, without DeepSpeed."""

    def __init__(self) -> None:
        self.module = nn.Linear(4, 4)
        self.adamw = torch.optim.AdamW(self.module.parameters())

    def trained_state(self) -> TrainedState:
        return TrainedState(self.module, self.adamw, 0, Ranks())


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    data = small_recipe("zero0", batch_size=1).data.model_copy(update={"train": tmp_path / "data", "workers": 0})
    write(tmp_path / "data", SAMPLES)
    return small_recipe("zero0", batch_size=1).model_copy(update={"run": tmp_path / "run", "data": data, "log_to": ()})


def write(folder: Path, samples: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    write_data(folder, samples, shards=samples // A_SHARD)


def resumed(recipe: Recipe, total: int = UPDATES, step: str = "reinforce", **sources: str) -> Iterator[_Loop]:
    """A step that stands at its newest checkpoint, then at one of update STOPPED."""
    folder = recipe.samples_of(step)
    loop = _Loop(Job(recipe, Ranks()), step, recipe.reinforce, total, PlainEngine(), None, None)  # type: ignore[arg-type]
    try:
        feed = loop.resume_and_load(ChatDataset(ShardFolder(folder), {}), sources)
        yield loop
        loop._save(STOPPED, feed)
        loop.checkpoints.finish()
    finally:
        loop.close()


def stop(recipe: Recipe, **options) -> None:
    (loop,) = resumed(recipe, **options)
    assert loop.saved == STOPPED


def first_update(recipe: Recipe, **options) -> int:
    return next(resumed(recipe, **options)).first


def test_the_same_shards_elsewhere_are_the_same_data(recipe, tmp_path):
    stop(recipe)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = recipe.data.model_copy(update={"train": tmp_path / "moved"})
    assert first_update(recipe.model_copy(update={"data": moved})) == STOPPED


def test_shards_appended_meanwhile_are_refused_with_both_values_and_what_to_do(recipe, tmp_path):
    stop(recipe)
    write(tmp_path / "data", SAMPLES + A_SHARD)
    with pytest.raises(CheckpointError) as error:
        first_update(recipe)
    message = str(error.value)
    assert message.startswith(f"reinforce: {tmp_path}/data (data.train) has changed since the step's checkpoint")
    assert "expected 8 samples (fingerprint " in message and "found 12 samples (fingerprint " in message
    assert f"remove {tmp_path}/run/reinforce/checkpoints to begin reinforce anew" in message
    shutil.rmtree(tmp_path / "run" / "reinforce" / "checkpoints")
    assert first_update(recipe) == 0


def test_another_step_may_begin_with_more(recipe, tmp_path):
    stop(recipe, step="interact")
    write(tmp_path / "data", SAMPLES + A_SHARD)
    assert first_update(recipe) == 0


@pytest.mark.parametrize("step", ["verbalize", "reinforce"])
def test_as_many_samples_with_other_content_are_other_data(recipe, tmp_path, step):
    """Also those of a step that has its own."""
    own = getattr(recipe, step).model_copy(update={"train": tmp_path / "answered"})
    recipe = recipe.model_copy(update={step: own})
    write(tmp_path / "answered", SAMPLES)
    stop(recipe, step=step)
    shutil.rmtree(tmp_path / "answered")
    write_data(tmp_path / "answered", SAMPLES, seed=1)
    with pytest.raises(CheckpointError, match=rf"answered \({step}.train\) has changed .* 8 samples .* 8 samples"):
        first_update(recipe, step=step)


def test_another_number_of_updates_is_refused(recipe):
    """Where it is below the checkpoint's update, the step would be done without a word."""
    stop(recipe)
    for total in (STOPPED - 1, STOPPED, UPDATES + 1):
        with pytest.raises(CheckpointError, match=rf"of 4 updates in all, the recipe now asks for {total}, .*\.epochs"):
            first_update(recipe, total=total)


def test_a_step_whose_updates_are_all_made_may_end(recipe, tmp_path):
    stop(recipe, total=STOPPED)
    write(tmp_path / "data", SAMPLES + A_SHARD)
    assert first_update(recipe, total=STOPPED) == STOPPED


def test_another_cache_is_refused_and_one_of_which_the_checkpoint_says_nothing_is_not(recipe, tmp_path):
    stop(recipe, step="interact", cache="ab", verbalizers="cd")
    assert first_update(recipe, step="interact", cache="ab", verbalizers="cd", more="ef") == STOPPED
    with pytest.raises(CheckpointError) as error:
        first_update(recipe, step="interact", cache="ab", verbalizers="ef")
    message = str(error.value)
    expected = "made with another verbalizers: expected SHA-256 cd, found ef. A step ends with what it began with"
    assert message.startswith(f"interact: the step's checkpoint was {expected}")
    assert "Put stage_1 and cache_from of the recipe back, or remove " in message
    (checkpoint,) = (tmp_path / "run" / "interact" / "checkpoints").iterdir()
    index = read_index(checkpoint)
    index.state["data"].pop("sources")
    write_index(checkpoint, index)
    assert first_update(recipe, step="interact", cache="no", verbalizers="no") == STOPPED


def test_a_checkpoint_of_before_that_says_nothing_of_its_data_is_resumed(recipe, tmp_path):
    stop(recipe)
    (checkpoint,) = (tmp_path / "run" / "reinforce" / "checkpoints").iterdir()
    index = read_index(checkpoint)
    write_index(checkpoint, replace(index, state={key: index.state[key] for key in index.state if key != "data"}))
    write(tmp_path / "data", SAMPLES + A_SHARD)
    assert first_update(recipe) == STOPPED
