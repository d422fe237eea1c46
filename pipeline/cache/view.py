"""What stage 2 takes of a cache: some layers, and in each epoch some of the points and some of the tokens.

T response tokens, J teacher layers asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.cache.reader import CacheRecord, TeacherCache
from pipeline.codec.random import uniform
from pipeline.codec.sampled import Sampled, every_nth
from pipeline.signal import Signal, Unembedding


@dataclass(frozen=True)
class CacheView:
    """A cache as a run uses it. Picklable: `record` runs in loader workers, `signal` where the model is."""

    cache: TeacherCache
    layers: tuple[int, ...]
    """The teacher layers asked for, the last one last."""
    points: int | None = None
    """How many of the stored points of each distribution an epoch sees (sampled codec); None for all."""
    token_share: float = 1.0
    """Share of the response tokens that an epoch sees."""
    seed: int = 0
    """The run's, for the choice of tokens; that of points goes by the codec's, as the points themselves do."""

    def record(self, index: int, epoch: int, expected: np.ndarray) -> tuple[CacheRecord, np.ndarray]:
        """The record of a sample for an epoch, and which of its T tokens it keeps [T] bool.

        Raises SampleError and CacheError as TeacherCache.read does, and SampleError where the record was made for
        other response tokens than `expected` [T].
        """
        record = self.cache.read(index)
        self.cache.check_tokens(record, expected)
        columns = self.cache.columns(self.layers)
        arrays = {name: array[:, columns] for name, array in record.arrays.items()}
        arrays = self._points_of(record.key, epoch, arrays)
        kept = self._tokens_of(record.key, epoch, len(record.tokens))
        arrays = {name: array[kept] for name, array in arrays.items()}
        return replace(record, tokens=record.tokens[kept], arrays=arrays), kept

    def signal(self, records: list[CacheRecord], device: torch.device | str, head: Unembedding | None) -> Signal:
        """What the layers say about the records' tokens, one record after the other."""
        return self.cache.decode([record.arrays for record in records], len(self.layers), device, head)

    def _points_of(self, key: str, epoch: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Other points in each epoch, from a place drawn for each token and layer, so that every epoch is unbiased."""
        codec = self.cache.codec
        if self.points is None or not isinstance(codec, Sampled) or self.points == codec.points:
            return arrays
        every = codec.points // self.points
        start = uniform(codec.seed, "points", key, self.layers, len(arrays["ranks"])) * every
        return every_nth(arrays, every, (start.astype(np.int64) + epoch) % every)

    def _tokens_of(self, key: str, epoch: int, tokens: int) -> np.ndarray:
        drawn = uniform(self.seed, f"tokens of epoch {epoch}", key, (0,), tokens)[:, 0]
        return drawn < self.token_share
