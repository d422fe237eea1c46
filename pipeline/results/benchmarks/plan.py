"""What one evaluation on benchmarks is to do, from its command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.results.arguments import named_models, run_recipe
from pipeline.results.benchmarks.columns import Benchmark, asked_for
from pipeline.results.benchmarks.harness import Settings, this_python
from pipeline.results.benchmarks.model_classes import model_class
from pipeline.results.evaluate.plan import run_models
from pipeline.results.generate import require_model
from pipeline.runtime.display.progress import say
from pipeline.vlm.image_size import NO_LIMITS, PixelLimits

OWN_DATA = ("data", "baseline_data", "against", "max_bad_share", "max_new_tokens")
"""Options of `evaluate` that speak of a shard folder: benchmarks bring their samples and settings along."""


@dataclass(frozen=True)
class Plan:
    """Models, benchmarks and settings."""

    models: Mapping[str, Path]
    benchmarks: Sequence[Benchmark]
    settings: Settings
    output: Path
    """The JSON file of all scores; lmms-eval's own files stand in the folder of its name without .json."""
    processes: int | None
    limits: PixelLimits = NO_LIMITS
    """The run's, of pictures; without a run those of each model's folder hold."""


def make_plan(options: argparse.Namespace) -> Plan:
    """Build a plan. Raises RecipeError, before anything is started, where the command line is not one."""
    for name in OWN_DATA:
        if getattr(options, name) is not None:
            raise RecipeError(
                f"--{name.replace('_', '-')} speaks of a shard folder, and benchmarks bring samples and settings of "
                "their own: leave it out"
            )
    models = named_models(options.model)
    output, limits = options.output, NO_LIMITS
    if options.run is not None:
        recipe = load_recipe(run_recipe(options.run)).recipe
        limits = PixelLimits(recipe.data.min_pixels, recipe.data.max_pixels)
        models = run_models(options.run, recipe, options.without_teacher) | models
        output = output or options.run / "benchmarks.json"
    elif options.without_teacher:
        raise RecipeError("--without-teacher leaves out a run's teacher, and there is no --run")
    if not models:
        raise RecipeError("nothing to evaluate: give --model DIR (again for each model) or --run RUN")
    if output is None:
        raise RecipeError("give --output FILE.json: benchmarks take hours, and what is done is kept there")
    if output.suffix != ".json":
        raise RecipeError(f"--output {output}: expected a name that ends in .json")
    batch_size = options.batch_size or 1
    for folder in models.values():
        require_model(folder)
        if model_class(folder).one_at_a_time and batch_size > 1:
            raise RecipeError(
                f"--batch-size {batch_size}: lmms-eval's class {model_class(folder).name} for {folder} takes samples "
                "one at a time; leave it out"
            )
    _tell_unlimited(models, limits)
    settings = Settings(options.eval_python or this_python(), options.include_path, options.limit, batch_size)
    return Plan(models, asked_for(options.benchmarks), settings, output, options.processes, limits)


def _tell_unlimited(models: Mapping[str, Path], limits: PixelLimits) -> None:
    """Say of which models lmms-eval does not scale pictures to the run's limits, as training and `evaluate` do."""
    classes = {model_class(folder).name for folder in models.values() if not model_class(folder).pixel_limits}
    if limits != NO_LIMITS and classes:
        say(
            f"lmms-eval's class {' and '.join(sorted(classes))} takes no limits on pictures: they are not scaled to "
            "the run's data.max_pixels and data.min_pixels, as they were in training"
        )


def check_judge(benchmarks: Sequence[Benchmark]) -> None:
    """Raise RecipeError where a benchmark needs a judge and no key is set: lmms-eval would guess, or give zeros."""
    judged = [benchmark for benchmark in benchmarks if benchmark.judged]
    key = "AZURE_API_KEY" if os.environ.get("API_TYPE") == "azure" else "OPENAI_API_KEY"
    if judged and not os.environ.get(key):
        raise RecipeError(
            f"{', '.join(benchmark.name for benchmark in judged)}: lmms-eval asks a model behind an API to judge the "
            f"answers, and {key} is not set. Without it MMBench guesses and others count zeros. Set it (and "
            "OPENAI_API_URL, MODEL_VERSION, API_TYPE as lmms-eval documents), or leave these benchmarks out"
        )


def judge() -> str:
    """Which judge lmms-eval is told to ask, as part of a score's identity."""
    return f"{os.environ.get('API_TYPE', 'openai')} {os.environ.get('MODEL_VERSION', 'default')}"
