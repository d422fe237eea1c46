"""Presets: the values of a recipe for one kind of data, by name. docs/evidence.md has the measurements behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RecipeError


@dataclass(frozen=True)
class Preset:
    """A named choice of how stage 2 trains."""

    text: str
    """What it does, as `python -m pipeline status` shows it."""
    values: Mapping[str, object]
    """Flat keys of the recipe and their values, where neither the recipe nor the command line sets them."""

    @property
    def to_the_end(self) -> bool:
        """Whether stage 2 ends with interaction, without finetuning."""
        return self.values.get("reinforce.steps") == 0


PRESETS: Mapping[str, Preset] = {
    "paper": Preset("the paper's order: interaction, then finetuning on the responses", {}),
    "wrong_answers": Preset(
        "interaction to the end, no finetuning: the given answers are not trained on", {"reinforce.steps": 0}
    ),
    "clean_answers": Preset(
        "interaction to the end with cross-entropy on the responses beside it, no finetuning after it",
        {"reinforce.steps": 0, "interact.cross_entropy_weight": 1.0},
    ),
    "few_updates": Preset(
        "interaction to the end with the last layer alone, no finetuning: following layers takes more updates",
        {"reinforce.steps": 0, "interact.matching": "last_only"},
    ),
}
"""Presets by their names in a recipe."""


def preset_values(values: Mapping[str, Any]) -> dict[str, object]:
    """Flat keys and values that a recipe's preset adds. Unknown names give none: validation reports them.

    A preset that ends with interaction needs no reinforce section: its batch size is interact's, and is not used.
    """
    preset = PRESETS.get(str(values.get("preset")))
    if preset is None:
        return {}
    added = dict(preset.values)
    interact = values.get("interact")
    if preset.to_the_end and isinstance(interact, dict) and "batch_size" in interact:
        added["reinforce.batch_size"] = interact["batch_size"]
    return added


def check_preset(name: str, steps: int | None) -> None:
    """Raise RecipeError where a recipe finetunes (steps: reinforce.steps) though its preset does not."""
    if PRESETS[name].to_the_end and steps != 0:
        raise RecipeError(
            f"preset: {name} is {PRESETS[name].text}, but the recipe sets reinforce.steps or reinforce.epochs. Leave "
            "the reinforce section out, or set preset: paper"
        )
