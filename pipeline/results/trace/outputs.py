"""What a trace leaves: its files, whole after each model, and what the terminal shows at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.shards import write_file
from pipeline.errors import DataError, RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.results.arguments import run_recipe
from pipeline.results.evaluate.changes import AFTER, BEFORE, Result, compared, read_evaluation
from pipeline.results.trace import terminal
from pipeline.results.trace.kept import FOLDER, as_markdown, keep_traces
from pipeline.results.trace.page import About, Traced, file_name, write_index, write_page
from pipeline.runtime.display.progress import say


@dataclass
class Outputs:
    """Where traces go, and what was written last.

    While a large model loads, the job may be killed or its time be over: what the smaller ones said is written by then.
    """

    about: About
    page: Path | None
    """A page, or of many questions their folder."""
    json: Path | None
    many: bool
    """Whether there may be many questions."""
    changed_of: Path | None
    """The run that keeps the traces of its changed answers."""
    _traced: Sequence[Traced] | None = None
    _pages: Mapping[str, Traced] = field(default_factory=dict)
    _kept: Sequence[Mapping[str, Any]] = ()

    def write(self, traced: Sequence[Traced]) -> None:
        """Write all files anew. traced: of the models so far."""
        if self.changed_of is not None:
            self._write_pages(self.changed_of / FOLDER, traced)
            self._kept = keep_traces(self.changed_of, self._pages, evaluated(self.changed_of))
        elif self.page is not None and self.many:
            self._write_pages(self.page, traced)
        elif self.page is not None:
            self.page.parent.mkdir(parents=True, exist_ok=True)
            write_page(self.page, traced[0], self.about)
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(_as_json(traced, self.about), indent=1, ensure_ascii=False)
            write_file(self.json, content.encode())
        self._traced = traced

    def tell(self) -> None:
        """Show what was written last, or say where it is; nothing where nothing was."""
        if self._traced is None:
            return
        if not self.many:
            (one,) = self._traced
            terminal.show(one.traces, one.question, self.about.missing, one.along_expected)
        if self._pages:
            folder = self.page if self.changed_of is None else self.changed_of / FOLDER
            say(f"{len(self._pages)} pages: {folder}/index.html")
        elif self.page is not None:
            say(f"page: {self.page}")
        if self.changed_of is not None:
            self._tell_run(self.changed_of)
        if self.json is not None:
            say(f"JSON: {self.json}")

    def _tell_run(self, run: Path) -> None:
        if "tensorboard" in load_recipe(run_recipe(run)).recipe.log_to:
            from pipeline.runtime.loggers.tensorboard import write_texts  # TensorBoard loads slowly

            write_texts(run, "trace", {trace["key"]: as_markdown(trace) for trace in self._kept})
        say(f"to have them in the report: python -m pipeline report {run}")

    def _write_pages(self, folder: Path, traced: Sequence[Traced]) -> None:
        if not traced:
            raise DataError("no sample could be traced: the lines above say why")
        folder.mkdir(parents=True, exist_ok=True)
        pages = {file_name(one.question.key, number): one for number, one in enumerate(traced)}
        for name, one in pages.items():
            write_page(folder / name, one, self.about, index=True)
        write_index(folder / "index.html", pages, self.about)
        for name in self._pages.keys() - pages.keys():  # of samples that the newest model could not take
            (folder / name).unlink(missing_ok=True)
        self._pages = pages


def evaluated(run: Path) -> tuple[Result, Result]:
    """The run's evaluation before and after. Raises RecipeError where it has none of both on the same data."""
    found = compared(run, read_evaluation(run))
    if found is None:
        raise RecipeError(
            f"--changed: expected {run / 'evaluation.json'} with {BEFORE} and {AFTER} on the same data, found none. "
            f"To write it: python -m pipeline evaluate --run {run}"
        )
    return found


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
