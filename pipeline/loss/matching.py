"""Which teacher layer a student layer follows: the paper's Algorithm 1, and the plainer strategies it is compared with.

S student target layers, J teacher target layers, both counted from 0 here: rows and columns of the KL matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Match = list[int | None]
"""For each student layer the teacher layer it follows; None where it follows none."""


@dataclass(frozen=True)
class Matching:
    """A strategy: where it looks, and what it picks. All strategies are called alike."""

    name: str
    window: Callable[[int, int], list[range]]
    """(S, J) -> for each student layer the columns whose KL `match` may read or pick: nothing else need be computed."""
    match: Callable[[Tensor, torch.Generator], Match]
    """(mean KL [S, J] in nats, CPU generator) -> the match. Entries outside the window may be anything."""


def search_ranges(students: int, teachers: int) -> list[range]:
    """Algorithm 1's widest ranges: layer i searches i .. J - S + i, which leaves a teacher layer for each after it."""
    _check_order(students, teachers)
    return [range(i, teachers - students + i + 1) for i in range(students)]


def draw_probabilities(kl: Tensor) -> Tensor:
    """Softmax(-K / T) of one student layer's candidates [n], T = 2 / (max K - min K + 1e-6): [n] float64.

    The wider the spread, the colder: near-equal candidates are explored, clear ones followed. Raises ValueError for a
    KL that is not finite.
    """
    kl = _finite(kl.detach().to("cpu", torch.float64))
    temperature = 2.0 / (kl.max() - kl.min() + 1e-6)
    return torch.softmax(-kl / temperature, 0)


def adaptive(kl: Tensor, generator: torch.Generator) -> Match:
    """Algorithm 1: draw each layer in turn from its candidates, behind the last match and inside the search range."""
    return _draw_in_order(kl, draw_probabilities, generator)


def random(kl: Tensor, generator: torch.Generator) -> Match:
    """Algorithm 1 with every candidate as likely as the next: what order and range do without the divergence."""
    return _draw_in_order(kl, lambda row: torch.full_like(row, 1.0 / len(row)), generator)


def argmin(kl: Tensor, generator: torch.Generator) -> Match:
    """Each student layer takes its nearest teacher layer, without order or range; several may take the same."""
    return [int(column) for column in _finite(_matrix(kl)).argmin(1)]


def ordered_argmin(kl: Tensor, generator: torch.Generator) -> Match:
    """The strictly increasing match of least total KL, by dynamic programming."""
    matrix = _matrix(kl)
    ranges = search_ranges(*matrix.shape)
    costs = matrix.new_zeros(matrix.shape[1])
    choices: list[Tensor] = []
    for row, columns in zip(matrix, ranges, strict=True):
        total = torch.full_like(row, torch.inf)
        total[columns.start : columns.stop] = _finite(row[columns.start : columns.stop])
        if choices:
            total[1:] += costs[:-1]  # the layer before lies strictly shallower
        costs, best = total.cummin(0)
        choices.append(best)
    match: list[int] = []
    column = matrix.shape[1] - 1
    for best in reversed(choices):
        match.insert(0, int(best[column]))
        column = match[0] - 1
    return list(match)


def uniform_columns(students: int, teachers: int) -> list[int]:
    """Evenly over the whole teacher: layer i takes floor((i + 1) J / S) - 1, so the last takes the last.

    7 of 20: 1, 4, 7, 10, 13, 16, 19. It is monotone, as J is at least S.
    """
    _check_order(students, teachers)
    return [(i + 1) * teachers // students - 1 for i in range(students)]


def uniform(kl: Tensor, generator: torch.Generator) -> Match:
    """The fixed match of `uniform_columns`, whatever the divergences."""
    return list(uniform_columns(*kl.shape))


def last_only(kl: Tensor, generator: torch.Generator) -> Match:
    """No intermediate layer follows anything: the last layers' KL is all there is."""
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
"""By the name that a recipe gives."""


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
    """On the CPU in float64, so that the same numbers draw the same everywhere."""
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
