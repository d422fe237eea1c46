"""The tables of `python -m pipeline evaluate`, with notes on what the numbers mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.results.evaluate.answers import NORMALISATION
from pipeline.results.evaluate.comparison import perplexity_note, sentences
from pipeline.results.evaluate.plan import QUESTION_ONLY, Plan

Results = Mapping[str, Mapping[str, Any]]
"""Return value of `evaluate`: {model name: results}."""


def show(results: Results, plan: Plan) -> None:
    """Print the results as tables, then notes on the numbers and on rejected samples."""
    console = Console(highlight=False)
    console.print(_totals(results, plan))
    types = sorted({kind for result in results.values() for kind in result.get("by_type", {})})
    if types:
        console.print(_by_type(results, types))
    for line in _notes(results, plan):
        console.print(line, markup=False)


def _totals(results: Results, plan: Plan) -> Table:
    count = len(plan.indices())
    spaced = ", evenly spaced" if count < len(plan.data) else ""
    table = Table(title=f"{plan.data.path}: {count} of {len(plan.data)} samples{spaced}", title_justify="left")
    table.add_column("model")
    for heading in ("exact match", "95 %", "perplexity", "samples", "rejected"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        perplexity, rejected = result.get("perplexity"), result.get("rejected")
        table.add_row(
            name,
            f"{result['exact_match']:.1%}",
            f"{100 * result['low']:.1f} to {100 * result['high']:.1f}",
            "-" if perplexity is None else f"{perplexity:#.4g}",
            str(result["samples"]),
            "-" if rejected is None else str(len(rejected)),
        )
    return table


def _by_type(results: Results, types: Sequence[str]) -> Table:
    table = Table(title="exact match by question type", title_justify="left")
    table.add_column("type")
    for name in ("samples", *results):
        table.add_column(name, justify="right", overflow="fold")
    for kind in types:
        found = [result.get("by_type", {}).get(kind) for result in results.values()]
        count = max(one["samples"] for one in found if one)
        table.add_row(kind, str(count), *(f"{one['exact_match']:.1%}" if one else "-" for one in found))
    return table


def _notes(results: Results, plan: Plan) -> Iterator[str]:
    if plan.against is not None:
        yield from sentences(results, plan.against)
    yield f"exact match: greedy answer to the last question of a chat, compared after: {NORMALISATION}."
    yield "95 %: where the share lies for all such questions (Wilson's interval). Another training run may differ more."
    yield "perplexity: exp of the mean cross-entropy in nat over all response tokens, end of turn included."
    if note := perplexity_note(results):
        yield note
    if plan.baseline is not None:
        yield (
            f"{QUESTION_ONLY}: no picture, no model: the commonest answer to the same question in "
            f"{plan.baseline.path}; to a question not found there, the commonest of all."
        )
    else:
        yield f"{QUESTION_ONLY}: left out, for there is nothing to learn it from; give --baseline-data SHARDS"
    for name, result in results.items():
        if result.get("cut"):
            yield (
                f"{name}: {result['cut']:,} of {result['samples']:,} answers were cut at --max-new-tokens "
                f"{plan.max_new_tokens}, and compared as far as they got; with a larger number they may end"
            )
        if result.get("rejected"):
            first = result["rejected"][0]
            yield (
                f"{name}: read {result['read']} = used {result['samples']} + rejected {len(result['rejected'])}; "
                f"first: {first['key']}: {first['reason']}"
            )
    if plan.output is not None:
        yield f"written to {plan.output}"
