"""What one process of `answer` is to do, from its command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep.shards import ShardFolder
from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import Data, ModelParts
from pipeline.results.answer.folder import Origin
from pipeline.results.arguments import open_non_empty, run_recipe
from pipeline.results.generate import require_model
from pipeline.results.identity import model_identity, question_identity

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """Every N-th shard, starting with the I-th; written I/N."""

    number: int = 1
    """I, from 1."""
    count: int = 1
    """N."""

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This part of a sequence."""
        return items[self.number - 1 :: self.count]

    def owner(self, index: int) -> Part:
        """The part that has item number `index`, from 0."""
        return Part(index % self.count + 1, self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class Plan:
    """Model, data and settings of one process."""

    model: Path
    data: ShardFolder
    output: Path
    limits: Data
    """The recipe's data section, for its limits on samples; without a run, the defaults."""
    part: Part
    batch_size: int
    max_new_tokens: int
    processes: int | None = None
    """Largest number of processes that hold the model; None: as many as the GPUs have room for, one on a CPU."""
    attention: str = "sdpa"
    """How the model computes its attention, as in the run's recipe."""
    parts: ModelParts | None = None
    """Parts that the run's recipe names, of its teacher."""


def make_plan(
    model: Path | None,
    run: Path | None,
    data: Path | None,
    output: Path,
    max_bad_share: float | None = None,
    part: tuple[int, int] = (1, 1),
    *,
    batch_size: int,
    max_new_tokens: int,
    processes: int | None = None,
) -> Plan:
    """Build a plan from command-line arguments. Raises RecipeError or DataError, before any model is loaded."""
    limits: Data | None = None
    loading: dict[str, Any] = {}
    if run is not None:
        recipe = load_recipe(run_recipe(run)).recipe
        loading = {"attention": recipe.attention, "parts": recipe.teacher.parts if model is None else None}
        limits, model, data = recipe.data, model or recipe.teacher.path, data or recipe.data.train
    if model is None:
        raise RecipeError("no model: give --model DIR, or --run RUN for the run's teacher")
    if data is None:
        raise RecipeError("no data: give --data SHARDS, a shard folder, or --run RUN for its recipe's data.train")
    require_model(model)
    if output.resolve() == data.resolve():
        raise RecipeError(f"--output {output} is the data itself; give another folder")
    limits = limits or Data(train=data)
    if max_bad_share is not None:
        limits = limits.model_copy(update={"max_bad_share": max_bad_share})
    sizes = (batch_size, max_new_tokens, processes)
    return Plan(model, open_non_empty(data), output, limits, Part(*part), *sizes, **loading)


def origin_of(plan: Plan) -> Origin:
    """What the answers are made from.

    Raises CacheError where the model's folder has no safetensors weights or no tokenizer.
    """
    asked = question_identity(plan.data, plan.limits, plan.max_new_tokens)
    return Origin(plan.model, plan.data.path, {**model_identity(plan.model), **asked})
