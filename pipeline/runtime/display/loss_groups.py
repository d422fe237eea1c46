"""A step's losses by kind, and each kind in three numbers: a value a layer is too many to read at 27 layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class LossGroup:
    """The losses of one kind, such as `teacher`: of its layers from the shallowest to the deepest, or a single one."""

    name: str
    layers: tuple[str, ...]
    """The layers, counted from 1; empty for a loss that is of no layer, such as `last`."""
    values: tuple[float, ...]
    """In nat a token, as many as layers; one where there are none."""

    @property
    def mean(self) -> float:
        """Over the layers."""
        return fmean(self.values)

    def text(self) -> str:
        """As in `layer 2 0.512, 26 1.234, mean 0.873`: the shallowest, the deepest, the mean."""
        if len(self.layers) < 2:
            return " ".join([self.name, *self.layers, f"{self.values[0]:.3f}"])
        ends = (f"{self.layers[at]} {self.values[at]:.3f}" for at in (0, -1))
        return f"{self.name} {', '.join(ends)}, mean {self.mean:.3f}"

    def summary(self) -> float | dict[str, float]:
        """The same for a line of JSON."""
        if not self.layers:
            return self.values[0]
        return {"shallowest": self.values[0], "deepest": self.values[-1], "mean": self.mean}


def loss_groups(losses: Mapping[str, float]) -> list[LossGroup]:
    """{"layer/1": 2.0, "layer/2": 1.5, "last": 1.0} -> the groups `layer` and `last`, in order."""
    groups: dict[str, dict[str, float]] = {}
    for name, value in losses.items():
        group, _, layer = name.rpartition("/")
        groups.setdefault(group or name, {})[layer if group else ""] = value
    return [
        LossGroup(name, tuple(layer for layer in found if layer), tuple(found.values()))
        for name, found in groups.items()
    ]
