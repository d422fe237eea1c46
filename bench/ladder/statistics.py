"""Means over seeds, their 95 % intervals, and paired differences. A seed draws data, noise, order and verbalizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95
ROUNDING = 1e-9
"""Differences this near one another are equal: what parts them is the rounding of floats, and a t-test takes it for a
spread."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval by Student's t; the interval of one seed is not known: None."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """The mean difference of two arms over the same seeds, its interval, and the p of a paired t-test (two-sided)."""

    interval: Interval
    p: float | None


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of the mean. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values to average")
    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return Interval(mean, None, None)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """ours - theirs, seed by seed. p is None for fewer than two seeds, or where all differ by the same and not by 0."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    found = interval(differences)
    if len(differences) < 2:
        return Difference(found, None)
    if max(differences) - min(differences) < ROUNDING:
        return Difference(found, 1.0 if abs(found.mean) < ROUNDING else None)
    return Difference(found, float(stats.ttest_1samp(differences, 0.0).pvalue))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Each p with Holm's correction for all of them (Holm 1979): the chance that any true null has one so small."""
    known = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[place] = largest
    return corrected


def detectable(deviation: float, seeds: int, power: float = 0.8) -> float:
    """The smallest true difference that a paired t-test finds with this power, for a standard deviation over seeds.

    The usual approximation: (t at 97.5 % + t at `power`) x deviation / sqrt(seeds).
    """
    quantiles = float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1) + stats.t.ppf(power, seeds - 1))
    return quantiles * deviation / math.sqrt(seeds)
