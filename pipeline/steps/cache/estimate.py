"""Before a cache job begins: estimate the cache's size and the vocabulary's order from a few samples."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.shards import ShardFolder
from data_prep.storage import is_url
from pipeline.cache.writer import CacheFolder
from pipeline.codec.packing import pack_record, to_numpy
from pipeline.codec.vocabulary_order import order_by_use
from pipeline.errors import CacheError
from pipeline.loss.bucket import BucketShare
from pipeline.runtime.data.batches import LoadedBatch, SampleIndex
from pipeline.runtime.data.loader import WINDOW
from pipeline.runtime.display.progress import size_text
from pipeline.runtime.ranks import gather_lists
from pipeline.steps.cache.teacher_pass import TeacherPass, stored_samples

SAMPLES = 64
"""Read beforehand by every rank, evenly over the data: alike whatever the number of ranks and the shards asked for."""

SIDECAR_BYTES = 200
"""What a sample takes in its shard's sidecar and in the manifest: key and offset, twice."""


FEWEST_POINTS = 16
"""The recipe's bound for cache.codec.points."""


@dataclass(frozen=True)
class SizeEstimate:
    """How large a cache, or a part of it, will be."""

    token_layers: float
    """Distributions to be stored."""
    bytes: float
    """What they will take on disk."""

    def __str__(self) -> str:
        each = self.bytes / max(1.0, self.token_layers)
        return f"{size_text(self.bytes)} ({self.token_layers:,.0f} token-layers of {each:.0f} bytes)"

    def __mul__(self, samples: int) -> SizeEstimate:
        """From one sample's to that of many."""
        return SizeEstimate(self.token_layers * samples, self.bytes * samples)


def on_disk(record: int) -> int:
    """Bytes on disk of a packed record of `record` bytes, with tar header, padding, and its sidecar entries."""
    return tarfile.BLOCKSIZE + -(-record // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + SIDECAR_BYTES


def find_vocabulary_order(teacher_pass: TeacherPass) -> np.ndarray:
    """[V] all ids, those that the teacher uses most first."""
    return order_by_use(sum(teacher_pass.token_usage(loaded) for loaded in _batches(teacher_pass)))  # type: ignore[arg-type]


def rehearse(teacher_pass: TeacherPass, cache: CacheFolder) -> tuple[SizeEstimate, BucketShare | None]:
    """Estimate for one sample: the mean over a few samples, encoded exactly as the job encodes them.

    Of a mapped vocabulary also the bucket's share of these samples; of a shared one None.
    """
    codec, read, size, distributions = cache.codec(), 0, 0, 0
    shares: list[BucketShare] = []
    for loaded in _batches(teacher_pass):
        output = teacher_pass.encode_response(loaded, codec)
        batch = loaded.batches["teacher"]
        read += len(batch.keys) + len(loaded.rejected)
        distributions += len(batch.labels) * len(cache.identity.layers)
        split = {name: to_numpy(array) for name, array in output.codes.items()}
        for _, rows, tokens, places in stored_samples(loaded):
            record = {name: array[rows] for name, array in split.items()}
            if codec.finite(record).all():  # else the job will skip it
                size += on_disk(len(pack_record(tokens, codec.pack(record), places=places)))
        if output.bucket is not None:
            shares.append(BucketShare.read(output.bucket))
    return SizeEstimate(distributions / read, size / read), sum(shares[1:], shares[0]) if shares else None


def check_disk_space(cache: CacheFolder, own: SizeEstimate, lacking: SizeEstimate) -> None:
    """Raise CacheError, on all ranks alike, where the missing part of the cache does not fit on the disk.

    The whole missing part counts, not this job's alone: the jobs that make the rest fill the same disk. Of a store
    behind a URL nobody knows how much room it has.
    """
    if is_url(cache.path):
        return
    free = gather_lists([shutil.disk_usage(cache.path).free])[0]
    if lacking.bytes <= free:
        return
    raise CacheError(
        f"{cache.path}: all that the cache lacks would take {lacking}, this job's part of it {size_text(own.bytes)}, "
        f"but {size_text(free)} are free there. Free some, or move the run's caches to a larger disk "
        f"(mv {cache.path.parent} FOLDER) or a store, and name it in every command (--set cache.folder=FOLDER)"
        f"{_or_less(cache.identity.codec)}"
    )


def _or_less(codec: Mapping[str, Any]) -> str:
    """An override that makes each distribution smaller, where there is one. It begins another cache."""
    if codec["name"] == "hidden":
        knob = "name=sampled"
    elif codec["name"] == "sampled" and codec["points"] > FEWEST_POINTS:
        knob = f"points={max(FEWEST_POINTS, codec['points'] // 2)}"
    elif codec["name"] == "topk" and codec["k"] > 1:
        knob = f"k={codec['k'] // 2}"
    else:
        return ""
    return f", or store less of each distribution (--set cache.codec.{knob}; now {dict(codec)})"


def _batches(teacher_pass: TeacherPass) -> Iterator[LoadedBatch]:
    indices = evenly_spaced(teacher_pass.dataset.folder)
    windows = [indices[start : start + WINDOW] for start in range(0, len(indices), WINDOW)]
    for batches in teacher_pass.batches(windows):
        yield from batches


def evenly_spaced(data: ShardFolder) -> Sequence[SampleIndex]:
    """At most SAMPLES samples, at equal distances over the whole data."""
    count = min(SAMPLES, len(data))
    return [SampleIndex(i * len(data) // count) for i in range(count)]
