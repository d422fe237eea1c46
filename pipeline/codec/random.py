"""The random numbers of a cache. Each depends only on (seed, purpose, sample key, layer, token).

So a draw does not depend on ranks, batches or other layers, and a shard that is built again has the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def uniform(seed: int, purpose: str, key: str, layers: Sequence[int], tokens: int) -> np.ndarray:
    """[tokens, layers] float64 in [0, 1). Row t is the t-th number of the stream of (seed, purpose, key, layer).

    It uses Philox's raw output. NumPy guarantees that this never changes; it does not for its distributions.
    """
    columns = [_stream(f"{seed}/{purpose}/{key}/{layer}", tokens) for layer in layers]
    return np.stack(columns, 1) if columns else np.zeros((tokens, 0))


def _stream(name: str, count: int) -> np.ndarray:
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53
