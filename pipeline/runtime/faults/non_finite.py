"""Updates without a step: their loss or its gradient was not finite, so weights and optimizer stayed as they were.

One such update is a sample that a model cannot take, or rounding; many in a row are a training that has diverged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DivergedError
from pipeline.runtime.data.batches import LoadedBatch
from pipeline.runtime.ranks import Ranks, gather_lists

NON_FINITE = "non_finite.jsonl"
"""File of a run folder: the samples of each skipped update."""
KEYS_SAID = 5


class SkippedUpdates:
    """Counts a step's skipped updates, and writes down whose loss it was."""

    def __init__(self, run: Path, step: str, most_in_a_row: int, ranks: Ranks):
        self.path, self.step, self.most_in_a_row, self.ranks = run / NON_FINITE, step, most_in_a_row, ranks
        self.total = self.in_a_row = 0

    def state(self) -> dict[str, int]:
        """For the step's checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def resume(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint's state."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]

    def moved(self) -> None:
        """Count an update that was not skipped."""
        self.in_a_row = 0

    def skipped(self, update: int, micros: Sequence[LoadedBatch], losses: Sequence[Tensor]) -> str:
        """Count an update (from 1) that was skipped; returns a line that says whose loss was not finite.

        losses: the loss of each of this rank's micro-batches. Where all ranks' are finite, the gradient alone was not,
        and any of the update's samples may have made it so: all are written down. All ranks must call. Raises
        DivergedError, on all ranks alike, where too many in a row are skipped.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        own = [
            self._line(update, *one) for one in enumerate(zip(micros, torch.stack(list(losses)).tolist(), strict=True))
        ]
        every = gather_lists(own)
        lines = [line for line in every if line["loss"] != "finite"] or every
        if self.ranks.first:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        said = self._said(update, lines)
        if self.in_a_row >= self.most_in_a_row:
            raise DivergedError(
                f"{said}. {self.in_a_row} updates in a row were skipped, as many as {self.step}.max_skipped_in_a_row "
                "allows. If they have a sample in common, mend it or leave it out; if the losses in metrics.jsonl rose "
                f"before, set {self.step}.learning_rate lower (or clip, or more warmup_steps) and begin the step anew: "
                f"a run may not change these halfway, so remove {self.path.parent / self.step} first"
            )
        return said

    def _line(self, update: int, micro: int, batch_and_loss: tuple[LoadedBatch, float]) -> dict[str, Any]:
        batch, loss = batch_and_loss
        where = {"step": self.step, "update": update, "rank": self.ranks.rank, "micro_step": micro + 1}
        keys = next(iter(batch.batches.values())).keys
        return {**where, "loss": "finite" if math.isfinite(loss) else str(loss), "keys": list(keys)}

    def _said(self, update: int, lines: Sequence[Mapping[str, Any]]) -> str:
        keys = [key for line in lines for key in line["keys"]]
        what = "gradient" if lines[0]["loss"] == "finite" else "loss"
        more = f" and {len(keys) - KEYS_SAID} more" if len(keys) > KEYS_SAID else ""
        return (
            f"{self.step}: update {update} was skipped, for its {what} is not finite: one of "
            f"{', '.join(keys[:KEYS_SAID])}{more} (all in {self.path})"
        )
