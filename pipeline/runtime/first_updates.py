"""After the first updates of a run: did each tensor that trains move, and did each frozen one stay?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.runtime.engine import Engine
from pipeline.runtime.ranks import sum_over_ranks

# Two updates, not one: a verb-FFN's W_down starts at zero and passes its siblings no gradient in the first.
CHECK_AFTER = 2


class TrainableMismatch(RuntimeError):
    """A trained tensor stood still, or a frozen one moved: the run would waste its days."""


class FirstUpdatesCheck:
    """Compares every parameter's bits before and after the first updates."""

    def __init__(self, engine: Engine, may_be_unused: Sequence[str] = ()):
        """may_be_unused: endings of names that a batch may leave without a gradient."""
        self.engine, self.may_be_unused = engine, tuple(may_be_unused)
        self.before = engine.fingerprints()

    def check(self) -> None:
        """Raise TrainableMismatch naming the tensors. All ranks must call, and all decide alike."""
        after = self.engine.fingerprints()
        names = list(after)
        changed = torch.tensor([after[n] != self.before[n] for n in names], dtype=torch.int32)
        moved = sum_over_ranks(changed.to(self.engine.device)).cpu() > 0
        trained = {name for name, p in self.engine.module.named_parameters() if p.requires_grad}
        still = [n for n, m in zip(names, moved, strict=True) if n in trained and not m]
        still = [n for n in still if not n.endswith(self.may_be_unused)] if self.may_be_unused else still
        drifted = [n for n, m in zip(names, moved, strict=True) if n not in trained and m]
        if still or drifted:
            raise TrainableMismatch(
                f"after {CHECK_AFTER} updates {len(still)} of {len(trained)} trained tensors have not moved"
                f"{_first(still)} and {len(drifted)} of {len(names) - len(trained)} frozen ones have{_first(drifted)}. "
                "Such a part takes no part in the loss (freeze it, or give data that uses it), or its gradient is lost"
            )


def _first(names: list[str]) -> str:
    return f" (first: {', '.join(names[:5])})" if names else ""
