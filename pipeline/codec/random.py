"""The random numbers of a cache: functions of (seed, sample, layer, token) alone.

So neither ranks nor batches nor other layers change a draw, and a shard made again has the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def uniform(seed: int, purpose: str, key: str, layers: Sequence[int], tokens: int) -> np.ndarray:
    """[tokens, layers] float64 in [0, 1): the t-th number of a stream for each (seed, purpose, key, layer).

    Philox's raw output is used, which NumPy keeps the same for ever, unlike its distributions.
    """
    columns = [_stream(f"{seed}/{purpose}/{key}/{layer}", tokens) for layer in layers]
    return np.stack(columns, 1) if columns else np.zeros((tokens, 0))


def _stream(name: str, count: int) -> np.ndarray:
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53
