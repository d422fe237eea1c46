"""Bytes that a rank receives over the links between GPUs in an update: gathered weights and reduced gradients.

With rings a rank receives (n - 1) / n of a tensor that n ranks gather or reduce-scatter, and twice that in an
all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.results.plan.models import Parameter
from pipeline.results.plan.sharding import Zero


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives."""

    gathered: float
    """Weights from all ranks, in a micro-step."""
    inside: float
    """Weights from the second copy that the ranks of a node hold, in a micro-step; they cross no node."""
    reduced: float
    """Gradients, in a micro-step."""
    once: float
    """Weights and gradients, once an update."""

    def update(self, micro_steps: float) -> float:
        """Bytes over the links between nodes in an update of so many micro-steps."""
        return micro_steps * (self.gathered + self.reduced) + self.once


def traffic(frozen: Sequence[Parameter], passed: Sequence[Parameter], zero: Zero, ranks: int, width: int) -> Traffic:
    """frozen: parameters that only a forward uses. passed: those that a backward uses too, trained or not.

    What is still gathered when the backward begins is not gathered again; a forward that gradient checkpointing runs
    again shares what the backward gathers. Below stage 2 gradients are reduced once an update.
    """
    share = (ranks - 1) / ranks
    trained = sum(p.elements for p in passed if p.trained)
    reduced, new_weights = trained * zero.reduce_bytes * share, trained * width * share
    if zero.stage < 3:  # the owners of shards send their new weights; without ZeRO all ranks reduce all gradients
        back = new_weights if zero.stage else reduced
        return Traffic(0.0, 0.0, reduced, back) if zero.stage == 2 else Traffic(0.0, 0.0, 0.0, reduced + back)
    gathered, inside = _gathered(frozen, passed, zero)
    return Traffic(gathered * width * share, inside * width * (zero.group - 1) / zero.group, reduced, 0.0)


def _gathered(frozen: Sequence[Parameter], passed: Sequence[Parameter], zero: Zero) -> tuple[int, int]:
    """Elements from all ranks, and from the node's second copy, which frozen weights never leave."""

    def large(parameters: Sequence[Parameter]) -> int:
        return sum(p.elements for p in parameters if p.elements >= zero.persistent)

    backward = max(0, large(passed) - zero.reuse // 2)
    if zero.group == 1:
        return large(frozen) + large(passed) + backward, 0
    moved = large([p for p in passed if p.trained])
    return moved, large(frozen) + large(passed) - moved + backward
