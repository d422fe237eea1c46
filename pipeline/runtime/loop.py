"""The training loop that the trained steps share: exact global averages, metrics, checkpoints, clean stops."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.recipe.schema import Recipe, Training
from pipeline.runtime.checkpoint import Checkpoints
from pipeline.runtime.counts import UpdateCounts, count_update
from pipeline.runtime.data.batches import BadSamples, ChatDataset, LoadedBatch, derived_seed
from pipeline.runtime.data.data_wait import DataWaitNotice
from pipeline.runtime.data.feed import Feed, open_feed
from pipeline.runtime.engine import Engine
from pipeline.runtime.first_updates import FirstUpdatesCheck
from pipeline.runtime.folder import done
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.progress import StepProgress, say
from pipeline.runtime.ranks import Ranks, gather_lists, sum_over_ranks
from pipeline.runtime.schedule import learning_rate


@dataclass(frozen=True)
class Job:
    """One invocation: the recipe, this process's rank, and how far to go."""

    recipe: Recipe
    ranks: Ranks
    stop_after: int | None = None
    """Checkpoint and stop cleanly after this many updates of this invocation."""

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        say(text, self.ranks.first)

    def has_done(self, step: str) -> bool:
        """Whether a step is complete, as rank 0 sees it, so that all ranks decide alike. All ranks must call."""
        return bool(gather_lists([done(self.recipe.run / step) is not None])[0])


@dataclass(frozen=True)
class MicroStep:
    """The position of a forward in its step. Random draws are seeded with it, so that a resumed run draws the same."""

    update: int
    micro: int


@dataclass(frozen=True)
class StepOutput:
    """The result of one forward."""

    loss: Tensor
    """Scalar with gradient: the loss summed over this rank's response tokens."""
    sums: Mapping[str, Tensor]
    """Scalars, each summed over this rank's response tokens; logged as averages over the global batch."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Logged as they are; the same on all ranks."""


class Stopped(Exception):
    """--stop-after was reached; the step goes on from its checkpoint when the command is run again."""


def train(
    job: Job,
    name: str,
    training: Training,
    total: int,
    engine: Engine,
    dataset: ChatDataset,
    forward: Callable[[LoadedBatch, MicroStep], StepOutput],
    may_be_unused: tuple[str, ...] = (),
    image_parts: tuple[str, ...] = (),
) -> dict[str, float]:
    """Run a step's updates from its newest checkpoint to `total`; returns the last update's averages.

    may_be_unused, image_parts: see FirstUpdatesCheck. The last update is checkpointed too: what comes after it, such
    as an export, may fail.

    Raises Stopped at --stop-after, DataError when too many samples are bad.
    """
    engine.train()
    loop = _Loop(job, name, training, total, engine, forward)
    check = FirstUpdatesCheck(engine, may_be_unused, image_parts)
    feed = loop.resume_and_load(dataset)
    try:
        for update in range(loop.first, total):
            images = loop.run_update(update, feed)
            check.after_update(images)
            loop.checkpoint(update + 1, feed)
    finally:
        loop.close()
    if loop.first < total and (unused := check.never_used()):
        job.say(
            f"{name}: no batch had an image, so {len(unused)} trained tensors, first {unused[0]}, are as they were; "
            "train_projector: false leaves the projector out"
        )
    return loop.averages


