"""What an update leaves in metrics.jsonl, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from small_engine import small_recipe
from torch import nn

from pipeline.recipe.schema import Recipe
from pipeline.runtime.data.batches import LoadedBatch
from pipeline.runtime.folder import read_metrics
from pipeline.runtime.loop import Job, MicroStep, StepOutput, _Loop
from pipeline.runtime.ranks import Ranks
from pipeline.vlm.processing import Batch

UPDATES = 200


class PlainEngine:
    """What the loop asks of an Engine for an update."""

    def __init__(self) -> None:
        self.module, self.device = nn.Linear(1, 1), torch.device("cpu")

        self.discarded: list[bool] = []

    def step(self, learning_rate: float, discard: bool = False) -> bool:
        self.discarded.append(discard)
        return not discard

    def gradient_norm(self) -> None:
        return None

    def backward(self, local_sum: torch.Tensor, global_count: int, last: bool = True) -> None:
        local_sum.backward()


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return small_recipe("zero0").model_copy(update={"run": tmp_path / "run", "log_to": ()})


@contextmanager
def loop_of(recipe: Recipe) -> Iterator[_Loop]:
    """A step whose micro-steps log their number as their match."""
    engine = PlainEngine()

    def forward(loaded: LoadedBatch, at: MicroStep) -> StepOutput:
        loss = engine.module.weight.sum() * loaded.tokens()
        return StepOutput(loss, {"last": loss}, {"match": [at.micro]})

    loop = _Loop(Job(recipe, Ranks()), "interact", recipe.interact, UPDATES, engine, forward, None)  # type: ignore[arg-type]
    try:
        yield loop
    finally:
        loop.close()


def loaded(tokens: int) -> LoadedBatch:
    labels = torch.zeros(tokens, dtype=torch.long)
    batch = Batch({"input_ids": torch.zeros(1, 8, dtype=torch.long)}, labels, labels, ("a",), (tokens,))
    return LoadedBatch({"student": batch}, [])


def logged(recipe: Recipe, micro_steps: int, rank: int = 0) -> list[int]:
    """The micro-step of each update whose match is logged."""
    micros = [loaded(tokens) for tokens in range(micro_steps, 0, -1)]
    with loop_of(recipe) as loop:
        loop.job = Job(recipe, Ranks(rank, rank + 1))
        found = [loop._micro_steps("", update, micros, 1)[2]["match"] for update in range(UPDATES)]
    return [micro for (micro,) in found]


def test_the_match_of_each_micro_step_is_logged_as_often_and_the_same_on_every_rank_and_again(recipe):
    found = logged(recipe, 4)
    assert found == logged(recipe, 4) == logged(recipe, 4, rank=1)
    assert all(abs(found.count(micro) - UPDATES / 4) < 4 * (UPDATES * 3 / 16) ** 0.5 for micro in range(4))
    assert found != logged(recipe.model_copy(update={"seed": 1}), 4)
    assert set(logged(recipe, 1)) == {0}


def test_an_update_without_a_response_token_takes_no_step_and_logs_no_loss(recipe, capsys):
    """All of its samples are rejected, or interact.token_share has left none of their tokens."""
    with loop_of(recipe) as loop:
        feed = SimpleNamespace(next_update=iter([[loaded(3)] * 2, [loaded(0)] * 2]).__next__, workers=0)
        assert [loop.run_update(update, feed) for update in range(2)] == [0, None]
        assert loop.engine.discarded == [False, True]
        assert loop.skips.state() == {"total": 0, "in_a_row": 0}, "it has not diverged"
    first, second = read_metrics(recipe.run)
    assert "last" in first and "skipped" not in first
    assert second["skipped"] and not {"last", "match"} & set(second)
    assert "interact: update 2 was skipped, for none of its samples has a response" in capsys.readouterr().out
