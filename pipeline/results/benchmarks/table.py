"""One table: our scores above, the paper's numbers below."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.results.benchmarks.columns import Benchmark
from pipeline.results.benchmarks.plan import Plan
from pipeline.results.benchmarks.run import Scores

PAPER = Path(__file__).with_name("paper_numbers.json")


def show(scores: Scores, plan: Plan) -> None:
    """Print the table, then what the numbers are."""
    console = Console(highlight=False)
    console.print(table(scores, plan.benchmarks))
    for line in notes(scores, plan):
        console.print(line, markup=False, soft_wrap=True)


def table(scores: Scores, benchmarks: Sequence[Benchmark]) -> Table:
    """Models down, benchmarks across; the paper's models that have a number for one of them below a line."""
    made = Table()
    made.add_column("model", overflow="fold")
    for benchmark in benchmarks:
        made.add_column(benchmark.column, justify="right", overflow="fold")
    for name, found in scores.items():
        made.add_row(name, *(_ours(found.get(benchmark.name), benchmark) for benchmark in benchmarks))
    made.add_section()
    for name, printed in paper_numbers().items():
        cells = ["/".join(f"{number:g}" for number in printed.get(benchmark.name, [])) for benchmark in benchmarks]
        if any(cells):
            made.add_row(f"{name}, paper", *(cell or "-" for cell in cells))
    return made


def paper_numbers() -> dict[str, dict[str, list[float]]]:
    """{model: {benchmark: what the paper prints for it}}; more than one number where its tables contradict."""
    found: dict[str, dict[str, list[float]]] = {}
    for rows in json.loads(PAPER.read_text(encoding="utf-8"))["tables"].values():
        for model, numbers in rows.items():
            for benchmark, number in numbers.items():
                printed = found.setdefault(model, {}).setdefault(benchmark, [])
                if number not in printed:
                    printed.append(number)
    return found


def notes(scores: Scores, plan: Plan) -> Iterator[str]:
    """What the scores are, how they differ from the paper's, and where they are."""
    ours = [result for found in scores.values() for result in found.values()]
    used = sorted({str(result["versions"]["lmms-eval"]) for result in ours})
    yield f"by lmms-eval {', '.join(used)}, greedy; the paper's numbers are from {_source()}."
    if any(result["samples"] < result["of_samples"] for result in ours):
        yield "*: of the first samples only (--limit): not a result on the benchmark."
    for benchmark in plan.benchmarks:
        if benchmark.note:
            yield f"{benchmark.column}: {benchmark.note}."
    if any(benchmark.judged for benchmark in plan.benchmarks):
        judged = ", ".join(benchmark.column for benchmark in plan.benchmarks if benchmark.judged)
        yield f"{judged}: judged or read by a model behind an API; another judge gives other scores."
    yield f"written to {plan.output}"


def _ours(result: Mapping[str, Any] | None, benchmark: Benchmark) -> str:
    if result is None:
        return "-"
    return benchmark.shown(result["score"]) + ("*" if result["samples"] < result["of_samples"] else "")


def _source() -> str:
    return str(json.loads(PAPER.read_text(encoding="utf-8"))["source"]).partition(";")[0]
