"""Which changes of a recipe make a step faster: each is tried, and must fit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from pipeline.recipe.resolve import SHIPPED
from pipeline.results.plan.cuts import Cuts, training_cuts
from pipeline.results.plan.knobs import Change, applied, fits
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.micro_batches import deepspeed_of
from pipeline.results.plan.run import Planned
from pipeline.results.plan.sharding import read_zero

SAVING = 0.05
"""Share of a step's hours; a change that saves less is not named."""

LARGEST_MICRO_BATCH = 64
"""Samples; more make no matrix product faster."""

IN_EACH_NODE = SHIPPED / "ds_configs" / "zero3_hpz.json"
"""Keeps a second copy of the weights in each node, so that frozen ones cross no links between nodes."""


def faster(planned: Planned, step: str, machine: Machine) -> list[Change]:
    """Changes that together save hours and fit, the one that saves most first; empty where none does."""
    found: list[Change] = []
    while change := _best(planned, step, machine, {change.key for change in found}):
        found.append(change)
        planned = planned.with_recipe(applied(planned.recipe, [change]))
    return found


def token_budget(planned: Planned, step: str, machine: Machine) -> Change | None:
    """micro_batch_tokens: data.max_length, doubled as long as it fits and an update has fewer micro-steps for it.

    None where not even data.max_length fits.
    """
    key, now = f"{step}.micro_batch_tokens", getattr(planned.recipe, step).micro_batch_tokens
    best, steps = None, float("inf")
    for doublings in range(8):
        change = Change(key, planned.recipe.data.max_length * 2**doublings, now)
        changed = _with(planned, change)
        fewer = _cuts(changed, step, machine).micro_steps
        if fewer >= steps or not fits(changed.plan(step, machine), machine):
            break
        best, steps = change, fewer
    return best


def largest_micro_batch(planned: Planned, step: str, machine: Machine) -> Change | None:
    """The largest micro_batch_size that fits; None where the recipe's is that. Fewer micro-steps move fewer bytes."""
    training = getattr(planned.recipe, step)
    if training.micro_batch_tokens is not None:
        return None
    key, now = f"{step}.micro_batch_size", training.micro_batch_size
    doubled = [now * 2**n for n in range(1, 7) if now * 2**n <= LARGEST_MICRO_BATCH]
    changes = [Change(key, size, now) for size in doubled if training.batch_size % (size * machine.gpus) == 0]
    fitting = takewhile(lambda change: fits(_with(planned, change).plan(step, machine), machine), changes)
    return next(reversed(list(fitting)), None)


def _best(planned: Planned, step: str, machine: Machine, taken: set[str]) -> Change | None:
    """Of one change more, the one that takes least time."""
    limit = planned.plan(step, machine).time.seconds * (1 - SAVING)
    hours = {}
    for change in _changes(planned, step, machine):
        plan = _with(planned, change).plan(step, machine)
        if change.key not in taken and fits(plan, machine) and plan.time.seconds <= limit:
            hours[change] = plan.time.seconds
    return min(hours, key=lambda change: hours[change], default=None)


def _changes(planned: Planned, step: str, machine: Machine) -> Iterator[Change]:
    if step == "cache":
        tokens = planned.recipe.cache.batch_tokens
        yield from (Change("cache.batch_tokens", other, tokens) for other in (tokens * 2, tokens // 2))
    else:
        proposed = token_budget(planned, step, machine), largest_micro_batch(planned, step, machine)
        yield from (change for change in proposed if change is not None)
    key, path = deepspeed_of(planned.recipe, step)
    zero, group = read_zero(path), read_zero(IN_EACH_NODE).group
    over_nodes = machine.nodes > 1 and machine.gpus_per_node % group == 0
    if zero.stage == 3 and zero.group == 1 and over_nodes and _mostly_frozen(planned, step):
        yield Change(key, IN_EACH_NODE, path)


def _mostly_frozen(planned: Planned, step: str) -> bool:
    frozen, passed = planned.parameters(step)
    sizes = [(p.elements, p.trained) for p in (*frozen, *passed)]
    return sum(size for size, trained in sizes if trained) < sum(size for size, trained in sizes if not trained)


def _with(planned: Planned, change: Change) -> Planned:
    return planned.with_recipe(applied(planned.recipe, [change]))


def _cuts(planned: Planned, step: str, machine: Machine) -> Cuts:
    return training_cuts(getattr(planned.recipe, step), machine.gpus, planned.samples_of(step).lengths)
