"""How sure an exact match is, and whether two models differ on the same samples. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Z = 1.959964
"""Quantile of the normal distribution for two-sided 95 %."""


def share_interval(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson (1927): it stays inside 0 to 1 and holds for few samples too."""
    if not asked:
        return 0.0, 1.0
    share, z2 = right / asked, Z * Z
    centre = (share + z2 / (2 * asked)) / (1 + z2 / asked)
    half = Z / (1 + z2 / asked) * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked**2))
    return max(0.0, centre - half), min(1.0, centre + half)


QUESTIONS = ("data", "samples", "max_length", "decoding", "pixels", "max_new_tokens")
"""What of a result's identity says what was asked, and how: alike in two results that may be compared."""


def asked(result: Mapping[str, Any]) -> dict[str, str]:
    """What a result of `evaluate` was asked. Of one that was kept without an identity only the path and the number."""
    identity = result.get("identity")
    if identity is None:
        return {"data": str(result.get("data")), "samples": str(result.get("read"))}
    return {name: identity[name] for name in QUESTIONS if name in identity}


def asked_otherwise(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In what two results were not asked alike, "name (ours, theirs)" each; empty where they can be compared."""
    if ("identity" in ours) != ("identity" in theirs):  # then only what both say
        ours, theirs = ({**one, "identity": None} for one in (ours, theirs))
    pair = asked(ours), asked(theirs)
    names = [name for name in QUESTIONS if pair[0].get(name) != pair[1].get(name)]
    return [f"{name} ({', '.join(one.get(name, 'none')[:24] for one in pair)})" for name in names]


def perplexity_note(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Says that perplexities cannot be compared, where models have not equally many response tokens; else empty."""
    counts = {name: one["response_tokens"] for name, one in results.items() if one.get("response_tokens")}
    if len(set(counts.values())) < 2:
        return ""
    of_each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return (
        f"perplexity: not to be compared between models of unequally many response tokens ({of_each}): their "
        "tokenizers or chat templates differ, or the samples that they used."
    )


@dataclass(frozen=True)
class Difference:
    """Exact match of one model minus another's, over the samples that both answered."""

    mean: float
    low: float
    high: float
    samples: int
    p: float
    """Two-sided, of McNemar's exact test."""

    @property
    def is_sure(self) -> bool:
        """Whether the 95 % interval leaves out zero, and p says so too: of few samples the interval is too narrow."""
        return (self.low > 0 or self.high < 0) and self.p < 0.05


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Difference:
    """Compare two results of `evaluate` on the same data, sample by sample.

    The interval is the normal one of paired differences: what both answer alike says nothing about the difference, so
    it is narrower than the two rows' own intervals suggest. Where few samples differ it is too narrow: see `is_sure`.
    """
    our_wrong, their_wrong = set(ours["wrong"]), set(theirs["wrong"])
    unusable = {one["key"] for result in (ours, theirs) for one in result.get("rejected", [])}
    count = ours["read"] - len(unusable)
    only_we = len(their_wrong - our_wrong - unusable)
    only_they = len(our_wrong - their_wrong - unusable)
    if not count:
        return Difference(0.0, -1.0, 1.0, 0, 1.0)
    mean = (only_we - only_they) / count
    half = Z * math.sqrt(max(0.0, only_we + only_they - count * mean**2)) / count
    p = mcnemar(only_we, only_they)
    return Difference(mean, max(-1.0, mean - half), min(1.0, mean + half), count, p)


def mcnemar(only_we: int, only_they: int) -> float:
    """Two-sided p that of b + c samples, which one model alone answered, so few are one model's by even chances.

    p = min(1, 2 sum over k <= min(b, c) of C(b + c, k) / 2^(b + c)), after McNemar (1947).
    """
    n = only_we + only_they
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(only_we, only_they) + 1)
    )
    return min(1.0, 2 * math.fsum(math.exp(log - n * math.log(2)) for log in logs))


def sentences(results: Mapping[str, Mapping[str, Any]], against: str) -> Iterator[str]:
    """What the numbers show, a sentence for each model but `against` itself and the baseline without a model.

    Models that were not asked alike are not compared: a sample that one was not asked would count as answered by it.
    """
    theirs = results[against]
    for name, ours in results.items():
        if name == against or "wrong" not in ours:
            continue
        if differing := asked_otherwise(ours, theirs):
            yield (
                f"{name} and {against} cannot be compared: they were evaluated with other {', '.join(differing)}. "
                "Evaluate both with the same --data, --limit and --max-new-tokens, and the same limits in data of the "
                "recipe."
            )
            continue
        found = difference(ours, theirs)
        points = f"{abs(100 * found.mean):.1f} points"
        if found.is_sure:
            low, high = sorted((abs(100 * found.low), abs(100 * found.high)))
            yield (
                f"{name} answers {points} {'more' if found.mean > 0 else 'less'} than {against} "
                f"(95 %: {low:.1f} to {high:.1f})."
            )
        else:
            yield f"{name} and {against} differ by {points}: within chance on {found.samples:,} samples."
