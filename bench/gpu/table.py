"""The results as one table, goal beside figure: on the screen and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from bench.gpu.figures import Figure
from bench.gpu.jobs import Ended

HEADINGS = ("check", "figure", "value", "goal", "met", "beside")
TWIN = "Tiny shapes on a CPU: every check ran the code that a card runs, but these figures mean nothing."


def rows(done: Sequence[Ended]) -> Iterator[tuple[str, ...]]:
    """Each check's status, then its figures and notes."""
    for one in done:
        yield one.name, one.status, f"{one.seconds:.0f} s", "", "", ""
        for figure in one.figures:
            yield "", figure.name, _value(figure), figure.goal_text(), _met(figure), figure.beside
        for note in one.notes:
            yield "", note, "", "", "", ""


def profiles(done: Sequence[Ended]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """(which call, its dearest kernels) of each profiled call."""
    for one in done:
        for name, entry in one.details.items():
            if isinstance(entry, dict) and "profile" in entry:
                found = entry["profile"]
                title = f"{one.name}, {name}: {found['wall_ms']:.1f} ms, idle {found['idle_share']:.1%}"
                kernels = [
                    (kernel["name"], f"{kernel['ms']:.2f}", f"{kernel['share']:.1%}", str(kernel["calls"]))
                    for kernel in found["kernels"]
                ]
                yield title, kernels


def show(done: Sequence[Ended], device: str, console: Console) -> None:
    """Print the profiles, then the table: the end is what is read."""
    for title, kernels in profiles(done):
        table = Table("kernel", "ms", "share", "calls", title=title, title_justify="left")
        for kernel in kernels:
            table.add_row(*kernel)
        console.print(table)
    table = Table(*HEADINGS, title="make check-gpu", title_justify="left")
    for row in rows(done):
        table.add_row(*row)
    console.print(table)
    if device == "cpu":
        console.print(TWIN)


def markdown(done: Sequence[Ended], device: str, seconds: float) -> str:
    """The same as a Markdown page."""
    failed = [one.name for one in done if one.failed]
    lines = ["# make check-gpu", "", f"{seconds:.0f} s; failed: {', '.join(failed) or 'none'}."]
    lines += ["", TWIN] if device == "cpu" else []
    lines += ["", *_markdown_table(HEADINGS, list(rows(done)))]
    for title, kernels in profiles(done):
        lines += ["", f"## {title}", "", *_markdown_table(("kernel", "ms", "share", "calls"), kernels)]
    return "\n".join(lines) + "\n"


def _markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (headings, ["---"] * len(headings), *lines):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(figure: Figure) -> str:
    return (
        f"{figure.value:,.3g} {figure.unit}".strip()
        if abs(figure.value) < 1000
        else f"{figure.value:,.0f} {figure.unit}"
    )


def _met(figure: Figure) -> str:
    return {None: "", True: "yes", False: "NO"}[figure.met()]
