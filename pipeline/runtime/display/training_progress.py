"""What the user sees of a step that trains: a panel on a terminal, elsewhere a short line now and then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.live import Live

from pipeline.runtime.display.loss_groups import loss_groups
from pipeline.runtime.display.progress import Pace, console, moves, say_progress, size_text
from pipeline.runtime.display.training_panel import TrainingPanel
from pipeline.runtime.folder import HELD_OUT

DRAWN_A_SECOND = 2
"""How often the panel is drawn again: updates may be faster than anybody reads."""


@dataclass(frozen=True)
class UpdateView:
    """What is shown of an update."""

    losses: Mapping[str, float]
    """In nat a token, those of the newest update that was not skipped; empty before there is one."""
    tokens_per_s: float
    data_wait: float
    """Share of the update's time, from 0 to 1."""
    memory: int
    """Bytes that rank 0 has taken (peak_memory)."""
    match: Sequence[int | None] = ()
    """The teacher layer that each student target layer was matched to, None where it has none; empty in other steps."""
    skipped: int = 0
    """Skipped updates of the step so far."""
    held_out: Mapping[str, float] = field(default_factory=dict)
    """{name of HELD_OUT: value} of the newest measurement; empty before there is one."""

    @property
    def followed(self) -> Mapping[str, float]:
        """The losses without those of student layers, where none follows any (`last_only`): their 0 is not learnt."""
        if not self.match or any(layer is not None for layer in self.match):
            return self.losses
        return {name: value for name, value in self.losses.items() if not name.startswith("layer/")}

    def text(self) -> str:
        """The line: of each kind of losses the shallowest layer, the deepest and the mean."""
        parts = [group.text() for group in loss_groups(self.followed)]
        return "  ".join([*parts, *self.state()])

    def state(self) -> list[str]:
        """What is known besides the losses: held-out data, skipped updates, speed, waiting for data, memory."""
        loss, right = (self.held_out.get(name) for name in HELD_OUT)
        answers = "" if right is None else f", {right:.1%} right"
        parts = [] if loss is None else [f"held out {loss:.3f}{answers}"]
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        speed = f"{self.tokens_per_s:,.0f} tokens/s"
        return [*parts, speed, f"data {self.data_wait:.0%}", size_text(self.memory)]

    def values(self) -> dict[str, Any]:
        """The same for a line of JSON."""
        values: dict[str, Any] = {group.name: group.summary() for group in loss_groups(self.followed)}
        values |= {**self.held_out, **({"match": list(self.match)} if self.match else {})}
        speed = {"tokens_per_s": round(self.tokens_per_s, 1), "data_wait": round(self.data_wait, 4)}
        return {**values, **speed, "memory": self.memory, "skipped": self.skipped}


class TrainingProgress:
    """Progress of a step that trains, with its losses, its matches, its speed and its ETA."""

    def __init__(self, name: str, total: int, done: int, shown: bool):
        """shown: whether this rank prints at all."""
        self.name, self._shown = name, shown
        self._pace = Pace(total, done)
        self._live: Live | None = None
        if shown and moves():
            self._panel = TrainingPanel(name, self._pace)
            self._live = Live(self._panel, console=console(), refresh_per_second=DRAWN_A_SECOND)
            self._live.start()

    def advance(self, update: UpdateView) -> None:
        """One update more."""
        self._pace.done += 1
        if self._live is not None:
            self._panel.add(update.followed, update.match, "   ".join(update.state()))
        elif self._shown and self._pace.is_due():
            line = f"{self.name}  {self._pace.done}/{self._pace.total}  eta {self._pace.eta()}  {update.text()}"
            say_progress(line, {**self._pace.values(self.name), **update.values()})

    def close(self) -> None:
        """Leave the terminal in order; the last panel stays."""
        if self._live is not None:
            self._live.stop()
