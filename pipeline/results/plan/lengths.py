"""Lengths of samples that are not at hand, as they are assumed."""

from __future__ import annotations

import math
import random

SPREAD = 0.75
"""Standard deviation of the logarithm of a sample's tokens, of mixed instruction data: assumed, not measured."""


def assumed_lengths(draws: random.Random, count: int, mean: float, longest: int) -> list[float]:
    """Tokens of so many samples: log-normal around a mean, cut at the longest."""
    middle = math.log(mean) - SPREAD**2 / 2
    return [min(float(longest), draws.lognormvariate(middle, SPREAD)) for _ in range(count)]
