"""How well data keeps up with the teacher's pass: what metrics, notice and `status` say of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Generic, TypeVar

from pipeline.runtime.counts import count_batch
from pipeline.runtime.data.batches import LoadedBatch
from pipeline.runtime.data.data_wait import DataWaitNotice
from pipeline.runtime.loop import Job

Item = TypeVar("Item")


class Waited(Generic[Item]):
    """An iterator that counts the seconds for which its items were waited for."""

    def __init__(self, items: Iterator[Item]):
        self._items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        begun = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.seconds += time.monotonic() - begun


class KeepingUp:
    """Data wait and real share of all batches so far, over all ranks."""

    def __init__(self, job: Job, name: str, loaded: Waited, workers: int):
        """loaded: this rank's windows. workers: loader processes of a rank."""
        self.job, self.workers = job, workers
        self._loaded, self._counted_s = loaded, 0.0
        self._notice = DataWaitNotice(name, "batches", epochs=False)
        self._begun = self._last = time.monotonic()
        self._waited, self._real, self._computed = 0.0, 0, 0

    def batch(self, one: LoadedBatch) -> None:
        """Count a batch that is about to be computed, and say when data is what is waited for. All ranks must call."""
        own, self._counted_s = self._loaded.seconds - self._counted_s, self._loaded.seconds
        counts = count_batch(one, own, self.job.ranks)
        self._waited, self._real = self._waited + counts.waited, self._real + counts.real
        self._computed += counts.computed
        took, self._last = time.monotonic() - self._last, time.monotonic()
        if (notice := self._notice.after_update(counts.waited, took, self.workers)) is not None:
            self.job.say(notice)

    def values(self) -> dict[str, float]:
        """For metrics.jsonl: shares of the time and of the computed tokens since the beginning."""
        wait = self._waited / max(1e-9, time.monotonic() - self._begun)
        real = self._real / max(1, self._computed)
        return {"data_wait": round(wait, 4), "real_share": round(real, 4), "loader_workers": self.workers}
