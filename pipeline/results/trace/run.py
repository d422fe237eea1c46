"""`python -m pipeline trace`: trace questions through models; in the terminal, as pages, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.results.arguments import run_recipe
from pipeline.results.evaluate.changes import changes
from pipeline.results.trace.layers import ModelTrace
from pipeline.results.trace.matches import read_matches
from pipeline.results.trace.models import TracedModels, lens_models, run_models, trace_models
from pipeline.results.trace.outputs import Outputs, evaluated
from pipeline.results.trace.page import About, Traced
from pipeline.results.trace.questions import Question, question_from_data, question_from_file, questions_from_data


@dataclass(frozen=True)
class Asked:
    """The command line."""

    run: Path | None
    models: Sequence[str]
    """[NAME=]DIR of models without a run."""
    image: Path | None
    question: str | None
    answer: str | None
    sample: str | None
    limit: int | None
    changed: bool
    data: Path | None
    max_new_tokens: int
    without_teacher: bool
    page: Path | None
    json: Path | None


def run(asked: Asked) -> None:
    """Trace what is asked for, and print or write it.

    Where a model cannot be traced, or it takes too long, what the smaller ones before it said is given all the same.
    Raises RecipeError for a command line that does not say what to trace, before a model is loaded.
    """
    models, data, matches = _models(asked)
    questions = _questions(asked, data)
    # Many questions, and those whose answer was given, are compared along one answer for all models.
    along_expected = asked.limit is not None or asked.changed or asked.answer is not None
    about, names = About(asked.run is None, models.missing, matches), [model.name for model in models.models]
    many = asked.changed or asked.limit is not None
    outputs = Outputs(about, asked.page, asked.json, many, asked.run if asked.changed else None)
    done: dict[str, list[ModelTrace | None]] = {}
    try:
        for model, traces in trace_models(models, questions, asked.max_new_tokens, along_expected):
            done[model.name] = traces
            outputs.write(_traced(names, done, questions, along_expected))
    finally:
        outputs.tell()


def _traced(
    names: Sequence[str],
    done: Mapping[str, Sequence[ModelTrace | None]],
    questions: Sequence[Question],
    along_expected: bool,
) -> list[Traced]:
    """The questions that every model so far could take. names: the models in the order in which they are shown."""
    of_all = zip(*(done[name] for name in names if name in done), strict=True)
    return [
        Traced(question, [one for one in traces if one is not None], along_expected)
        for question, traces in zip(questions, of_all, strict=True)
        if None not in traces
    ]


def _models(asked: Asked):
    """What to trace, the data that samples come from, and the run's matches."""
    if (asked.run is None) == (not asked.models):
        raise RecipeError("give what to trace: --run RUN, or --model [NAME=]DIR for a model without a run")
    if asked.run is None:
        found: TracedModels = lens_models(asked.models, asked.data)
        return found, asked.data, None
    recipe = load_recipe(run_recipe(asked.run)).recipe
    found = run_models(asked.run, recipe, asked.without_teacher)
    return found, asked.data or recipe.data.held_out, read_matches(asked.run)


def _questions(asked: Asked, data: Path | None) -> list[Question]:
    about_image = asked.image is not None and asked.question is not None
    ways = [about_image, asked.sample is not None, asked.limit is not None, asked.changed]
    if sum(ways) != 1 or (not about_image and (asked.image or asked.question or asked.answer)):
        raise RecipeError(
            "give a question: --image FILE and --question TEXT (and --answer TEXT), --sample KEY, --limit N for many, "
            "or --changed for those whose answers changed"
        )
    if asked.changed:
        return _changed_questions(asked)
    if asked.limit is not None:
        if asked.page is None:
            raise RecipeError("--limit N writes a page for each question: name their folder with --page FOLDER")
        return questions_from_data(data, asked.limit)
    if asked.sample is not None:
        return [question_from_data(data, asked.sample)]
    return [question_from_file(asked.image, asked.question, asked.answer)]  # type: ignore[arg-type]  # about_image


def _changed_questions(asked: Asked) -> list[Question]:
    """One sample for each way in which answers changed."""
    if asked.run is None or asked.page is not None:
        raise RecipeError("--changed is for --run RUN, and writes into RUN/traces: leave out --model and --page")
    before, after = evaluated(asked.run)
    data = asked.data or Path(before["data"])
    keys = [one.key for one in changes(before, after) if one.samples]
    if not keys:
        raise RecipeError(f"--changed: neither student was wrong on any sample of {data}. Try --limit N")
    return [question_from_data(data, key) for key in keys]
