"""`python -m pipeline report`: read runs' folders and write the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.results.report.facts import read_run
from pipeline.results.report.page import write_report
from pipeline.runtime.display.progress import say

REPORT = "report.html"
"""The report of one run, in its folder."""


def keep_report(run: Path) -> None:
    """Write RUN/report.html; what goes wrong is a warning, for no training should end over a page."""
    try:
        write_report(run / REPORT, [read_run(run)])
    except Exception as error:
        say(
            f"warning: {run / REPORT} was not written: {type(error).__name__}: {error}. The run goes on. To write it: "
            f"python -m pipeline report {run} (report: false in the recipe leaves it out)"
        )


def run(folders: Sequence[Path], output: Path | None) -> None:
    """Write the report of one run into its folder, or of several to `output`. Raises RecipeError."""
    if len({folder.resolve().name for folder in folders}) < len(folders):
        raise RecipeError("two of the runs have one name: a report tells runs apart by their folders' names")
    if output is None:
        if len(folders) > 1:
            raise RecipeError("a report of several runs needs --output FILE")
        output = folders[0] / REPORT
    write_report(output, [read_run(folder) for folder in folders])
    say(f"report: {output}")
