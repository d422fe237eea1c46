"""The cache job's batches, each of one shard, and the thread that packs and writes their encoded distributions."""

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
from pipeline.loss.bucket import BucketShare
from pipeline.loss.fidelity import Fidelity
from pipeline.runtime.data.bad_samples import Rejected
from pipeline.runtime.data.batches import LoadedBatch, SampleIndex
from pipeline.runtime.data.loader import WINDOW
from pipeline.steps.cache.estimate import on_disk
from pipeline.steps.cache.teacher_pass import TeacherOutput, stored_samples

LONGEST_QUEUE = 2
"""Batches that may be queued for the writing thread before the teacher's pass waits."""


@dataclass(frozen=True)
class Window:
    """Neighbouring samples of a shard, whose batches are formed together."""

    shard: str
    indices: list[SampleIndex]
    last: bool
    """Whether the shard is complete with it."""


@dataclass(frozen=True)
class ShardBatch:
    """One batch of one shard."""

    shard: str
    loaded: LoadedBatch
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
            indices = [SampleIndex(index) for index in range(first + start, first + stop)]
            windows.append(Window(name, indices, stop == count))
    return windows


def shard_batches(windows: Sequence[Window], loaded: Iterator[list[LoadedBatch]]) -> Iterator[ShardBatch]:
    """The windows' batches one after the other, each with its shard."""
    for window, batches in zip(windows, loaded, strict=True):
        for number, batch in enumerate(batches, 1):
            yield ShardBatch(window.shard, batch, window.last and number == len(batches))


@dataclass(frozen=True)
class WrittenBatch:
    """The result of writing one batch."""

    shard_batch: ShardBatch
    bytes: int
    """Bytes that its records take on disk."""
    bad: list[Rejected]

    def counts(self) -> tuple[int, int, int, int, int]:
        """(samples read, response tokens, bytes, shards that it completed, bad samples)."""
        loaded = self.shard_batch.loaded
        read = len(loaded.batches["teacher"].keys) + len(loaded.rejected)
        return read, loaded.tokens(), self.bytes, int(self.shard_batch.last), len(self.bad)


class WriterThread:
    """Packs and writes in a thread of its own, while the teacher computes. Leaves no partial shard behind."""

    def __init__(self, cache: CacheFolder):
        self._cache, self._pool = cache, ThreadPoolExecutor(1)
        self._waiting: deque[Future[WrittenBatch]] = deque()
        self._writer: CacheWriter | None = None
        self._fidelity: list[Fidelity] = []
        self._bucket: list[BucketShare] = []

    def __enter__(self) -> WriterThread:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._writer is not None:
            with suppress(OSError):  # on a full disk the discarded file cannot be flushed
                self._writer.__exit__(*error)

    def put(self, shard_batch: ShardBatch, output: TeacherOutput) -> list[WrittenBatch]:
        """Queue a batch; returns the batches that are written by now. Raises what writing an earlier one raised."""
        self._waiting.append(self._pool.submit(self._write, shard_batch, output))
        return self._take(LONGEST_QUEUE)

    def rest(self) -> list[WrittenBatch]:
        """Wait for the queue; returns all batches not returned yet."""
        return self._take(0)

    def _take(self, left: int) -> list[WrittenBatch]:
        try:
            return [self._waiting.popleft().result() for _ in range(len(self._waiting) - left)]
        except OSError as error:
            raise CacheError(
                f"{self._cache.path}: cannot write there: {error}. Put that right and run the same command again: "
                "shards that are whole stay"
            ) from error

    def _write(self, shard_batch: ShardBatch, output: TeacherOutput) -> WrittenBatch:
        if self._writer is None:
            self._writer, self._fidelity = self._cache.writer(shard_batch.shard), []
            self._bucket = []
        bad, size = list(shard_batch.loaded.rejected), 0
        self._fidelity.append(output.fidelity.read())
        if output.bucket is not None:
            self._bucket.append(BucketShare.read(output.bucket))
        for rejected in shard_batch.loaded.rejected:
            self._writer.skip(rejected.key, rejected.reason)
        arrays = {n: to_numpy(a) for n, a in output.codes.items()}
        for key, rows, tokens, places in stored_samples(shard_batch.loaded):
            try:
                own = {name: array[rows] for name, array in arrays.items()}
                record = self._writer.add(key, tokens, own, places)
                size += on_disk(record)
            except SampleError as error:
                self._writer.skip(key, str(error))
                bad.append(Rejected(key, shard_batch.shard, str(error)))
        if shard_batch.last:
            measured = {"fidelity": sum(self._fidelity[1:], self._fidelity[0]).to_json()}
            if self._bucket:
                measured["bucket"] = sum(self._bucket[1:], self._bucket[0]).to_json()
            self._writer.commit(**measured)
            self._writer.__exit__()
            self._writer = None
        return WrittenBatch(shard_batch, size, bad)
