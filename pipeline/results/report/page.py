"""A run's report, or that of several side by side, as one page that opens offline."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data_prep.shards import write_file
from pipeline.results.cache.info import MEASURES
from pipeline.results.environment import environment
from pipeline.results.evaluate.changes import Change, changes, compared
from pipeline.results.evaluate.comparison import perplexity_note, sentences
from pipeline.results.pages.render import render
from pipeline.results.pages.svg import Views
from pipeline.results.report.curves import curves
from pipeline.results.report.facts import RunFacts, bytes_text, differences
from pipeline.results.report.figures import kl_maps, match_maps, shares
from pipeline.results.status import losses_of_line
from pipeline.results.trace.figure import match_figure
from pipeline.results.trace.kept import FOLDER, kept_traces
from pipeline.results.trace.matches import has_matches, read_matches
from pipeline.runtime.folder import HELD_OUT

SPEED = {"tokens_per_s": "tokens/s", "data_wait": "share of the time", "real_share": "share of the tokens"}
"""What is shown of a step's speed, with its unit."""


@dataclass(frozen=True)
class Section:
    """Figures under a heading."""

    title: str
    text: str
    figures: Sequence[Views]


@dataclass(frozen=True)
class Changed:
    """Answers that changed from the untouched to a run's distilled student."""

    ways: Sequence[Change]
    traces: Sequence[tuple[Change, Mapping[str, Any]]]
    """Those of the samples that the ways name, as far as they are traced."""
    pages: str
    """Address of the folder of the traces' pages, as seen from the report."""
    command: str
    """What traces those that are not; empty where all are."""


def write_report(path: Path, runs: Sequence[RunFacts], reload_s: int | None = None) -> None:
    """Write the page, whole or not at all. reload_s: seconds after which a browser reads it again; None: never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluated = _evaluations(runs)
    page = render(
        "report.html",
        runs=runs,
        reload_s=reload_s,
        differences=differences(runs) if len(runs) > 1 else [],
        together=list(_together(runs)) if len(runs) > 1 else [],
        sections={run.name: list(_sections(run)) for run in runs},
        evaluations=evaluated,
        comparisons=_comparisons(runs),
        changed={run.name: _changed(run, path) for run in runs},
        measures=MEASURES,
        bytes_text=bytes_text,
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        project=environment()["project"],
    )
    write_file(path, page)


def loss_series(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Loss -> (updates, values)."""
    names = dict.fromkeys(name for line in lines for name in losses_of_line(line))  # a skipped update has none
    return {name: _series(lines, name) for name in names}


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    found = [(line["update"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    return [update for update, _ in found], [value for _, value in found]


def _sections(run: RunFacts) -> Iterator[Section]:
    for step, lines in run.lines.items():
        if not lines:
            continue
        figures = [curves(series, title, "nat a token") for title, series in _grouped(step, loss_series(lines))]
        if (right := _series(lines, HELD_OUT[1]))[0]:
            figures.append(curves({"exact match": right}, f"{step}, held-out exact match", "share"))
        yield Section(f"{step}: losses", f"{len(lines)} updates so far.", figures)
    if lines := [line for line in run.lines["interact"] if has_matches(line)]:
        yield _matching(run, lines)
    if speeds := list(_speeds(run)):
        yield Section("Speed", "Of one rank's clock; waiting for data is part of each update.", speeds)


def _grouped(step: str, series: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Losses of one kind in one figure: `teacher/3` belongs to `teacher`."""
    groups: dict[str, dict[str, Any]] = {}
    for name, values in series.items():
        group, slash, layer = name.rpartition("/")
        groups.setdefault(group if slash else "", {})[f"layer {layer}" if slash else name] = values
    for group, members in groups.items():
        yield f"{step}, {group or 'whole model'}", members


def _matching(run: RunFacts, lines: Sequence[Mapping[str, Any]]) -> Section:
    students = sorted(int(name.removeprefix("layer/")) for name in lines[-1] if name.startswith("layer/"))
    figures = list(match_maps(lines, students))
    if (matches := read_matches(run.folder)) is not None:
        figures.append(Views(match_figure(matches)))
    figures += kl_maps(lines)
    if drawn := [line for line in lines if line.get("draw_entropy")]:
        updates = [line["update"] for line in drawn]
        entropies = {
            f"student {student}": (updates, [line["draw_entropy"][place] for line in drawn])
            for place, student in enumerate(students)
        }
        figures.append(curves(entropies, "entropy of the draw", "nat"))
    text = (
        "Which teacher layer each student layer followed. An entropy of ln n says that a draw among n layers took "
        "no notice of their KL; 0 that it had no choice."
    )
    return Section("Matching", text, figures)


def _speeds(run: RunFacts) -> Iterator[Views]:
    for name, unit in SPEED.items():
        series = {step: _series(lines, name) for step, lines in run.lines.items() if lines}
        series = {step: found for step, found in series.items() if found[0]}
        if series:
            yield curves(series, name.replace("_", " ").replace("per s", "per second"), unit)
    if run.hours:
        yield shares(run.hours, "time in updates", "hours")


def _together(runs: Sequence[RunFacts]) -> Iterator[Section]:
    """Each step's losses, one figure a loss, a line a run."""
    for step in runs[0].lines:
        series = {run.name: loss_series(run.lines[step]) for run in runs if run.lines[step]}
        if len(series) < 2:
            continue
        names = dict.fromkeys(name for found in series.values() for name in found)
        of_all = {name: {run: found[name] for run, found in series.items() if name in found} for name in names}
        figures = [curves(lines, f"{step}, {name}", "nat a token") for name, lines in of_all.items()]
        right = {run.name: _series(run.lines[step], HELD_OUT[1]) for run in runs}
        if right := {name: found for name, found in right.items() if found[0]}:
            figures.append(curves(right, f"{step}, held-out exact match", "share"))
        yield Section(f"{step}, several runs", "", figures)


def _evaluations(runs: Sequence[RunFacts]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(run, model, its results)."""
    return [(run.name, model, results) for run in runs for model, results in run.evaluation.items()]


def _changed(run: RunFacts, report: Path) -> Changed | None:
    """None where the two students were not evaluated on the same data."""
    results = compared(run.folder, run.evaluation)
    if results is None:
        return None
    ways, kept = changes(*results), kept_traces(run.folder, results)
    missing = any(one.samples and one.key not in kept for one in ways)
    command = shlex.join(["python", "-m", "pipeline", "trace", "--run", str(run.folder), "--changed"])
    pages = quote(os.path.relpath(run.folder / FOLDER, report.parent))
    return Changed(ways, [(one, kept[one.key]) for one in ways if one.key in kept], pages, command if missing else "")


def _comparisons(runs: Sequence[RunFacts]) -> list[str]:
    """Sentences that compare models on the same samples: with `untouched`, and the runs' distilled students."""
    found = []
    for run in runs:
        if "untouched" in run.evaluation:
            found += [f"{run.name}: {line}" for line in sentences(run.evaluation, "untouched")]
        if note := perplexity_note(run.evaluation):
            found.append(f"{run.name}: {note}")
    distilled = {run.name: run.evaluation["distilled"] for run in runs if "distilled" in run.evaluation}
    if len(distilled) > 1:
        found += sentences(distilled, next(iter(distilled)))
    return found
