"""`python -m pipeline trace`: trace questions through models; in the terminal, as pages, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.shards import write_file
from pipeline.errors import DataError, RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.results.arguments import run_recipe
from pipeline.results.evaluate.changes import AFTER, BEFORE, Result, changes, compared, read_evaluation
from pipeline.results.trace import terminal
from pipeline.results.trace.kept import FOLDER, as_markdown, keep_traces
from pipeline.results.trace.layers import ModelTrace
from pipeline.results.trace.matches import read_matches
from pipeline.results.trace.models import TracedModels, lens_models, run_models, trace_models
from pipeline.results.trace.page import About, Traced, file_name, write_index, write_page
from pipeline.results.trace.questions import Question, question_from_data, question_from_file, questions_from_data
from pipeline.runtime.display.progress import say


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
    done: dict[str, list[ModelTrace | None]] = {}
    try:
        for model, traces in trace_models(models, questions, asked.max_new_tokens, along_expected):
            done[model.name] = traces
    finally:
        if done:
            of_all = zip(*(done[model.name] for model in models.models if model.name in done), strict=True)
            traced = [
                Traced(question, [one for one in traces if one is not None], along_expected)
                for question, traces in zip(questions, of_all, strict=True)
                if None not in traces
            ]
            _give(asked, traced, About(asked.run is None, models.missing, matches))


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
    before, after = _evaluated(asked.run)
    data = asked.data or Path(before["data"])
    keys = [one.key for one in changes(before, after) if one.samples]
    if not keys:
        raise RecipeError(f"--changed: neither student was wrong on any sample of {data}. Try --limit N")
    return [question_from_data(data, key) for key in keys]


def _evaluated(run: Path) -> tuple[Result, Result]:
    found = compared(run, read_evaluation(run))
    if found is None:
        raise RecipeError(
            f"--changed: expected {run / 'evaluation.json'} with {BEFORE} and {AFTER} on the same data, found none. "
            f"To write it: python -m pipeline evaluate --run {run}"
        )
    return found


def _keep(asked: Asked, traced: Sequence[Traced], about: About) -> None:
    """Into the run's folder: pages, what the report shows, and TensorBoard's texts."""
    assert asked.run is not None  # _changed_questions has refused it
    pages = _write_pages(asked.run / FOLDER, traced, about)
    kept = keep_traces(asked.run, pages, _evaluated(asked.run))
    if "tensorboard" in load_recipe(run_recipe(asked.run)).recipe.log_to:
        from pipeline.runtime.loggers.tensorboard import write_texts  # TensorBoard loads slowly

        write_texts(asked.run, "trace", {trace["key"]: as_markdown(trace) for trace in kept})
    say(f"to have them in the report: python -m pipeline report {asked.run}")


def _give(asked: Asked, traced: Sequence[Traced], about: About) -> None:
    if asked.changed:
        _keep(asked, traced, about)
    elif asked.limit is None:
        (one,) = traced
        terminal.show(one.traces, one.question, about.missing, one.along_expected)
        if asked.page is not None:
            asked.page.parent.mkdir(parents=True, exist_ok=True)
            write_page(asked.page, one, about)
            say(f"page: {asked.page}")
    elif asked.page is not None:
        _write_pages(asked.page, traced, about)
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        write_file(asked.json, json.dumps(_as_json(traced, about), indent=1, ensure_ascii=False).encode())
        say(f"JSON: {asked.json}")


def _write_pages(folder: Path, traced: Sequence[Traced], about: About) -> dict[str, Traced]:
    """{a page's file name: what it shows}."""
    if not traced:
        raise DataError("no sample could be traced: the lines above say why")
    folder.mkdir(parents=True, exist_ok=True)
    pages = {file_name(one.question.key, number): one for number, one in enumerate(traced)}
    for name, one in pages.items():
        write_page(folder / name, one, about, index=True)
    write_index(folder / "index.html", pages, about)
    say(f"{len(pages)} pages: {folder / 'index.html'}")
    return pages


def _as_json(traced: Iterable[Traced], about: About) -> dict:
    """As docs/reading_a_trace.md describes it: the traces' own fields, without the pictures."""
    return {
        "logit_lens": about.lens,
        "left_out": list(about.missing),
        "matches": None if about.matches is None else asdict(about.matches),
        "questions": [
            {
                "key": one.question.key,
                "question": one.question.text,
                "expected": one.question.expected,
                "along_expected": one.along_expected,
                "models": [asdict(trace) for trace in one.traces],
            }
            for one in traced
        ],
    }
