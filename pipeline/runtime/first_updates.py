"""After the first updates of a step: did each tensor that trains get a gradient, and did each frozen one stay?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.runtime.engine import Engine
from pipeline.runtime.ranks import sum_over_ranks

# Two updates, not one: a verb-FFN's W_down starts at zero and passes its siblings no gradient in the first.
CHECK_AFTER = 2


class TrainableMismatch(RuntimeError):
    """A trained tensor got no gradient, or a frozen one moved: the run would waste its days."""


class FirstUpdatesCheck:
    """Looks for each trained parameter's gradient in AdamW's first moment, and compares the bits of frozen ones.

    The trained ones' bits say less: a step of a small learning rate is rounded away (1 - 1e-8 is 1 in float32), and
    weight decay moves also what has no gradient.

    Tensors that only images reach are judged after as many updates with images, which may be later or never.
    """

    def __init__(self, engine: Engine, may_be_unused: Sequence[str] = (), image_parts: Sequence[str] = ()):
        """may_be_unused: endings of parameter names that a batch may leave without a gradient.

        image_parts: names of submodules that text alone does not reach, such as "model.visual".
        """
        self.engine, self.may_be_unused, self.image_parts = engine, tuple(may_be_unused), tuple(image_parts)
        self.before = engine.fingerprints()
        self.names = list(dict.fromkeys([name for name, _ in engine.module.named_parameters()] + list(self.before)))
        self._updates = self._with_images = 0

    def after_update(self, images: int) -> None:
        """Count an update whose global batch had so many images, and check what can be judged now.

        Raises TrainableMismatch naming the tensors. All ranks must call, and all decide alike.
        """
        self._updates += 1
        self._with_images += images > 0
        if self._updates == CHECK_AFTER:
            self._check([name for name in self.names if not self._needs_images(name)])
        if self._with_images == CHECK_AFTER and images > 0:
            self._check([name for name in self.names if self._needs_images(name)])

    def never_used(self) -> list[str]:
        """Trained tensors that no image has reached so far."""
        return [] if self._with_images else sorted(filter(self._needs_images, self._trained()))

    def _needs_images(self, name: str) -> bool:
        return any(f".{part}." in f".{name}" for part in self.image_parts)

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.engine.module.named_parameters() if parameter.requires_grad}

    def _check(self, names: list[str]) -> None:
        trained, reached, after = self._trained(), self.engine.with_gradient(), self.engine.fingerprints()
        changed = [name in reached if name in trained else after[name] != self.before[name] for name in names]
        counts = sum_over_ranks(torch.tensor(changed, dtype=torch.int32, device=self.engine.device))
        touched = dict(zip(names, (counts > 0).tolist(), strict=True))
        still = [name for name in names if name in trained and not touched[name]]
        still = [name for name in still if not name.endswith(self.may_be_unused)] if self.may_be_unused else still
        drifted = [name for name in names if name not in trained and touched[name]]
        if still or drifted:
            of = len(trained.intersection(names))
            raise TrainableMismatch(
                f"after {CHECK_AFTER} updates {len(still)} of {of} trained tensors have had no gradient{_first(still)} "
                f"and {len(drifted)} of {len(names) - of} frozen ones have moved{_first(drifted)}. Such a part has no "
                "part in the loss, or its gradient is lost. Leave out of train what need not (projector, vision), or "
                "report this with the recipe"
            )


def _first(names: list[str]) -> str:
    return f" (first: {', '.join(names[:5])})" if names else ""
