"""trackio: RUN/trackio, unless TRACKIO_DIR says otherwise; on this machine unless TRACKIO_SPACE_ID is set."""

from __future__ import annotations

import contextlib
import os
import sys

from pipeline.runtime.loggers.interface import Line, StepLog
from pipeline.runtime.loggers.pictures import RecentMatches, shown
from pipeline.runtime.loggers.settings import recipe_of


class Trackio:
    """One run of trackio for each step. On resume its older one is removed, and the lines so far are written again."""

    def __init__(self, log: StepLog):
        os.environ.setdefault("TRACKIO_DIR", str(log.run.resolve() / "trackio"))  # trackio reads it when imported
        import trackio

        self._finish = trackio.finish  # a run's own would leave trackio to end it again at exit
        project, recipe = log.run.resolve().name, recipe_of(log.run)
        with contextlib.redirect_stdout(sys.stderr):  # standard output is the panel's, or one of JSON lines
            _remove(trackio, project, log.step, recipe.get("run"))
            self._run = trackio.init(
                project, log.step, config=recipe, embed=False, auto_log_gpu=False, auto_log_cpu=False
            )
        self._image, self._histogram = trackio.Image, trackio.Histogram
        self._matches = RecentMatches()
        for line in log.kept:
            self.write(line)

    def write(self, line: Line) -> None:
        """Show one line, on rank 0."""
        self._run.log(shown(line, self._matches, self._image, self._histogram), step=line["update"])

    def close(self) -> None:
        """Write what is left."""
        with contextlib.redirect_stdout(sys.stderr):
            self._finish()


def _remove(trackio, project: str, name: str, folder: str | None) -> None:
    """Remove what this run's folder has shown of a step; another run may have its name, and share TRACKIO_DIR."""
    with contextlib.suppress(ValueError):  # no such project yet
        for run in list(trackio.Api().runs(project)):
            if run.name == name and (run.config or {}).get("run") == folder:
                run.delete()
