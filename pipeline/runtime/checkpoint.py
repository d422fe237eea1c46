"""A step's checkpoints: the newest few, whole or not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.runtime.engine import Engine
from pipeline.runtime.ranks import wait_for_all


class Checkpoints:
    """The newest checkpoints of one step, in RUN/STEP/checkpoints/update_N."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder / "checkpoints", keep

    def newest(self) -> int | None:
        """The update that the newest whole checkpoint was written after; None where there is none."""
        updates = self._whole()
        return updates[-1] if updates else None

    def save(self, engine: Engine, update: int, state: dict[str, Any]) -> None:
        """Write a checkpoint and drop the oldest beyond `keep`. All ranks must call."""
        engine.save(self.folder, _tag(update), {"update": update, **state})
        wait_for_all()
        if engine.ranks.first:
            (self.folder / _tag(update) / "whole").touch()  # written last: a checkpoint without it is half a checkpoint
            for old in self._whole()[: -self.keep]:
                shutil.rmtree(self.folder / _tag(old))
        wait_for_all()

    def load(self, engine: Engine, update: int) -> dict[str, Any]:
        """Put the engine back to where it was after an update."""
        return engine.load(self.folder, _tag(update))

    def drop(self) -> None:
        """Remove all of them: the step is complete and its result stands."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _whole(self) -> list[int]:
        return sorted(int(path.parent.name.removeprefix("update_")) for path in self.folder.glob("update_*/whole"))


def _tag(update: int) -> str:
    return f"update_{update:09d}"
