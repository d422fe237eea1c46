"""The cache job's batches, each of one shard, and the thread that packs and writes what the teacher said about them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from data_prep.shards import ShardFolder
from pipeline.cache.writer import CacheFolder, CacheWriter
from pipeline.codec.packing import to_numpy
from pipeline.errors import CacheError, SampleError
from pipeline.loss.fidelity import Fidelity
from pipeline.runtime.batches import Loaded, Place, Rejected
from pipeline.steps.cache.estimate import on_disk
from pipeline.steps.cache.teacher_pass import WINDOW, Heard

WRITES_WAITING = 2
"""Batches that may wait for the writing thread before the teacher waits for it."""


@dataclass(frozen=True)
class Window:
    """Neighbours in a shard, whose batches are formed together."""

    shard: str
    places: list[Place]
    last: bool
    """Whether the shard is complete with it."""


@dataclass(frozen=True)
class Part:
    """One batch of one shard."""

    shard: str
    loaded: Loaded
    last: bool
    """Whether the shard is complete with it."""


def plan(data: ShardFolder, shards: Sequence[str], rank: int, world: int) -> list[Window]:
    """This rank's windows: those of every world-th shard."""
    sizes = {shard.name: (shard.first, shard.samples) for shard in data.shards}
    windows = []
    for name in shards[rank::world]:
        first, count = sizes[name]
        for start in range(0, count, WINDOW):
            stop = min(count, start + WINDOW)
            places = [Place(index) for index in range(first + start, first + stop)]
            windows.append(Window(name, places, stop == count))
    return windows


def parts(windows: Sequence[Window], loaded: Iterator[list[Loaded]]) -> Iterator[Part]:
    """The windows' batches one after the other, as what they are of their shards."""
    for window, batches in zip(windows, loaded, strict=True):
        for number, batch in enumerate(batches, 1):
            yield Part(window.shard, batch, window.last and number == len(batches))


@dataclass(frozen=True)
class Written:
    """What came of one part."""

    part: Part
    bytes: int
    """What its records take on disk, as it was projected."""
    bad: list[Rejected]

    def counts(self) -> tuple[int, int, int, int]:
        """Samples read, response tokens, bytes, and shards that are complete with it."""
        loaded = self.part.loaded
        read = len(loaded.batches["teacher"].keys) + len(loaded.rejected)
        return read, loaded.tokens(), self.bytes, int(self.part.last)


class Writing:
    """Packs and writes in a thread of its own, behind the teacher's forwards. Leaves no half shard behind."""

    def __init__(self, cache: CacheFolder):
        self._cache, self._pool = cache, ThreadPoolExecutor(1)
        self._waiting: deque[Future[Written]] = deque()
        self._writer: CacheWriter | None = None
        self._fidelity: list[Fidelity] = []

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._writer is not None:
            with suppress(OSError):  # on a full disk what is thrown away cannot be flushed first
                self._writer.__exit__(*error)

    def put(self, part: Part, heard: Heard) -> list[Written]:
        """Hand over a batch; returns those that are written by now. Raises what writing an earlier one raised."""
        self._waiting.append(self._pool.submit(self._write, part, heard))
        return self._take(WRITES_WAITING)

    def rest(self) -> list[Written]:
        """All that was handed over and not returned yet."""
        return self._take(0)

    def _take(self, left: int) -> list[Written]:
        try:
            return [self._waiting.popleft().result() for _ in range(len(self._waiting) - left)]
        except OSError as error:
            raise CacheError(
                f"{self._cache.path}: cannot write there: {error}. Put that right and run the same command again: "
                "shards that are whole stay"
            ) from error

    def _write(self, part: Part, heard: Heard) -> Written:
        if self._writer is None:
            self._writer, self._fidelity = self._cache.writer(part.shard), []
        batch, bad, size = part.loaded.batches["teacher"], list(part.loaded.rejected), 0
        self._fidelity.append(heard.fidelity)
        for rejected in part.loaded.rejected:
            self._writer.skip(rejected.key, rejected.reason)
        arrays, labels, end = {n: to_numpy(a) for n, a in heard.codes.items()}, batch.labels.numpy(), 0
        for key, count in zip(batch.keys, batch.counts, strict=True):
            rows, end = slice(end, end + count), end + count
            try:
                record = self._writer.add(key, labels[rows], {name: array[rows] for name, array in arrays.items()})
                size += on_disk(record)
            except SampleError as error:
                self._writer.skip(key, str(error))
                bad.append(Rejected(key, part.shard, str(error)))
        if part.last:
            self._writer.commit(fidelity=sum(self._fidelity[1:], self._fidelity[0]).to_json())
            self._writer.__exit__()
            self._writer = None
        return Written(part, size, bad)
