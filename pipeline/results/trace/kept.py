"""Traces of changed answers in the run's folder: what `trace --changed` leaves there for the report to show.

The report is made of files alone, without a model or the data: pictures and what each layer says are all in one file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.shards import write_file
from pipeline.results.evaluate.answers import is_right
from pipeline.results.evaluate.changes import Result
from pipeline.results.trace.page import Traced, finished, layer_name, picture, visible

FOLDER, FILE = "traces", "changed.json"
"""RUN/traces has the pages and this file."""


def keep_traces(run: Path, pages: Mapping[str, Traced], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Write RUN/traces/changed.json, and return its traces.

    pages: a page's file name -> what it shows. results: those of the evaluation that named the samples.
    """
    traces = [{"page": name, **_compact(one)} for name, one in pages.items()]
    content = {"evaluated": _identities(results), "traces": traces}
    write_file(run / FOLDER / FILE, json.dumps(content, indent=1, ensure_ascii=False).encode())
    return traces


def kept_traces(run: Path, results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """{sample's key: its trace} of RUN/traces/changed.json; empty without it, or where other models were traced.

    results: those of the evaluation as it is now. A model trained or evaluated anew has another identity.
    """
    path = run / FOLDER / FILE
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["evaluated"] != _identities(results):
        return {}
    return {trace["key"]: trace for trace in content["traces"]}


def as_markdown(trace: Mapping[str, Any]) -> str:
    """A kept trace as a table, a row a layer, for a logger that shows text."""
    lines = [f"**{_plain(trace['question'])}** expected: {_plain(trace['expected'])}", ""]
    for model in trace["models"]:
        rows = [f"| {layer} | {_plain(text)} |" for layer, text in model["layers"]]
        lines += [f"| {model['name']} | says |", "| --- | --- |", *rows, ""]
    return "\n".join(lines)


def _compact(traced: Traced) -> dict[str, Any]:
    question = traced.question
    return {
        "key": question.key,
        "question": question.text,
        "expected": question.expected,
        "pictures": [picture(image) for image in question.images],
        "models": [
            {
                "name": trace.name,
                "right": is_right(trace.layers[-1].text, str(question.expected)),
                "layers": [
                    [layer_name(layer, trace), visible(layer.text) + ("" if finished(layer.free) else " …")]
                    for layer in trace.layers
                ],
            }
            for trace in traced.traces
        ],
    }


def _identities(results: Sequence[Result]) -> list[Mapping[str, str]]:
    return [result.get("identity", {}) for result in results]


def _plain(text: str | None) -> str:
    """Text whose marks are no Markdown and no HTML."""
    return "".join(f"&#{ord(char)};" if not char.isalnum() and char not in " .,?-" else char for char in str(text))