class _Loop:
    """The state of a running step."""

    def __init__(self, job: Job, name: str, training: Training, total: int, engine: Engine, forward: Callable):
        self.job, self.name, self.training, self.total = job, name, training, total
        self.engine, self.forward = engine, forward
        self.checkpoints = Checkpoints(job.recipe.run / name, training.keep_checkpoints)
        self.first = self.checkpoints.newest() or 0
        self.bad = BadSamples(job.recipe.data.max_bad_share)
        self.averages: dict[str, float] = {}
        self.metrics = Metrics(job.recipe.run, name, self.first) if job.ranks.first else None
        self.progress = StepProgress(name, total, self.first, shown=job.ranks.first)
        self.notice = DataWaitNotice(name)

    def resume_and_load(self, dataset: ChatDataset) -> Feed:
        state: Mapping[str, Any] = {}
        if self.first:
            state = self.checkpoints.load(self.engine, self.first)
            self.bad.read, self.bad.rejected, self.averages = state["read"], state["rejected"], state["averages"]
            self.job.say(f"{self.name}: resumed after update {self.first} of {self.total}")
        updates = (self.first, self.total)
        return open_feed(self.job.recipe, self.job.ranks, self.name, self.training, dataset, updates, state)

    def run_update(self, update: int, feed: Feed) -> int:
        """One update; returns how many images its global batch had."""
        begun = time.monotonic()
        micros = feed.next_update()
        counts = self._count(micros)
        waited = time.monotonic() - begun  # for the data of all ranks: they have just met
        # Anything that draws at random (dropout) draws the same after a resume.
        torch.manual_seed(derived_seed(self.job.recipe.seed, self.name, "forward", update, self.job.ranks.rank))
        rate = learning_rate(self.training, update, self.total)
        sums: dict[str, Tensor] = {}
        values: Mapping[str, Any] = {}
        for micro, one in enumerate(micros):
            step_output = self.forward(one, MicroStep(update, micro))
            self.engine.backward(step_output.loss, counts.tokens, last=micro == len(micros) - 1)
            sums = {key: sums.get(key, 0) + value.detach().double() for key, value in step_output.sums.items()}
            values = step_output.values
        self.engine.step(rate)
        self.averages = _averages(sums, counts.tokens)
        own = {"learning_rate": rate, "tokens": counts.tokens, "micro_steps": len(micros)}
        own |= {"real_share": round(counts.real_share, 4), "loader_workers": feed.workers}
        self._report(update + 1, {**own, **values}, time.monotonic() - begun, waited)
        return counts.images

    def checkpoint(self, updates: int, feed: Feed) -> None:
        """Checkpoint where the recipe asks for one; raise Stopped where the command does."""
        stop_after = self.job.stop_after
        stopping = stop_after is not None and updates - self.first >= stop_after and updates < self.total
        if stopping or updates % self.training.checkpoint_every == 0 or updates == self.total:
            state = {"read": self.bad.read, "rejected": self.bad.rejected, "averages": self.averages}
            self.checkpoints.save(self.engine, updates, {**state, **feed.state()})
        if stopping:
            raise Stopped(
                f"{self.name}: stopped after update {updates} of {self.total}; the same command goes on from here"
            )

    def close(self) -> None:
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()

    def _count(self, micros: list[LoadedBatch]) -> UpdateCounts:
        """Count the global batch. Every rank counts all ranks' bad samples: all stop alike."""
        counts = count_update(micros, self.job.ranks, self.engine.device)
        newest = gather_lists([r for m in micros for r in m.rejected]) if counts.rejected else []
        if newest and self.job.ranks.first:
            record_rejected(self.job.recipe.run, newest)
        self.bad.count(self.training.batch_size, newest)
        return counts

    def _report(self, update: int, values: Mapping[str, Any], took: float, waited: float) -> None:
        speed = values["tokens"] / took
        if self.metrics is not None:
            rates = {"tokens_per_s": round(speed, 1), "update_s": round(took, 4), "data_wait": round(waited / took, 4)}
            self.metrics.write(
                update, {**self.averages, **values, "gradient_norm": self.engine.gradient_norm(), **rates}
            )
        shown = "  ".join(f"{name} {value:.3f}" for name, value in self.averages.items())
        self.progress.advance(f"{shown}  {speed:,.0f} tokens/s  {values['real_share']:.0%} real")
        if (notice := self.notice.after_update(waited, took, values["loader_workers"])) is not None:
            self.job.say(notice)


def _averages(sums: Mapping[str, Tensor], tokens: int) -> dict[str, float]:
    """Averages over the response tokens of the global batch: one sum over ranks, one division."""
    if not sums:
        return {}
    total = sum_over_ranks(torch.stack(list(sums.values())))
    return dict(zip(sums, (total / max(1, tokens)).tolist(), strict=True))


def record_rejected(run: Path, rejected: list[Any]) -> None:
    """Append to RUN/rejects.jsonl: key, shard, reason."""
    with (run / "rejects.jsonl").open("a", encoding="utf-8") as lines:
        for one in rejected:
            lines.write(json.dumps({"key": one.key, "shard": one.shard, "reason": one.reason}) + "\n")
