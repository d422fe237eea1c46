"""Matching: which teacher layer each student layer follows. The paper's Algorithm 1, and simpler rules to compare with.

S student target layers, J teacher target layers. Both are counted from 0 here: rows and columns of the KL matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Match = list[int | None]
"""For each student layer, the teacher layer that it follows; None where it follows none."""

Probabilities = Callable[[Tensor], Tensor]
"""KL of one student layer to its candidates [n] in nats -> the probability of each [n] float64."""


@dataclass(frozen=True)
class Matching:
    """A matching rule. All rules have the same interface."""

    name: str
    window: Callable[[int, int], list[range]]
    """(S, J) -> for each student layer, the columns whose KL `match` may read or pick. No other KL is needed."""
    match: Callable[[Tensor, torch.Generator], Match]
    """(mean KL [S, J] in nats, CPU generator) -> the match. Entries outside the window may have any value."""
    probabilities: Probabilities | None = None
    """How each layer is drawn from its candidates; None for a rule that draws nothing."""

    def entropies(self, kl: Tensor, match: Match) -> list[float] | None:
        """Entropy in nats of each student layer's draw, given the draws before it; None for a rule without draws.

        Candidates that are all equally likely give the logarithm of their number, and a certain one gives 0.
        """
        if self.probabilities is None:
            return None
        matrix, starts = _matrix(kl), [0, *(column + 1 for column in match[:-1] if column is not None)]
        rows = zip(matrix, starts, search_ranges(*matrix.shape), strict=True)
        drawn_from = [self.probabilities(row[start : columns.stop]) for row, start, columns in rows]
        return [float(torch.special.entr(p).sum()) for p in drawn_from]


def search_ranges(students: int, teachers: int) -> list[range]:
    """Algorithm 1's widest search ranges: student layer i may be matched to teacher layers i .. J - S + i.

    This leaves a deeper teacher layer for each later student layer. Raises ValueError where S > J.
    """
    _check_order(students, teachers)
    return [range(i, teachers - students + i + 1) for i in range(students)]


def draw_probabilities(kl: Tensor, temperature: float | None = None) -> Tensor:
    """KL of one student layer to its candidates, K [n] in nats -> Algorithm 1's probabilities [n] float64.

    They are softmax(-K / T). temperature: T in nats; None: the paper's T = 2 / (max K - min K + 1e-6). A spread of
    D = max K - min K then makes the best candidate exp(D^2 / 2) times as likely as the worst: 1.1 times at half a nat,
    7 times at two, 90 times at three. Raises ValueError for a KL that is not finite.
    """
    kl = _finite(kl.detach().to("cpu", torch.float64))
    t = 2.0 / (kl.max() - kl.min() + 1e-6) if temperature is None else temperature
    return torch.softmax(-kl / t, 0)


def equal_probabilities(kl: Tensor) -> Tensor:
    """Equal probabilities for all candidates: shows the effect of order and search range without the divergence."""
    return torch.full_like(kl, 1.0 / len(kl))


def draw_in_order(kl: Tensor, generator: torch.Generator, probabilities: Probabilities) -> Match:
    """Algorithm 1: draw each layer's match in turn, from the candidates in its search range after the last match."""
    matrix = _matrix(kl)
    match: Match = []
    start = 0
    for row, columns in zip(matrix, search_ranges(*matrix.shape), strict=True):
        drawn = torch.multinomial(probabilities(row[start : columns.stop]), 1, generator=generator)
        match.append(start + int(drawn))
        start += int(drawn) + 1
    return match


def argmin(kl: Tensor, generator: torch.Generator) -> Match:
    """Each student layer takes the teacher layer of least KL, without order or range. Several may take the same one."""
    return [int(column) for column in _finite(_matrix(kl)).argmin(1)]


