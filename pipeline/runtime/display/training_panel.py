"""The panel of a step that trains, on a terminal: progress, losses as bars and curves, the newest matches.

A curve and a row of bars are a character a value, so that 80 columns are enough for the layers of a large model.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.runtime.display.loss_groups import LossGroup, loss_groups
from pipeline.runtime.display.progress import Pace

BARS = "▁▂▃▄▅▆▇█"
SHADES = " ░▒▓█"
"""From never to always."""
CURVE_OF = 256
"""Updates that a curve shows: the newest."""
MATCHES_OF = 50
"""Updates whose matches are counted: the newest."""
NARROWEST = 8
"""Characters of a curve or of a row of bars at least."""
BESIDE = 50
"""Characters that a line of losses needs beside its bars and its curve."""


class TrainingPanel:
    """What is known of a running step, as rich draws it: at the console's width of the moment."""

    def __init__(self, name: str, pace: Pace):
        self.name, self._pace = name, pace
        self._losses: Mapping[str, float] = {}
        self._curves: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=CURVE_OF))
        self._matches: deque[Sequence[int | None]] = deque(maxlen=MATCHES_OF)
        self._teachers: set[int] = set()
        self._below = ""

    def add(self, losses: Mapping[str, float], match: Sequence[int | None], below: str) -> None:
        """An update: its losses in nat a token, its match as teacher layers, and the line below all."""
        self._losses, self._below = losses, below
        for group in loss_groups(losses):
            self._curves[group.name].append(group.mean)
        if match:
            self._matches.append(match)
            self._teachers |= {layer for layer in match if layer is not None}

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        """The panel, no wider than the console."""
        parts: list[RenderableType] = [self._head(), self._loss_table(options.max_width)]
        if self._matches and (rows := list(self._match_rows())):
            parts += [self._match_title(), Columns(rows, padding=(0, 3))]
        if self._below:
            parts.append(Text(self._below, no_wrap=True, overflow="ellipsis"))
        yield Group(*parts)

    def _head(self) -> Table:
        done, total = self._pace.done, self._pace.total
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, total), completed=done, width=24)
        head.add_row(Text(self.name, style="bold"), bar, f"{done}/{total}", f"eta {self._pace.eta()}")
        return head

    def _loss_table(self, width: int) -> Table:
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        groups = loss_groups(self._losses)
        most = max((len(group.layers) for group in groups), default=0)
        bars = min(most, max(NARROWEST, width - BESIDE - NARROWEST))
        table.add_column("nat a token", no_wrap=True)
        table.add_column("by layer", no_wrap=True, min_width=bars)
        for heading in ("shallowest", "deepest", "mean"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("newest updates", no_wrap=True, min_width=NARROWEST)
        curve = max(NARROWEST, min(40, width - BESIDE - bars))
        for group in groups:
            table.add_row(*_row(group, bars), blocks(self._curves[group.name], curve))
        return table

    def _match_title(self) -> Text:
        teachers = f"{min(self._teachers)} to {max(self._teachers)}" if self._teachers else "none"
        text = f"newest match, and the teacher layers ({teachers}) of the last {len(self._matches)}"
        return Text(text, style="dim", no_wrap=True, overflow="ellipsis")

    def _match_rows(self) -> Iterator[Text]:
        """A student layer each: the newest match, and how often each teacher layer was matched lately."""
        students = [name.removeprefix("layer/") for name in self._losses if name.startswith("layer/")]
        teachers = sorted(self._teachers)
        for place, student in enumerate(students):
            lately = [match[place] for match in self._matches]
            cells = (SHADES[math.ceil(lately.count(layer) / len(lately) * (len(SHADES) - 1))] for layer in teachers)
            newest = "-" if lately[-1] is None else lately[-1]
            yield Text(f"{student:>3} → {newest:<3}│{''.join(cells)}│", no_wrap=True)


def blocks(values: Sequence[float], width: int) -> str:
    """Values as so many characters at most, from the lowest to the highest block; neighbours share one, by their mean.

    All are of one height where they are equal.
    """
    values, count = list(values), min(width, len(values))
    edges = [at * len(values) // count for at in range(count + 1)] if count else []
    means = [fmean(values[start:end]) for start, end in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    step = (high - low) / (len(BARS) - 1)
    return "".join(BARS[round((mean - low) / step) if step else 0] for mean in means)


def _row(group: LossGroup, bars: int) -> tuple[str, ...]:
    if not group.layers:
        return group.name, "", "", "", f"{group.values[0]:.3f}"
    ends = (f"{group.layers[at]}: {group.values[at]:.3f}" for at in (0, -1))
    return group.name, blocks(group.values, bars), *ends, f"{group.mean:.3f}"
