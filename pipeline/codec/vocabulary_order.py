"""The vocabulary order: the ids that the teacher uses most come first. Samples are drawn and stored in this order.

V common vocabulary. Neighbours in this order have a similar use, which makes a systematic sample even. Most ids of a
sample lie near its start, which makes them cheap to store. Any order gives correct results, but all shards of a cache
must have the same one.
"""

from __future__ import annotations

import numpy as np


def order_by_use(use: np.ndarray) -> np.ndarray:
    """All ids [V] int32, most used first, ties by id.

    use: [V] any measure of how often the teacher predicts each id.
    """
    return np.argsort(-use, kind="stable").astype("<i4")