def ordered_argmin(kl: Tensor, generator: torch.Generator) -> Match:
    """The strictly increasing match of least total KL, found by dynamic programming."""
    matrix = _matrix(kl)
    ranges = search_ranges(*matrix.shape)
    costs = matrix.new_zeros(matrix.shape[1])
    choices: list[Tensor] = []
    for row, columns in zip(matrix, ranges, strict=True):
        total = torch.full_like(row, torch.inf)
        total[columns.start : columns.stop] = _finite(row[columns.start : columns.stop])
        if choices:
            total[1:] += costs[:-1]  # the previous layer's match is strictly shallower
        costs, best = total.cummin(0)
        choices.append(best)
    match: list[int] = []
    column = matrix.shape[1] - 1
    for best in reversed(choices):
        match.insert(0, int(best[column]))
        column = match[0] - 1
    return list(match)


def uniform_columns(students: int, teachers: int) -> list[int]:
    """Spread evenly over the teacher: student layer i takes floor((i + 1) J / S) - 1, so the last takes the last.

    For S = 7 and J = 20: 1, 4, 7, 10, 13, 16, 19. Strictly increasing, as J >= S; raises ValueError otherwise.
    """
    _check_order(students, teachers)
    return [(i + 1) * teachers // students - 1 for i in range(students)]


def uniform(kl: Tensor, generator: torch.Generator) -> Match:
    """The fixed match of `uniform_columns`. It does not depend on the divergences."""
    return list(uniform_columns(*kl.shape))


def earliest(kl: Tensor, generator: torch.Generator) -> Match:
    """The shallowest teacher layers that the search ranges allow: student layer i follows teacher layer i."""
    return [columns.start for columns in search_ranges(*kl.shape)]


def latest(kl: Tensor, generator: torch.Generator) -> Match:
    """The deepest teacher layers that the search ranges allow: student layer i follows teacher layer J - S + i."""
    return [columns.stop - 1 for columns in search_ranges(*kl.shape)]


def last_only(kl: Tensor, generator: torch.Generator) -> Match:
    """No intermediate layer follows a teacher layer. Only the last layers' KL remains."""
    return [None] * len(kl)


def _drawn(name: str, probabilities: Probabilities) -> Matching:
    return Matching(name, search_ranges, partial(draw_in_order, probabilities=probabilities), probabilities)


STRATEGIES: dict[str, Matching] = {
    matching.name: matching
    for matching in (
        _drawn("adaptive", draw_probabilities),
        Matching("uniform", lambda s, j: [range(c, c + 1) for c in uniform_columns(s, j)], uniform),
        _drawn("random", equal_probabilities),
        Matching("argmin", lambda s, j: [range(j)] * s, argmin),
        Matching("ordered_argmin", search_ranges, ordered_argmin),
        Matching("earliest", lambda s, j: [range(r.start, r.start + 1) for r in search_ranges(s, j)], earliest),
        Matching("latest", lambda s, j: [range(r.stop - 1, r.stop) for r in search_ranges(s, j)], latest),
        Matching("last_only", lambda s, j: [range(0)] * s, last_only),
    )
}
"""Matching rules by their names in a recipe (interact.matching)."""


def matching_rule(name: str, temperature: float | None = None) -> Matching:
    """The rule of a recipe: interact.matching, and interact.temperature (nats), which only `adaptive` uses."""
    if name == "adaptive" and temperature is not None:
        return _drawn(name, partial(draw_probabilities, temperature=temperature))
    return STRATEGIES[name]


def _matrix(kl: Tensor) -> Tensor:
    """The matrix on the CPU in float64, so that the same numbers give the same draw on every device."""
    return kl.detach().to("cpu", torch.float64)


def _finite(kl: Tensor) -> Tensor:
    if not kl.isfinite().all():
        raise ValueError(
            f"the KL of a candidate is not finite: {kl.tolist()}. Training has diverged, or the cache is broken: "
            "look at the last losses in metrics.jsonl"
        )
    return kl


def _check_order(students: int, teachers: int) -> None:
    if students > teachers:
        raise ValueError(
            f"{students} student target layers cannot be matched in order to {teachers} teacher target layers: "
            "name more teacher layers or fewer student layers in the recipe"
        )
