"""The order of the vocabulary that samples are drawn and stored in: the ids that the teacher uses most first.

V common vocabulary. Neighbours in it are alike in use, which makes a systematic sample even, and most ids of a sample
come from its beginning, which makes them cheap to store. Any order is right; every shard of a cache must have the same.
"""

from __future__ import annotations

import numpy as np


def order_by_use(use: np.ndarray) -> np.ndarray:
    """use [V] (any measure of how often the teacher says each id) -> all ids [V] int32, equal ones by id."""
    return np.argsort(-use, kind="stable").astype("<i4")
