"""Traces as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.results.trace.layers import LayerTrace, ModelTrace, Token, TokenPrediction
from pipeline.results.trace.questions import Question

LABEL_WIDTH = 8
"""Width of the layer column, in terminal columns."""


def show(traces: Sequence[ModelTrace], question: Question, missing: Iterable[str], along_expected: bool) -> None:
    """Print the question, every layer's own answer, its predictions along an answer, and what is missing.

    along_expected: that answer is the expected one.
    """
    along = "the expected answer" if along_expected else "the model's own final answer"
    console = Console(highlight=False)
    console.print(Text(f"\nquestion  {printable(question.text)}", style="bold"))
    if question.expected is not None:
        console.print(Text(f"expected  {printable(question.expected)}"))
    console.print("\nFreely: each layer's own greedy answer, and the mean probability of its tokens\n")
    console.print(Columns([_free_table(model_trace) for model_trace in traces], padding=(0, 3)))
    console.print(f"\nRead along {along} (top row): each layer's likeliest next token and its probability\n")
    tables = [table for model_trace in traces for table in _along_tables(model_trace, console.width)]
    console.print(Columns(tables, padding=(0, 3)))
    console.print(Text("last: the model itself, without a verbalizer; [end]: end of turn; bold: as the top row"))
    for line in missing:
        console.print(Text(line), soft_wrap=True)


def printable(text: str) -> str:
    """Escape control characters: text from models and data must not control the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _free_table(model_trace: ModelTrace) -> Table:
    table = _table(model_trace, _depth_suffix(model_trace))
    table.add_column("says", max_width=40)
    table.add_column("p", justify="right")
    for layer in model_trace.layers:
        mean = sum(prediction.probability for prediction in layer.free) / max(1, len(layer.free))
        unfinished = "" if layer.free and layer.free[-1].ends else " ..."
        style = "bold" if layer.text == model_trace.layers[-1].text else ""
        table.add_row(_layer_label(layer, model_trace), Text(printable(layer.text) + unfinished, style), f"{mean:.2f}")
    return table


def _along_tables(model_trace: ModelTrace, width: int) -> Iterator[Table]:
    """One table, or several if the answer has more tokens than fit the terminal."""
    for positions in _split_to_width(
        [_column(model_trace, position) for position in range(len(model_trace.read))], width - LABEL_WIDTH
    ):
        table = _table(model_trace, f", from token {positions[0] + 1}" if positions[0] else _depth_suffix(model_trace))
        for position in positions:
            table.add_column(_token_text(model_trace.read[position]), no_wrap=True)
        for layer in model_trace.layers:
            table.add_row(
                _layer_label(layer, model_trace), *(_cell(layer.along[i], model_trace.read[i]) for i in positions)
            )
        yield table


def _split_to_width(columns: Sequence[Sequence[Text]], width: int) -> Iterator[list[int]]:
    """Column indices of each table; columns are three spaces apart."""
    positions: list[int] = []
    used = 0
    for position, cells in enumerate(columns):
        needed = max(cell.cell_len for cell in cells) + 3
        if positions and used + needed > width:
            yield positions
            positions, used = [], 0
        positions, used = [*positions, position], used + needed
    yield positions


def _column(model_trace: ModelTrace, position: int) -> list[Text]:
    read = model_trace.read[position]
    return [_token_text(read), *(_cell(layer.along[position], read) for layer in model_trace.layers)]


def _table(model_trace: ModelTrace, more: str) -> Table:
    title = Text(model_trace.name + more, "bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    return table


def _depth_suffix(model_trace: ModelTrace) -> str:
    return f" ({model_trace.layers[-1].layer} layers)"


def _layer_label(layer: LayerTrace, model_trace: ModelTrace) -> str:
    return "last" if layer is model_trace.layers[-1] else str(layer.layer)


def _cell(prediction: TokenPrediction, read: Token) -> Text:
    text = _token_text(prediction)
    text.append(f" {prediction.probability:.2f}")
    text.stylize("bold" if prediction.token == read.id else "")
    return text


def _token_text(token: Token | TokenPrediction) -> Text:
    return Text("[end]" if token.ends else printable(token.text.strip() or token.text.replace(" ", "_")))
