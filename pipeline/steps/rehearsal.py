"""Before a cache job begins: a few samples tell which ids the teacher uses, and how large the cache will be."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.shards import ShardFolder
from pipeline.errors import CacheError
from pipeline.runtime.batches import Loaded, Place
from pipeline.runtime.progress import size_text
from pipeline.runtime.ranks import gather_lists
from pipeline.steps.listening import WINDOW, Listener
from pipeline.teacher.fill import CacheFolder, record_bytes
from pipeline.teacher.order import order_by_use
from pipeline.teacher.packing import to_numpy

SAMPLES = 64
"""Read beforehand by every rank, evenly over the data: alike whatever the number of ranks and the shards asked for."""

SIDECAR_BYTES = 200
"""What a sample takes in its shard's sidecar and in the manifest: key and offset, twice."""


@dataclass(frozen=True)
class Projection:
    """How large a cache will be."""

    token_layers: float
    """Distributions to be stored."""
    bytes: float
    """What they will take on disk."""

    def __str__(self) -> str:
        each = self.bytes / max(1.0, self.token_layers)
        return f"{size_text(self.bytes)} ({self.token_layers:,.0f} token-layers of {each:.0f} bytes)"


def find_order(listener: Listener) -> np.ndarray:
    """[V] all ids, the teacher's most used first."""
    return order_by_use(sum(listener.use(loaded) for loaded in _batches(listener)))  # type: ignore[arg-type]


def project(listener: Listener, cache: CacheFolder, samples: int) -> Projection:
    """Code the few samples as the job would, and scale what they take up to `samples` of them."""
    codec, read, size, distributions = cache.codec(), 0, 0, 0
    for loaded in _batches(listener):
        codes = listener.hear(loaded, codec).codes
        batch = loaded.batches["teacher"]
        read += len(batch.keys) + len(loaded.rejected)
        distributions += len(batch.labels) * len(cache.identity.layers)
        split = {name: to_numpy(array) for name, array in codes.items()}
        for end, count in zip(np.cumsum(batch.counts), batch.counts, strict=True):
            rows = slice(end - count, end)
            record = {name: array[rows] for name, array in split.items()}
            size += record_bytes(codec, batch.labels[rows].numpy(), record) + SIDECAR_BYTES
    return Projection(distributions * samples / read, size * samples / read)


def refuse_without_room(cache: CacheFolder, projection: Projection) -> None:
    """Raise CacheError, on all ranks alike, where the projected size does not fit on the disk."""
    free = gather_lists([shutil.disk_usage(cache.path).free])[0]
    if projection.bytes <= free:
        return
    codec = cache.identity.codec
    knob = {"sampled": "cache.codec.points", "topk": "cache.codec.k"}.get(codec["name"], "cache.codec.name=sampled")
    raise CacheError(
        f"{cache.path}: the cache would take {projection}, but {size_text(free)} are free there. "
        f"Free some, put the run elsewhere (run=FOLDER), cache fewer layers (teacher.layers), or store less of each "
        f"({knob}; now {dict(codec)})"
    )


def _batches(listener: Listener) -> Iterator[Loaded]:
    places = _spread(listener.chats.folder)
    windows = [places[start : start + WINDOW] for start in range(0, len(places), WINDOW)]
    for batches in listener.batches(windows):
        yield from batches


def _spread(data: ShardFolder) -> Sequence[Place]:
    count = min(SAMPLES, len(data))
    return [Place(i * len(data) // count) for i in range(count)]
