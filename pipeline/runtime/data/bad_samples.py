"""Samples that cannot be used: which they are, and when there are too many of them to go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.schema import ChangedSample
from data_prep.shards import RawSample, ShardFolder
from pipeline.errors import DataError, SampleError

CHANCE = 1e-3
"""A step stops when data whose bad share is just the allowed one would look as bad as this with a smaller probability.

So 2 bad ones of 5 stop it at a limit of 1 %, 6 of 100 and 133 of 10,000."""


@dataclass(frozen=True)
class Rejected:
    """A sample that could not be used."""

    key: str
    shard: str
    reason: str

    @classmethod
    def of(cls, folder: ShardFolder, sample: int, error: SampleError) -> Rejected:
        """Sample number `sample` of a shard folder, and what is wrong with it."""
        shard = next(shard.name for shard in reversed(folder.shards) if shard.first <= sample)
        return cls(folder.keys[sample], shard, str(error))


def read_sample(folder: ShardFolder, sample: int) -> RawSample:
    """Read sample number `sample`. Raises SampleError where its bytes changed: one flipped bit costs one sample."""
    try:
        return folder.read(sample)
    except ChangedSample as error:
        raise SampleError(str(error)) from None


class BadSamples:
    """Counts what could not be used: read = used + rejected. One bad sample is always allowed.

    Ranks stop alike only if each of them counts the samples of all.
    """

    def __init__(self, largest_share: float, listed_in: str = "rejects.jsonl in the run folder"):
        """listed_in: where the user finds all of them."""
        self.largest_share, self.listed_in, self.read, self.rejected = largest_share, listed_in, 0, 0

    def count(self, read: int, rejected: Sequence[Rejected]) -> None:
        """Add samples of all ranks. Raises DataError when more are bad than chance explains (CHANCE).

        What has been read so far is a draw from all the data: a few bad samples among the first few say little.
        """
        self.read += read
        self.rejected += len(rejected)
        if self.rejected > 1 and at_least(self.rejected, self.read, self.largest_share) < CHANCE:
            raise self._too_many(f"; the last: {_named(rejected[-1])}" if rejected else "")

    def check_whole(self) -> None:
        """After all the data has been read once. Raises DataError if the share, known now, is above the allowed one."""
        if self.rejected > max(1.0, self.largest_share * self.read):
            raise self._too_many("")

    def _too_many(self, detail: str) -> DataError:
        return DataError(
            f"{self.rejected} of {self.read} samples could not be used, more than data.max_bad_share="
            f"{self.largest_share}{detail}. See {self.listed_in}, and python -m data_prep lint"
        )


def at_least(bad: int, read: int, share: float) -> float:
    """P(X >= bad) for X ~ Binomial(read, share): sum over k >= bad of C(read, k) share^k (1 - share)^(read - k).

    Exact where bad / read exceeds the share, which is where it is asked for; elsewhere 1, an upper bound.
    """
    if bad <= share * read:
        return 1.0
    if share <= 0.0:
        return 0.0
    log_choose = math.lgamma(read + 1) - math.lgamma(bad + 1) - math.lgamma(read - bad + 1)
    term = math.exp(log_choose + bad * math.log(share) + (read - bad) * math.log1p(-share))
    total, count = 0.0, bad
    while term > total * 1e-12:  # above the mean each term is smaller than the one before it
        total += term
        term *= (read - count) / (count + 1) * share / (1 - share)
        count += 1
    return total


def _named(one: Rejected) -> str:
    return f"{one.key} in {one.shard}: {one.reason}"
