"""docs/peers.md: the measured table of each pair, between two marks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.peers.methods import METHODS, PAIRS

PAGE = Path(__file__).parents[2] / "docs" / "peers.md"
END = "<!-- end -->"
HEADS = (
    "method", "exact match", "at equal time (updates)", "processor seconds", "step, ms", "most memory, MiB", "lines",
)  # fmt: skip


def write_page(results: Mapping[str, Any]) -> Path:
    """Put the table of these results into the page; returns its path."""
    begin = f"<!-- measured: make bench-peers ARGS='--pair {results['pair']}' -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{begin}\n{table(results)}\n{END}{after}", encoding="utf-8")
    return PAGE


def table(results: Mapping[str, Any]) -> str:
    """Markdown: how it was measured, then a row for each method."""
    size, host, pair = results["size"], results["machine"], PAIRS[results["pair"]]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    said = (
        f"Measured on {host['date']} at commit {results['commit']}, {host['machine']}, one thread; "
        f"seed {size['seed']}, {size['samples']:,} {pair.text} of which 40 % have a wrong answer, "
        f"{size['updates']} updates of {pair.task.micro_batch_size}, learning rate {size['learning_rate']:g}, "
        f"{size['held_out']} held-out samples; {versions}. "
        f"Teacher {results['models']['teacher']:.1%}, untouched student {results['models']['untouched']:.1%}."
    )
    rows = [_row(method.text, results["methods"][method.name]) for method in METHODS]
    return "\n".join([said, "", _line(HEADS), _line(("---",) * len(HEADS)), *rows])


def _row(text: str, found: Mapping[str, Any]) -> str:
    longer = found.get("equal_time")
    seconds = f"{found['cpu_seconds']:.0f}"
    if "stage_1_cpu_seconds" in found:
        seconds = f"{found['stage_1_cpu_seconds']:.0f} + {seconds}"
    return _line(
        (
            text,
            f"{found['exact_match']:.1%}",
            f"{longer['exact_match']:.1%} ({longer['updates']:,})" if longer else "",
            seconds,
            f"{1000 * found['step_seconds']:.0f}",
            f"{found['peak_mib']:,}",
            str(found["lines"]),
        )
    )


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
