"""What one evaluation is to do, from its command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.shards import ShardFolder
from data_prep.storage import is_file
from pipeline.commands import train_command
from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import Data, ModelParts, Recipe
from pipeline.results.arguments import evenly_spaced, named_models, open_non_empty, run_recipe
from pipeline.results.generate import require_model
from pipeline.runtime.display.progress import say

QUESTION_ONLY = "question_only"
"""The baseline's name in the results."""


@dataclass(frozen=True)
class Plan:
    """Models, data and settings of one evaluation."""

    models: Mapping[str, Path]
    data: ShardFolder
    limit: int | None
    batch_size: int
    max_new_tokens: int
    limits: Data
    """The recipe's data section, for its limits on samples; without a run, the defaults."""
    baseline: ShardFolder | None = None
    """Data that the question-only baseline counts."""
    output: Path | None = None
    against: str | None = None
    """Name of the model that the others are compared with."""
    attention: str = "sdpa"
    """How the models compute their attention, as in the run's recipe."""
    parts: Mapping[str, ModelParts] = field(default_factory=dict)
    """Parts that the run's recipe names, of its models by their names."""
    processes: int | None = None
    """Largest number of processes that hold a model; None: as many as the GPUs have room for, one on a CPU."""

    def indices(self) -> Sequence[int]:
        """Indices of the samples that are read: with a limit, at equal distances over the data."""
        return evenly_spaced(len(self.data), self.limit)

    def samples(self) -> str:
        """Which samples these are, for a result's identity."""
        count = len(self.indices())
        return f"{count} evenly spaced" if count < len(self.data) else str(count)


def make_plan(
    models: Sequence[str],
    run: Path | None,
    data: Path | None,
    baseline: Path | None,
    output: Path | None,
    max_bad_share: float | None = None,
    against: str | None = None,
    without_teacher: bool = False,
    **sizes: Any,
) -> Plan:
    """Build a plan from command-line arguments. Raises RecipeError or DataError, before any model is loaded."""
    named = named_models(models)
    if without_teacher and run is None:
        raise RecipeError("--without-teacher leaves out a run's teacher, and there is no --run")
    limits: Data | None = None
    if run is not None:
        recipe = load_recipe(run_recipe(run)).recipe
        limits, sizes["attention"] = recipe.data, recipe.attention
        of_run = run_models(run, recipe, without_teacher)
        of_role = {
            name: recipe.teacher if name == "teacher" else recipe.student for name in of_run.keys() - named.keys()
        }
        sizes["parts"] = {name: model.parts for name, model in of_role.items()}
        named = of_run | named
        data = data or recipe.data.held_out
        baseline, output = baseline or recipe.data.train, output or run / "evaluation.json"
    if not named:
        raise RecipeError("nothing to evaluate: give --model DIR (again for each model) or --run RUN")
    if data is None:
        raise RecipeError("no data: give --data SHARDS, a shard folder, or set data.held_out in the run's recipe")
    if QUESTION_ONLY in named:
        raise RecipeError(f"a model cannot be named {QUESTION_ONLY}: that is the baseline's name in the results")
    if against is not None and against not in named:
        raise RecipeError(f"--against {against}: no model of that name; the models are {', '.join(named)}")
    for folder in named.values():
        require_model(folder)
    sibling = data.parent / "train"
    if baseline is None and data.name != "train" and is_file(sibling / "manifest.json"):
        baseline = sibling
    baseline_data = None if baseline is None else open_non_empty(baseline)
    limits = limits or Data(train=data)
    if max_bad_share is not None:
        limits = limits.model_copy(update={"max_bad_share": max_bad_share})
    return Plan(
        named, open_non_empty(data), limits=limits, baseline=baseline_data, output=output, against=against, **sizes
    )


def run_models(run: Path, recipe: Recipe, without_teacher: bool) -> dict[str, Path]:
    """{name: folder} of a run's teacher, untouched student and, once there is one, distilled student."""
    named = {} if without_teacher else {"teacher": recipe.teacher.path}
    named["untouched"] = recipe.student.path
    if (run / "student").is_dir():
        return named | {"distilled": run / "student"}
    make = train_command(2, run / "recipe.yaml")
    say(f"distilled is left out: no {run}/student; {make}")
    return named
