"""Matching: which teacher layer each student layer follows. The paper's Algorithm 1, and simpler rules to compare with.

S student target layers, J teacher target layers. Both are counted from 0 here: rows and columns of the KL matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Match = list[int | None]
"""For each student layer, the teacher layer that it follows; None where it follows none."""


@dataclass(frozen=True)
class Matching:
    """A matching rule. All rules have the same interface."""

    name: str
    window: Callable[[int, int], list[range]]
    """(S, J) -> for each student layer, the columns whose KL `match` may read or pick. No other KL is needed."""
    match: Callable[[Tensor, torch.Generator], Match]
    """(mean KL [S, J] in nats, CPU generator) -> the match. Entries outside the window may have any value."""


def search_ranges(students: int, teachers: int) -> list[range]:
    """Algorithm 1's widest search ranges: student layer i may be matched to teacher layers i .. J - S + i.

    This leaves a deeper teacher layer for each later student layer. Raises ValueError where S > J.
    """
    _check_order(students, teachers)
    return [range(i, teachers - students + i + 1) for i in range(students)]


def draw_probabilities(kl: Tensor) -> Tensor:
    """KL of one student layer to its candidates, K [n] in nats -> Algorithm 1's probabilities [n] float64.

    They are softmax(-K / T) with T = 2 / (max K - min K + 1e-6). A wide spread gives a low temperature: a clearly best
    candidate is chosen almost surely, and near-equal ones are explored. Raises ValueError for a KL that is not finite.
    """
    kl = _finite(kl.detach().to("cpu", torch.float64))
    temperature = 2.0 / (kl.max() - kl.min() + 1e-6)
    return torch.softmax(-kl / temperature, 0)


def adaptive(kl: Tensor, generator: torch.Generator) -> Match:
    """Algorithm 1: draw each layer's match in turn, from the candidates in its search range after the last match."""
    return _draw_in_order(kl, draw_probabilities, generator)


def random(kl: Tensor, generator: torch.Generator) -> Match:
    """Algorithm 1 with equal probabilities: shows the effect of order and search range without the divergence."""
    return _draw_in_order(kl, lambda row: torch.full_like(row, 1.0 / len(row)), generator)


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


def last_only(kl: Tensor, generator: torch.Generator) -> Match:
    """No intermediate layer follows a teacher layer. Only the last layers' KL remains."""
    return [None] * len(kl)


STRATEGIES: dict[str, Matching] = {
    matching.name: matching
    for matching in (
        Matching("adaptive", search_ranges, adaptive),
        Matching("uniform", lambda s, j: [range(c, c + 1) for c in uniform_columns(s, j)], uniform),
        Matching("random", search_ranges, random),
        Matching("argmin", lambda s, j: [range(j)] * s, argmin),
        Matching("ordered_argmin", search_ranges, ordered_argmin),
        Matching("last_only", lambda s, j: [range(0)] * s, last_only),
    )
}
"""Matching rules by their names in a recipe (interact.matching)."""


def _draw_in_order(kl: Tensor, probabilities: Callable[[Tensor], Tensor], generator: torch.Generator) -> Match:
    matrix = _matrix(kl)
    match: Match = []
    start = 0
    for row, columns in zip(matrix, search_ranges(*matrix.shape), strict=True):
        drawn = torch.multinomial(probabilities(row[start : columns.stop]), 1, generator=generator)
        match.append(start + int(drawn))
        start += int(drawn) + 1
    return match


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
