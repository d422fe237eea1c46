"""Which field of a recipe makes a step fit, and which makes it faster: changes that are tried one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.recipe.resolve import SHIPPED
from pipeline.recipe.schema import Recipe
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.run import Planned, StepPlan

OFFLOAD = SHIPPED / "ds_configs" / "zero3_offload.json"
ZERO3 = SHIPPED / "ds_configs" / "zero3.json"

LARGEST_MICRO_BATCH = 64
"""Samples; more make no matrix product faster."""


@dataclass(frozen=True)
class Change:
    """A field of the recipe and another value."""

    key: str
    value: Any
    before: Any

    def __str__(self) -> str:
        return f"{self.key}: {_text(self.value)} (now {_text(self.before)})"


def fits(plan: StepPlan, machine: Machine) -> bool:
    """Whether the step can run: its memory fits, and the recipe allows this number of GPUs."""
    return not plan.problem and plan.memory.total <= machine.usable


def remedy(planned: Planned, step: str, machine: Machine) -> list[Change] | None:
    """The fewest changes that make a step fit; None where none of them does.

    First each alone, those that change no number first; then one after the other, together.
    """
    every = list(_changes(planned.recipe, step))
    for change in every:
        if _fits_with(planned, step, machine, [change]):
            return [change]
    together: list[Change] = []
    for change in every:
        together = [*(c for c in together if c.key != change.key), change]
        if len(together) > 1 and _fits_with(planned, step, machine, together):
            return _needed(planned, step, machine, together)
    return None


def largest_micro_batch(planned: Planned, step: str, machine: Machine) -> Change | None:
    """The largest micro_batch_size that fits; None where the recipe's is that. Fewer micro-steps move fewer bytes."""
    if step == "cache":
        return None
    training = getattr(planned.recipe, step)
    key, now = f"{step}.micro_batch_size", training.micro_batch_size
    doubled = [now * 2**n for n in range(1, 7) if now * 2**n <= LARGEST_MICRO_BATCH]
    changes = [Change(key, size, now) for size in doubled if training.batch_size % (size * machine.gpus) == 0]
    return next(reversed(list(takewhile(lambda c: _fits_with(planned, step, machine, [c]), changes))), None)


def applied(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    """The recipe with these changes."""
    for change in changes:
        section, _, field = change.key.rpartition(".")
        if section:
            part = getattr(recipe, section).model_copy(update={field: change.value})
            recipe = recipe.model_copy(update={section: part})
        else:
            recipe = recipe.model_copy(update={field: change.value})
    return recipe


def _changes(recipe: Recipe, step: str) -> Iterator[Change]:
    """Changes that lower a step's memory: those that change no number first, then LoRA, then shorter samples."""
    if step == "cache":
        yield from _halvings("cache.batch_tokens", recipe.cache.batch_tokens, 1024)
    else:
        training = getattr(recipe, step)
        if step in ("interact", "reinforce") and not recipe.gradient_checkpointing:
            yield Change("gradient_checkpointing", True, False)
        yield from _halvings(f"{step}.micro_batch_size", training.micro_batch_size, 1)
    stage = _stage(recipe.deepspeed)
    if stage != 3:
        yield Change("deepspeed", ZERO3, recipe.deepspeed)
    if recipe.deepspeed != OFFLOAD:
        yield Change("deepspeed", OFFLOAD, recipe.deepspeed)
    if step in ("interact", "reinforce") and not getattr(recipe, step).lora_rank:
        yield Change(f"{step}.lora_rank", 64, 0)
    yield from _halvings("data.max_length", recipe.data.max_length, 1024)


def _halvings(key: str, now: int, least: int) -> Iterator[Change]:
    value = now // 2
    while value >= least:
        yield Change(key, value, now)
        value //= 2


def _fits_with(planned: Planned, step: str, machine: Machine, changes: Sequence[Change]) -> bool:
    return fits(planned.with_recipe(applied(planned.recipe, changes)).plan(step, machine), machine)


def _needed(planned: Planned, step: str, machine: Machine, changes: list[Change]) -> list[Change]:
    """Those of the changes without which the step does not fit."""
    for change in list(changes):
        fewer = [other for other in changes if other is not change]
        if fewer and _fits_with(planned, step, machine, fewer):
            changes = fewer
    return changes


def _stage(path: Path) -> int:
    return int(json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))


def _text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value.relative_to(SHIPPED)) if value.is_relative_to(SHIPPED) else str(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
