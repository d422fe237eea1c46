"""wandb (Weights & Biases): RUN/wandb, offline unless WANDB_MODE says otherwise."""

from __future__ import annotations

import os
import secrets
from typing import Any

import wandb

from pipeline.runtime.loggers.interface import Line, StepLog
from pipeline.runtime.loggers.pictures import RecentMatches, shown
from pipeline.runtime.loggers.settings import recipe_of


class Wandb:
    """One run of wandb for each step, under an id that the run's folder keeps.

    Online a resumed step goes on in it, and wandb takes no update twice. Offline wandb cannot go on in a folder: a new
    one is begun under the same id, with the lines so far written again, so that the newest folder is whole.
    """

    def __init__(self, log: StepLog):
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vlsi"),
            id=_id(log),
            name=f"{log.run.resolve().name}/{log.step}",
            group=log.run.resolve().name,
            job_type=log.step,
            dir=str(log.run),
            mode=mode,
            resume=None if mode == "offline" else "allow",
            config=recipe_of(log.run),
            settings=wandb.Settings(console="off", silent=True),  # standard output is the panel's
        )
        self._matches = RecentMatches(log.kept if self._run.resumed else ())
        if not self._run.resumed:
            for line in log.kept:
                self.write(line)

    def write(self, line: Line) -> None:
        """Show one line, on rank 0."""
        self._run.log(shown(line, self._matches, wandb.Image, wandb.Histogram), step=line["update"])

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


def _id(log: StepLog) -> str:
    path = log.run / "wandb" / f"{log.step}.id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8")
