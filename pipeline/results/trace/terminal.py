"""`python -m pipeline trace`: trace one question through the models of a run, and print the tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.shards import ShardFolder
from pipeline.commands import train_command
from pipeline.errors import RecipeError
from pipeline.recipe.checks import target_layers
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import Model, Recipe
from pipeline.results.arguments import run_recipe
from pipeline.results.evaluate.answers import last_exchange
from pipeline.results.generate import Vlm, load
from pipeline.results.trace.layers import LayerTrace, ModelTrace, TokenPrediction, trace
from pipeline.results.workers import Machine, free_memory
from pipeline.runtime.folder import done, trained_verb_ffns
from pipeline.vlm.assemble import vocabulary_rows
from pipeline.vlm.families import decoder_layers, text_config
from pipeline.vlm.placement import Devices
from pipeline.vlm.verb_ffns import stored_verb_ffns
from pipeline.vlm.verbalizer import VerbalizedVLM

LABEL_WIDTH = 8
"""Width of the layer column, in terminal columns."""


@dataclass(frozen=True)
class Question:
    """A chat up to the assistant turn to be generated."""

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[bytes]
    expected: str | None = None
    """The reference answer; None if the question does not come from data."""

    @property
    def text(self) -> str:
        """Text of the last turn, with [image] for each image."""
        parts = self.messages[-1]["content"]
        return " ".join("[image]" if part["type"] == "image" else part["text"] for part in parts)


@dataclass(frozen=True)
class TracedModel:
    """A model of a run, and the verbalizers used to trace it."""

    name: str
    backbone: Path
    layers: tuple[int, ...] | None
    verb_ffns: Path


def run(
    folder: Path,
    image: Path | None,
    text: str | None,
    sample: str | None,
    data: Path | None,
    max_new_tokens: int,
    without_teacher: bool = False,
) -> None:
    """Trace one question (an image and a text, or a sample of a shard folder) through a run's models, and print it.

    Where a model cannot be traced, or it takes too long, what the smaller ones before it said is printed all the same.
    """
    recipe = load_recipe(run_recipe(folder)).recipe
    if sample is not None and image is None and text is None:
        question = question_from_data(data or recipe.data.held_out, sample)
    elif sample is None and image is not None and text is not None:
        question = question_from_file(image, text)
    else:
        raise RecipeError("give a question: either --image FILE and --question TEXT, or --sample KEY")
    found, missing = traced_models(folder, recipe, without_teacher)
    traces: dict[str, ModelTrace] = {}
    try:
        for model_trace in trace_run(folder, recipe, found, question, max_new_tokens):
            traces[model_trace.name] = model_trace
    finally:
        if traces:
            show([traces[one.name] for one in found if one.name in traces], question, missing)


def question_from_file(image: Path, text: str) -> Question:
    """A question about an image file. Raises RecipeError if there is no such file."""
    if not image.is_file():
        raise RecipeError(f"--image {image}: no such file")
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return Question([{"role": "user", "content": content}], [image.read_bytes()])


def question_from_data(data: Path | None, key: str) -> Question:
    """The last question of a sample. Raises RecipeError if the folder has no such key."""
    if data is None:
        raise RecipeError("--sample needs --data SHARDS, or data.held_out in the run's recipe")
    folder = ShardFolder(data)
    if key not in folder.keys:
        first = ", ".join(folder.keys[:3])
        raise RecipeError(f"--sample {key}: not among the {len(folder)} keys of {data}; the first are {first}")
    raw = folder.read(folder.keys.index(key))
    exchange = last_exchange(raw.record, raw.images)
    return Question(exchange.messages, exchange.images, exchange.answer)


def traced_models(run: Path, recipe: Recipe, without_teacher: bool = False) -> tuple[list[TracedModel], list[str]]:
    """The available ones of teacher, untouched and distilled student, and the reason why each other is left out.

    without_teacher: it is not even looked for.
    The distilled student uses the verbalizers that interact.train_verbalizers trained with it, else the untouched
    student's, which are not trained again (paper, 4.4). Raises RecipeError if none is available.
    """
    stage_1 = recipe.stage_1 or run
    teacher, student = (stage_1 / "verbalize" / f"{role}.safetensors" for role in ("teacher", "student"))
    again = recipe.interact.train_verbalizers and recipe.interact.steps != 0
    distilled = (2, trained_verb_ffns(run)) if again else (1, student)
    wanted = [
        (1, TracedModel("teacher", recipe.teacher.path, recipe.teacher.layers, teacher), 1),
        (1, TracedModel("untouched", recipe.student.path, recipe.student.layers, student), 1),
        (2, TracedModel("distilled", run / "student", recipe.student.layers, distilled[1]), distilled[0]),
    ]
    found, missing = [], []
    for stage, traced_model, verb_stage in wanted[1:] if without_teacher else wanted:
        if not traced_model.verb_ffns.is_file():
            stage, missing_file = verb_stage, traced_model.verb_ffns
        elif not (traced_model.backbone / "config.json").is_file():
            missing_file = traced_model.backbone / "config.json"
        else:
            found.append(traced_model)
            continue
        make = train_command(stage, (stage_1 if stage == 1 else run) / "recipe.yaml")
        missing.append(f"{traced_model.name} is left out: no {missing_file}; {make}")
    if not found:
        raise RecipeError("nothing to trace yet:\n" + "\n".join(f"  {line}" for line in missing))
    return found, missing


def trace_run(
    run: Path, recipe: Recipe, models: Sequence[TracedModel], question: Question, max_new_tokens: int
) -> Iterator[ModelTrace]:
    """Trace the models one after the other, the smallest first, so that only one is in memory.

    Raises RecipeError, before the first is loaded, where one has no room on the devices at hand.
    """
    machine = Machine()
    devices = {one.name: machine.groups(one.backbone, processes=1)[0] for one in models}
    for traced_model in sorted(models, key=lambda one: machine.weights(one.backbone)):
        vlm, side = load_traced_model(traced_model, run, recipe, devices[traced_model.name])
        prompt = vlm.encoder.prompt(question.messages, question.images)
        yield trace(traced_model.name, vlm, side, prompt, max_new_tokens)
        del vlm, side
        free_memory()


def load_traced_model(
    traced_model: TracedModel, run: Path, recipe: Recipe, devices: Devices = ()
) -> tuple[Vlm, VerbalizedVLM]:
    """Load a model with its trained verbalizers. Raises RecipeError if they do not fit each other."""
    vlm = load(traced_model.backbone, recipe.data, devices, recipe.attention)
    layers = target_layers(Model(path=traced_model.backbone, layers=traced_model.layers))
    width = int(text_config(vlm.model).hidden_size)
    ffns = stored_verb_ffns(traced_model.verb_ffns, layers, width, recipe.verbalizer.form, vlm.dtype)
    summary = done((recipe.stage_1 or run) / "verbalize") or {}
    side = VerbalizedVLM(vlm.model, layers, ffns, summary.get("vocab", vocabulary_rows(traced_model.backbone)))
    for layer in layers:
        ffns[str(layer)].to(next(decoder_layers(vlm.model)[layer - 1].parameters()).device)
    side.eval()
    return vlm, side


def show(traces: Sequence[ModelTrace], question: Question, missing: Iterable[str]) -> None:
    """Print the question, every layer's own answer, its predictions along the final answer, and what is missing."""
    console = Console(highlight=False)
    console.print(Text(f"\nquestion  {printable(question.text)}", style="bold"))
    if question.expected is not None:
        console.print(Text(f"expected  {printable(question.expected)}"))
    console.print("\nFreely: each layer's own greedy answer, and the mean probability of its tokens\n")
    console.print(Columns([_free_table(model_trace) for model_trace in traces], padding=(0, 3)))
    console.print(
        "\nRead along the model's own final answer (top row): each layer's likeliest next token and its probability\n"
    )
    tables = [table for model_trace in traces for table in _along_tables(model_trace, console.width)]
    console.print(Columns(tables, padding=(0, 3)))
    console.print(Text("last: the model itself, without a verbalizer; [end]: end of turn; bold: as the last layer"))
    for line in missing:
        console.print(Text(line))


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
        [_column(model_trace, position) for position in range(len(model_trace.answer))], width - LABEL_WIDTH
    ):
        table = _table(model_trace, f", from token {positions[0] + 1}" if positions[0] else _depth_suffix(model_trace))
        for position in positions:
            table.add_column(_token_text(model_trace.answer[position]), no_wrap=True)
        for layer in model_trace.layers:
            table.add_row(
                _layer_label(layer, model_trace), *(_cell(layer.along[i], model_trace.answer[i]) for i in positions)
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
    final = model_trace.answer[position]
    return [_token_text(final), *(_cell(layer.along[position], final) for layer in model_trace.layers)]


def _table(model_trace: ModelTrace, more: str) -> Table:
    title = Text(model_trace.name + more, "bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    return table


def _depth_suffix(model_trace: ModelTrace) -> str:
    return f" ({model_trace.layers[-1].layer} layers)"


def _layer_label(layer: LayerTrace, model_trace: ModelTrace) -> str:
    return "last" if layer is model_trace.layers[-1] else str(layer.layer)


def _cell(prediction: TokenPrediction, final: TokenPrediction) -> Text:
    text = _token_text(prediction)
    text.append(f" {prediction.probability:.2f}")
    text.stylize("bold" if prediction.token == final.token else "")
    return text


def _token_text(prediction: TokenPrediction) -> Text:
    return Text("[end]" if prediction.ends else printable(prediction.text.strip() or prediction.text.replace(" ", "_")))
