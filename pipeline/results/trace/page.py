"""Traces as pages that open anywhere, offline: one for a question, and an index of many."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import write_file
from pipeline.results.evaluate.answers import is_right
from pipeline.results.pages.render import render
from pipeline.results.trace.layers import LayerTrace, ModelTrace, Reading, Token, TokenPrediction
from pipeline.results.trace.matches import Matches
from pipeline.results.trace.questions import Question
from pipeline.vlm.processing import decode_image

LARGEST = 768
"""Longest side of a picture in a page, in pixels; larger ones are made smaller."""
SMALL = 200
"""Pictures up to this width are shown enlarged, their pixels as they are."""


@dataclass(frozen=True)
class Traced:
    """A question with what its models said: what a page shows."""

    question: Question
    traces: Sequence[ModelTrace]
    along_expected: bool


@dataclass(frozen=True)
class About:
    """What is the same on all pages of a command."""

    lens: bool
    """Whether the layers are read without trained verbalizers."""
    missing: Sequence[str]
    """Why each other model is left out."""
    matches: Matches | None


def write_page(path: Path, traced: Traced, about: About, index: bool = False) -> None:
    """Write the page of one question, whole or not at all. index: an index.html lies beside it."""
    divergent = max((one.divergence for t in traced.traces for layer in t.layers for one in layer.along), default=0.0)
    scale = max(divergent, 1e-6)
    page = render(
        "trace.html",
        question=traced.question,
        pictures=[picture(image) for image in traced.question.images],
        traces=traced.traces,
        along_expected=traced.along_expected and traced.question.expected is not None,
        lens=about.lens,
        missing=about.missing,
        matches=about.matches,
        match_figure=_match_map(about.matches) if about.matches else "",
        most_divergent=scale,
        index=index,
        found=_details(traced.traces),
        at=_place,
        shown=shown_token,
        rounded=_rounded,
        finished=lambda one: finished(one.answer),
        shades=lambda reading: _shades(reading, scale),
    )
    write_file(path, page)


def _match_map(matches: Matches) -> str:
    from pipeline.results.trace.figure import match_figure  # imports matplotlib, and a trace may do without

    return match_figure(matches)


def write_index(path: Path, pages: Mapping[str, Traced], about: About) -> None:
    """Write the index of many questions: what changed most between untouched and distilled comes first.

    pages: a page's file name -> what it shows.
    """
    changes = {name: change(traced.traces) for name, traced in pages.items()}
    compared = all(found is not None for found in changes.values())
    names = sorted(pages, key=lambda name: changes[name] or 0.0, reverse=True) if compared else list(pages)
    rows = [
        {
            "page": name,
            "question": pages[name].question,
            "picture": next(map(picture, pages[name].question.images), None),
            "answers": [_answer(one, pages[name].question) for one in pages[name].traces],
            "change": changes[name],
        }
        for name in names
    ]
    models = [one.name for one in next(iter(pages.values())).traces]
    page = render("traces.html", rows=rows, names=models, compared=compared, missing=about.missing)
    write_file(path, page)


def change(traces: Sequence[ModelTrace]) -> float | None:
    """How far the probability of the answer's tokens moved from `untouched` to `distilled`; None without the two.

    The mean over layers and tokens of the absolute difference. Both have to be read along the same answer.
    """
    models = {one.name: one for one in traces}
    if not {"untouched", "distilled"} <= models.keys():
        return None
    before, after = models["untouched"], models["distilled"]
    if [token.id for token in before.read] != [token.id for token in after.read]:
        return None
    moved = [
        abs(new.of_answer - old.of_answer)
        for old_layer, new_layer in zip(before.layers, after.layers, strict=True)
        for old, new in zip(old_layer.along, new_layer.along, strict=True)
    ]
    return sum(moved) / max(1, len(moved))


def shown_token(token: Token | TokenPrediction) -> str:
    """A token as a cell shows it."""
    return "[end]" if token.ends else visible(token.text.strip() or token.text)


def visible(text: str) -> str:
    """Text whose control characters are escaped, and of which something is seen where there are only spaces."""
    shown = text if text.strip(" ") else text.replace(" ", "␣")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


def finished(predictions: Sequence[TokenPrediction]) -> bool:
    """Whether an answer came to its end of turn."""
    return bool(predictions) and predictions[-1].ends


def layer_name(layer: LayerTrace, trace: ModelTrace) -> str:
    """A layer as a table's row is called."""
    return "last" if layer is trace.layers[-1] else str(layer.layer)


def file_name(key: str, number: int) -> str:
    """A page's file name for a sample's key, which may hold anything: its plain characters behind its number."""
    return f"{number:05d}_{re.sub(r'[^A-Za-z0-9_-]+', '-', key)[:60]}.html"


def picture(image: bytes) -> dict[str, Any]:
    """An image as a data URI, upright, and no larger than LARGEST; and whether it is to be shown enlarged."""
    decoded = decode_image(image)
    decoded.thumbnail((LARGEST, LARGEST))
    written = io.BytesIO()
    small = decoded.width <= SMALL
    decoded.save(written, "PNG" if small else "JPEG", **({} if small else {"quality": 90}))
    kind = "png" if small else "jpeg"
    return {"uri": f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}", "small": small}


def _answer(trace: ModelTrace, question: Question) -> dict[str, Any]:
    text = trace.layers[-1].text
    return {"text": text, "right": question.expected is not None and is_right(text, question.expected)}


def _shades(reading: Reading, scale: float) -> dict[str, float]:
    """A cell's darkness, 0 to 1, in each of the three ways to colour: see page.css."""
    return {
        "p": _rounded(reading.probability),
        "a": _rounded(reading.of_answer),
        "d": _rounded(min(1.0, reading.divergence / scale)),
    }


def _rounded(value: float) -> float:
    return round(value, 4)


def _place(kind: str, trace: ModelTrace, row: int, column: int) -> str:
    """A cell's name in `_details`."""
    return f"{kind}/{trace.name}/{row}/{column}"


def _details(traces: Sequence[ModelTrace]) -> dict[str, dict[str, Any]]:
    """What each cell tells when it is chosen."""
    found = {}
    for trace in traces:
        for row, layer in enumerate(trace.layers):
            title = f"{trace.name}, {'last layer' if layer is trace.layers[-1] else f'layer {layer.layer}'}"
            for column, reading in enumerate(layer.along):
                notes = (
                    f"before “{shown_token(trace.read[column])}” (token {column + 1}), whose probability here is "
                    f"{reading.of_answer:.4f}; {reading.divergence:.3f} nat from the last layer"
                )
                found[_place("along", trace, row, column)] = _detail(title, notes, reading)
            for column, prediction in enumerate(layer.free):
                notes = f"token {column + 1} of the layer's own answer, {layer.text!r}"
                found[_place("free", trace, row, column)] = _detail(title, notes, prediction)
    return found


def _detail(title: str, notes: str, prediction: TokenPrediction) -> dict[str, Any]:
    candidates = [(visible(one.text), _rounded(one.probability)) for one in prediction.candidates]
    return {"title": title, "notes": notes, "candidates": candidates}
