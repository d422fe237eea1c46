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
    """Weights, in a micro-step."""
    reduced: float
    """Gradients, in a micro-step."""
    once: float
    """Weights or gradients, once an update."""

    def update(self, micro_steps: int) -> float:
        """Bytes in an update of so many micro-steps."""
        return micro_steps * (self.gathered + self.reduced) + self.once


def traffic(frozen: Sequence[Parameter], passed: Sequence[Parameter], zero: Zero, ranks: int, width: int) -> Traffic:
    """frozen: parameters that only a forward uses. passed: those that a backward uses too, trained or not.

    What is still gathered when the backward begins is not gathered again; a forward that gradient checkpointing runs
    again shares what the backward gathers. Below stage 2 gradients are reduced once an update.
    """
    share = (ranks - 1) / ranks
    trained = sum(p.elements for p in passed if p.trained) * width * share
    if zero.stage < 3:
        # Stage 2 reduces gradients to their owners in each micro-step; then the owners' new weights are gathered.
        return Traffic(0.0, trained, trained) if zero.stage == 2 else Traffic(0.0, 0.0, 2 * trained)
    forward = _gathered(frozen, zero) + _gathered(passed, zero)
    backward = max(0, _gathered(passed, zero) - zero.reuse // 2)
    return Traffic((forward + backward) * width * share, trained, 0.0)


def _gathered(parameters: Sequence[Parameter], zero: Zero) -> int:
    return sum(p.elements for p in parameters if p.elements >= zero.persistent)
