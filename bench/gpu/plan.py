"""Which checks there are, in which order, and how long each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.gpu.shapes import shapes_of


@dataclass(frozen=True)
class Check:
    """One check."""

    name: str
    """A module of bench/gpu/checks, and after a colon what it is to check."""
    limit_s: float
    """It is stopped after so long."""
    needs_s: float
    """It is left out where less time is left. An estimate, for no card has run it yet."""


SLOWER_ON_CPU = 3
"""Factor on the limits of the twin, whose cores may have other work."""


def checks_for(device: str, only: Sequence[str] | None = None) -> list[list[Check]]:
    """Groups in running order. The checks of a group run side by side, for they measure no speed. only: their names.

    Raises ValueError for a name that is no check.
    """
    together = [Check("tests", 200, 20), Check("prepare", 240, 40), Check("demo", 240, 60)]
    groups = [[Check("card", 90, 10)], together, [Check("losses", 100, 30)]]
    groups += [[Check(f"steps:{pair}", 200, 45)] for pair in shapes_of(device).pairs]
    if device == "cpu":
        groups = [[replace(check, limit_s=SLOWER_ON_CPU * check.limit_s) for check in group] for group in groups]
    if only is None:
        return groups
    names = [check.name for group in groups for check in group]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"--only {unknown[0]}: expected some of {', '.join(names)}")
    return [kept for group in groups if (kept := [check for check in group if check.name in only])]
