"""Which field of a recipe makes a step fit: changes that are tried one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe.resolve import SHIPPED
from pipeline.recipe.schema import Recipe
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.micro_batches import deepspeed_of
from pipeline.results.plan.run import Planned, StepPlan
from pipeline.results.plan.sharding import read_zero

ZERO3 = SHIPPED / "ds_configs" / "zero3.json"
OFFLOADING = tuple(
    SHIPPED / "ds_configs" / f"{name}.json" for name in ("zero3_offload_optimizer", "zero3_offload", "zero3_nvme")
)
"""Configs that move a part of a GPU's memory elsewhere, the fastest first. One that is not shipped is not tried."""


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
    every = list(_changes(planned.recipe, step, machine.gpus))
    for change in every:
        if _fits_with(planned, step, machine, [change]):
            return [change]
    together: list[Change] = []
    for change in every:
        together = [*(c for c in together if c.key != change.key), change]
        if len(together) > 1 and _fits_with(planned, step, machine, together):
            return _needed(planned, step, machine, together)
    return None


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


def _changes(recipe: Recipe, step: str, ranks: int) -> Iterator[Change]:
    """Changes that lower a step's memory: those that change no number first, then what is trained and on what."""
    if step == "cache":
        yield from _halvings("cache.batch_tokens", recipe.cache.batch_tokens, 1024)
    else:
        training = getattr(recipe, step)
        if step in ("interact", "reinforce") and not recipe.gradient_checkpointing:
            yield Change("gradient_checkpointing", True, False)
        tokens = training.micro_batch_tokens
        if tokens is None:
            yield from _halvings(f"{step}.micro_batch_size", training.micro_batch_size, 1)
        else:
            yield from _halvings(f"{step}.micro_batch_tokens", tokens, 1024)
        if training.batch_size % ranks:
            yield Change(f"{step}.batch_size", -(-training.batch_size // ranks) * ranks, training.batch_size)
    key, path = deepspeed_of(recipe, step)
    if read_zero(path).stage != 3:
        yield Change(key, ZERO3, path)
    yield from (Change(key, config, path) for config in OFFLOADING if config.is_file() and config != path)
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


def _text(value: Any) -> str:
    if value is None:
        return "left out"
    if isinstance(value, Path):
        return str(value.relative_to(SHIPPED)) if value.is_relative_to(SHIPPED) else str(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
