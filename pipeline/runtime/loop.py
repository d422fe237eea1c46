"""The training loop that the trained steps share: exact global averages, metrics, checkpoints, clean stops."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.recipe.schema import Recipe, Training
from pipeline.runtime.checkpoint.checkpoints import Checkpoints
from pipeline.runtime.checkpoint.same_data import data_state, refuse_other_data
from pipeline.runtime.counts import UpdateCounts, count_update
from pipeline.runtime.data.bad_samples import BadSamples
from pipeline.runtime.data.batches import ChatDataset, LoadedBatch, derived_seed
from pipeline.runtime.data.data_wait import DataWaitNotice
from pipeline.runtime.data.feed import Feed, open_feed
from pipeline.runtime.display.progress import say
from pipeline.runtime.display.training_progress import TrainingProgress, UpdateView
from pipeline.runtime.engine import Engine
from pipeline.runtime.faults import watch
from pipeline.runtime.faults.non_finite import SkippedUpdates
from pipeline.runtime.faults.stop import Requeue
from pipeline.runtime.first_updates import FirstUpdatesCheck
from pipeline.runtime.folder import append_lines, done
from pipeline.runtime.held_out import HeldOut
from pipeline.runtime.memory import peak_memory
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.ranks import Ranks, gather_lists, of_first_rank, sum_over_ranks
from pipeline.runtime.schedule import check_warmup, learning_rate


@dataclass(frozen=True)
class Job:
    """One invocation: the recipe, this process's rank, and how far to go."""

    recipe: Recipe
    ranks: Ranks
    stop_after: int | None = None
    """Checkpoint and stop cleanly after this many updates of this invocation, over its steps."""
    made: Counter[str] = field(default_factory=Counter)
    """Updates of this invocation, by step."""

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        say(text, self.ranks.first)

    def has_done(self, step: str) -> bool:
        """Whether a step is complete, as rank 0 sees it, so that all ranks decide alike. All ranks must call."""
        return of_first_rank(done(self.recipe.run / step) is not None)

    def is_over(self) -> bool:
        """Whether this invocation has made the updates after which it is to stop."""
        return self.stop_after is not None and self.made.total() >= self.stop_after


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
    """Logged as they are, of one micro-step of an update; the same on all ranks."""


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
    held_out: HeldOut | None = None,
    sources: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Run a step's updates from its newest checkpoint to `total`; returns the last update's averages.

    may_be_unused, image_parts: see FirstUpdatesCheck. held_out: what is measured between updates. sources: see
    data_state. The last update is checkpointed too: what comes after it, such as an export, may fail.

    Raises Stopped at --stop-after, Requeue when a rank is asked to stop, DataError when too many samples are bad,
    RecipeError where a step that begins would end in its warm-up.
    """
    engine.train()
    loop = _Loop(job, name, training, total, engine, forward, held_out)
    try:
        if loop.resumed_from is None:
            check_warmup(name, training, total)
        check = FirstUpdatesCheck(engine, may_be_unused, image_parts)
        feed = loop.resume_and_load(dataset, sources)
        for update in range(loop.first, total):
            images = loop.run_update(update, feed)
            if images is not None:
                check.after_update(images)
            loop.checkpoint(update + 1, feed)
    finally:
        loop.close()
    if loop.first < total and (unused := check.never_used()):
        job.say(
            f"{name}: no batch had an image, so {len(unused)} trained tensors, first {unused[0]}, are as they were; "
            "`train` without projector leaves it out"
        )
    return loop.averages


class _Loop:
    """The state of a running step."""

    def __init__(
        self,
        job: Job,
        name: str,
        training: Training,
        total: int,
        engine: Engine,
        forward: Callable,
        held_out: HeldOut | None,
    ):
        self.job, self.name, self.training, self.total = job, name, training, total
        self.engine, self.forward, self.held_out = engine, forward, held_out
        self.measured: dict[str, float] = {}
        self.checkpoints = Checkpoints(job.recipe.run / name, training.keep_checkpoints, job.ranks)
        self.resumed_from = self.checkpoints.newest()
        self.first = self.saved = self.resumed_from.update if self.resumed_from else 0
        self.saved_at, self.waited_for_checkpoint = time.monotonic(), 0.0
        self.bad = BadSamples(job.recipe.data.max_bad_share)
        self.skips = SkippedUpdates(job.recipe.run, name, training.max_skipped_in_a_row, job.ranks)
        self.averages: dict[str, float] = {}
        self.data: dict[str, Any] = {}
        self.metrics = Metrics(job.recipe.run, name, self.first, job.recipe.log_to) if job.ranks.first else None
        self.progress = TrainingProgress(name, total, self.first, shown=job.ranks.first)
        self.notice = DataWaitNotice(name)

    def resume_and_load(self, dataset: ChatDataset, sources: Mapping[str, str] | None = None) -> Feed:
        state: Mapping[str, Any] = {}
        self.data = data_state(dataset.folder, self.total, sources)
        if self.resumed_from is not None:
            self._refuse_other_data(dataset, self.resumed_from.state)
        trained = self.engine.trained_state()
        if self.first < self.total:  # now, not after hours
            self.checkpoints.check_room(trained)
        if self.resumed_from is not None:
            state = self.checkpoints.load(self.resumed_from, trained)
            self.bad.read, self.bad.rejected, self.averages = state["read"], state["rejected"], state["averages"]
            self.skips.resume(state.get("skipped", self.skips.state()))
            self.job.say(f"{self.name}: resumed after update {self.first} of {self.total}")
        updates = (self.first, self.total)
        return open_feed(self.job.recipe, self.job.ranks, self.name, self.training, dataset, updates, state)

    def _refuse_other_data(self, dataset: ChatDataset, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError as refuse_other_data; older checkpoints do not say what data they are of."""
        saved = state.get("data", self.data)
        if saved["updates"] == self.first == self.total:
            return  # all updates are made: what is left is the step's result
        field = f"{self.name}.train" if self.name in self.job.recipe.own_folders() else "data.train"
        refuse_other_data(self.name, field, dataset.folder, saved, self.data, self.checkpoints.folder)

    def run_update(self, update: int, feed: Feed) -> int | None:
        """One update; returns how many images its global batch had, None where it was skipped.

        It is where losses or gradients are not finite (SkippedUpdates), and where no token carries loss: AdamW would
        move the weights all the same, by momentum and decay.
        """
        begun = time.monotonic()
        at = f"{self.name}: update {update + 1} of {self.total}"
        watch.doing(f"{at}, loading its micro-batches")
        micros = feed.next_update()
        watch.doing(f"{at}, counting with all ranks")
        counts = count_update(micros, self.job.ranks, self.engine.device)
        if any(counts.asked):
            self._save(update, feed)
            self.checkpoints.finish()
            raise Requeue(f"{self.name}: stopped after update {update} of {self.total}", counts.asked)
        self._count_bad(counts, micros)
        waited = time.monotonic() - begun  # for the data of all ranks: they have just met
        rate = learning_rate(self.training, update, self.total)
        sums, losses, values = self._micro_steps(at, update, micros, counts.tokens)
        watch.doing(f"{at}, optimizer step")
        averages, finite = _averages(sums, losses, counts.tokens)
        moved = self.engine.step(rate, discard=not finite or not counts.tokens)
        own: dict[str, Any] = {"learning_rate": rate, "tokens": counts.tokens, "micro_steps": len(micros)}
        own |= {"real_share": round(counts.real_share, 4), "loader_workers": feed.workers}
        own |= {"checkpoint_s": round(self.waited_for_checkpoint, 4)}
        if moved:
            self.averages = averages
            self.skips.moved()
            own |= {**averages, **values, "gradient_norm": self.engine.gradient_norm()}
        else:
            nothing = f"{self.name}: update {update + 1} was skipped, for none of its samples has a response token"
            self.job.say(self.skips.skipped(update + 1, micros, losses) if counts.tokens else nothing)
            own["skipped"] = True  # and no losses, for they are not finite, or of nothing
        took = time.monotonic() - begun
        self._report(update + 1, {**own, **self._measure(update + 1, feed.workers)}, took, waited)
        return counts.images if moved else None

    def _micro_steps(
        self, at: str, update: int, micros: list[LoadedBatch], tokens: int
    ) -> tuple[dict[str, Tensor], list[Tensor], Mapping[str, Any]]:
        """Forward and backward of each micro-batch: (sums over them, their losses, the values of one of them).

        That one is drawn by the update: the last has the shortest samples (data/cutting.py), always.
        """
        # Anything that draws at random (dropout) draws the same after a resume.
        torch.manual_seed(derived_seed(self.job.recipe.seed, self.name, "forward", update, self.job.ranks.rank))
        sums: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        values: Mapping[str, Any] = {}
        logged = derived_seed(self.job.recipe.seed, self.name, "logged", update) % len(micros)
        for micro, one in enumerate(micros):
            watch.doing(f"{at}, micro-step {micro + 1} of {len(micros)}: {one.sizes()}")
            step_output = self.forward(one, MicroStep(update, micro))
            self.engine.backward(step_output.loss, tokens, last=micro == len(micros) - 1)
            sums = {key: sums.get(key, 0) + value.detach().double() for key, value in step_output.sums.items()}
            losses.append(step_output.loss.detach().double())
            values = step_output.values if micro == logged else values
        return sums, losses, values

    def _measure(self, update: int, workers: int) -> dict[str, float]:
        """Measure on held-out data where that is due. Its time is none of the update's."""
        if self.held_out is None or not self.held_out.is_due(update, self.total):
            return {}
        begun = time.monotonic()
        self.measured = self.held_out.measure(self.engine, self.job.ranks, workers)
        return {**self.measured, "held_out_s": round(time.monotonic() - begun, 4)}

    def checkpoint(self, updates: int, feed: Feed) -> None:
        """Checkpoint where the recipe asks for one; raise Stopped where the command does."""
        begun = time.monotonic()
        self.job.made[self.name] += 1
        stopping = self.job.is_over() and updates < self.total
        self.checkpoints.publish()
        if stopping or self._is_due(updates):
            self._save(updates, feed)
        if stopping or updates == self.total:
            self.checkpoints.finish()
        self.waited_for_checkpoint = time.monotonic() - begun
        if stopping:
            raise Stopped(
                f"{self.name}: stopped after update {updates} of {self.total}; the same command goes on from here"
            )

    def _is_due(self, updates: int) -> bool:
        """Whether the recipe asks for a checkpoint here; by time, rank 0's clock decides for all."""
        if updates == self.total or updates % self.training.checkpoint_every == 0:
            return True
        if (minutes := self.training.checkpoint_minutes) is None:
            return False
        late = self.job.ranks.first and time.monotonic() - self.saved_at >= 60 * minutes
        return bool(sum_over_ranks(torch.tensor(float(late), device=self.engine.device)))

    def _save(self, updates: int, feed: Feed) -> None:
        """Begin a checkpoint, unless the newest one stands at this update already."""
        if updates > self.saved:
            state = {"read": self.bad.read, "rejected": self.bad.rejected, "averages": self.averages}
            state |= {"skipped": self.skips.state(), "data": self.data}
            watch.doing(f"{self.name}: writing the checkpoint of update {updates}", long=True)
            self.checkpoints.save(self.engine.trained_state(), updates, {**state, **feed.state()})
            self.saved, self.saved_at = updates, time.monotonic()

    def close(self) -> None:
        watch.doing(f"{self.name}: after its updates", long=True)
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()

    def _count_bad(self, counts: UpdateCounts, micros: list[LoadedBatch]) -> None:
        """Every rank counts all ranks' bad samples: all stop alike."""
        newest = gather_lists([r for m in micros for r in m.rejected]) if counts.rejected else []
        if newest and self.job.ranks.first:
            record_rejected(self.job.recipe.run, newest)
        self.bad.count(self.training.batch_size, newest)

    def _report(self, update: int, values: Mapping[str, Any], took: float, waited: float) -> None:
        speed, wait, memory = values["tokens"] / took, waited / took, peak_memory(self.engine.device)
        if self.metrics is not None:
            rates = {"tokens_per_s": round(speed, 1), "update_s": round(took, 4), "data_wait": round(wait, 4)}
            self.metrics.write(update, {**values, **rates, "memory": memory})
        match = values.get("match", ())
        self.progress.advance(UpdateView(self.averages, speed, wait, memory, match, self.skips.total, self.measured))
        if (notice := self.notice.after_update(waited, took, values["loader_workers"])) is not None:
            self.job.say(notice)


def _averages(sums: Mapping[str, Tensor], losses: Sequence[Tensor], tokens: int) -> tuple[dict[str, float], bool]:
    """(averages over the response tokens of the global batch, whether all ranks' losses are finite): one sum."""
    every = sum_over_ranks(torch.stack([*sums.values(), torch.stack(list(losses)).sum()]))
    *total, loss = (every / max(1, tokens)).tolist()
    return dict(zip(sums, total, strict=True)), math.isfinite(loss)


def record_rejected(run: Path, rejected: list[Any]) -> None:
    """Append to RUN/rejects.jsonl: key, shard, reason."""
    lines = (json.dumps({"key": one.key, "shard": one.shard, "reason": one.reason}) + "\n" for one in rejected)
    append_lines(run / "rejects.jsonl", "".join(lines))
