"""What structure cannot tell about single model families. One row each, keyed by model_type, with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What is particular to a family."""

    reason: str
    """Why structure cannot tell it."""
    may_be_unused: tuple[str, ...] = ()
    """Endings of the names of parameters that a batch may leave without a gradient though nothing is wrong."""
    parts: dict[str, Any] = field(default_factory=dict)
    """Parts that would be looked for in vain, as a recipe would name them."""


_NEWLINE = Family("only a picture of several tiles has line ends between them", may_be_unused=("model.image_newline",))
_VQ = Family("what reads images is a VQ model, which others have for drawing", parts={"vision": ("model.vqmodel",)})
FAMILIES = {
    "chameleon": _VQ,
    "emu3": _VQ,
    "llava_next": _NEWLINE,
    "llava_next_video": _NEWLINE,
    "llava_onevision": _NEWLINE,
}
REGULAR = Family("its structure tells everything")


def family(model: Any) -> Family:
    """The row of a model's family; most have none, and need none."""
    return FAMILIES.get(model.config.model_type, REGULAR)
