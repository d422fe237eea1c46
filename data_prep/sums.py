"""A checksum of each sample as its shard holds it: a bit that flips on a disk is found when the sample is read.

Without it a picture with a flipped bit decodes, mostly, to another picture, and nobody knows.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO


def sample_sum(content: bytes) -> int:
    """CRC-32 of a sample's bytes, from its first tar header to the end of its last member's padding."""
    return zlib.crc32(content)


def sample_sums(file: BinaryIO, offsets: Sequence[int], end: int) -> list[int]:
    """Of all samples of a shard, one held at a time. offsets, end: as in the manifest."""
    sums = []
    for start, stop in zip(offsets, [*offsets[1:], end], strict=True):
        file.seek(start)
        sums.append(sample_sum(file.read(stop - start)))
    return sums


def is_sum(value: Any) -> bool:
    """Whether a manifest's value is what `sample_sum` gives."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
