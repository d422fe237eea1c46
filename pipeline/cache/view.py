"""The part of a cache that stage 2 uses: some layers, and in each epoch some of the points and some of the tokens.

T response tokens, J teacher layers in use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.cache.cut import cut_to
from pipeline.cache.reader import CacheRecord, TeacherCache
from pipeline.codec.random import uniform
from pipeline.codec.sampled import Sampled, every_nth
from pipeline.signal import Signal, Unembedding


@dataclass(frozen=True)
class CacheView:
    """A run's view of a cache. Picklable: `record` runs in loader workers, `signal` in the training process."""

    cache: TeacherCache
    layers: tuple[int, ...]
    """The teacher layers in use, counted from 1; the teacher's last layer comes last."""
    points: int | None = None
    """How many stored points of each distribution an epoch uses (sampled codec); None: all of them."""
    token_share: float = 1.0
    """Share of the response tokens that an epoch uses, in (0, 1]."""
    seed: int = 0
    """The run's seed, for the choice of tokens. The choice of points uses the codec's seed, as drawing them did."""
    ids: int | None = None
    """Number of the student's ids, where the cache has more (cut.py); None: the student has all of the cache's."""

    def record(self, index: int, epoch: int, expected: np.ndarray) -> tuple[CacheRecord, np.ndarray]:
        """A sample's record for an epoch, and a mask [T] bool of the tokens that it keeps.

        expected: [T] the sample's response token ids. Raises SampleError where the record was made for other ones, and
        SampleError and CacheError as TeacherCache.read does.
        """
        record = self.cache.read(index)
        self.cache.check_tokens(record, expected)
        columns = self.cache.columns(self.layers)
        arrays = {name: array[:, columns] for name, array in record.arrays.items()}
        arrays = self._points_of(record.key, epoch, arrays)
        chosen = self._tokens_of(record.key, epoch, len(record.tokens))
        arrays = {name: array[chosen] for name, array in arrays.items()}
        kept = chosen
        if record.places is not None:
            kept = np.zeros(len(expected), bool)
            kept[record.places[:-1][chosen]] = True
        return replace(record, tokens=record.tokens[chosen], arrays=arrays, places=None), kept

    def signal(self, records: list[CacheRecord], device: torch.device | str, head: Unembedding | None) -> Signal:
        """The signal over the tokens of all records, concatenated."""
        signal = self.cache.decode([record.arrays for record in records], len(self.layers), device, head)
        return signal if self.ids is None else cut_to(signal, self.ids)

    def _points_of(self, key: str, epoch: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Different points in each epoch. The first is drawn for each token and layer, so every epoch is unbiased."""
        codec = self.cache.codec
        if self.points is None or not isinstance(codec, Sampled) or self.points == codec.points:
            return arrays
        every = codec.points // self.points
        start = uniform(codec.seed, "points", key, self.layers, len(arrays["ranks"])) * every
        return every_nth(arrays, every, (start.astype(np.int64) + epoch) % every)

    def _tokens_of(self, key: str, epoch: int, tokens: int) -> np.ndarray:
        drawn = uniform(self.seed, f"tokens of epoch {epoch}", key, (0,), tokens)[:, 0]
        return drawn < self.token_share
