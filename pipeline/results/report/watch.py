"""`python -m pipeline watch`: a run's report, written again and again while it goes on."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.results.report.facts import RunFacts, read_run
from pipeline.results.report.page import write_report
from pipeline.runtime.display.progress import say


def watch(run: Path, every_s: int) -> None:
    """Write RUN/report.html every so many seconds, as a page that reloads itself, until all steps are done or Ctrl-C.

    The last page does not reload itself. Raises RecipeError if the folder is no run.
    """
    page, facts = run / "report.html", read_run(run)
    say(f"watch: {page}, written again every {every_s} s until the run is done or Ctrl-C; open it in a browser.")
    say("From elsewhere, through ssh: python -m pipeline watch --help says how")
    try:
        while not _is_done(facts):
            write_report(page, [facts], reload_s=every_s)
            time.sleep(every_s)
            facts = read_run(run)
        say(f"watch: the run is done. What is next: {facts.following}")
    except KeyboardInterrupt:
        facts = read_run(run)
    write_report(page, [facts])


def _is_done(facts: RunFacts) -> bool:
    return all(step.state in ("done", "in stage_1") for step in facts.steps)
