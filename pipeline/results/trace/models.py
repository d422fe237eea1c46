"""The models that are traced: a run's, with their verbalizers, or any, through the logit lens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.commands import train_command
from pipeline.errors import RecipeError, SampleError
from pipeline.recipe.checks import number_of_layers, target_layers
from pipeline.recipe.schema import Data, Model, ModelParts, Recipe
from pipeline.results.arguments import named_model
from pipeline.results.generate import Vlm, load, require_model
from pipeline.results.trace.layers import ModelTrace, trace
from pipeline.results.trace.questions import Question
from pipeline.results.workers import Machine, free_memory
from pipeline.runtime.display.progress import say
from pipeline.runtime.folder import done, ids_of, trained_verb_ffns
from pipeline.vlm.assemble import vocabulary_rows
from pipeline.vlm.parts import decoder_layers, text_config
from pipeline.vlm.placement import Devices
from pipeline.vlm.verb_ffns import stored_verb_ffns
from pipeline.vlm.verbalizer import VerbalizedVLM


@dataclass(frozen=True)
class TracedModel:
    """A model, and what its layers are read with."""

    name: str
    backbone: Path
    layers: tuple[int, ...]
    """Target layers, from 1, without the last."""
    verb_ffns: Path | None
    """Verbalizers of these layers; None: the logit lens, the model's own norm and head without a verbalizer."""
    vocab: int
    """Ids that predictions are taken over."""
    form: str = "residual"
    """verbalizer.form of the recipe."""
    parts: ModelParts | None = None
    """Those that the recipe names."""


@dataclass(frozen=True)
class TracedModels:
    """What a command traces."""

    models: Sequence[TracedModel]
    missing: Sequence[str]
    """The reason why each other model is left out."""
    limits: Data
    """The recipe's data section, for its limits on samples."""
    attention: str = "sdpa"


def run_models(run: Path, recipe: Recipe, without_teacher: bool = False) -> TracedModels:
    """The available ones of teacher, untouched and distilled student, and the reason why each other is left out.

    without_teacher: it is not even looked for.
    The distilled student uses the verbalizers that interact.train_verbalizers trained with it, else the untouched
    student's, which are not trained again (paper, 4.4). Raises RecipeError if none is available.
    """
    recipe = recipe.model_copy(update={"run": run})  # the folder may have been moved
    teachers, students = recipe.teacher_stage_1, recipe.student_stage_1
    teacher, student = teachers / "verbalize" / "teacher.safetensors", students / "verbalize" / "student.safetensors"
    again = recipe.interact.train_verbalizers and recipe.interact.steps != 0
    distilled = (2, trained_verb_ffns(run)) if again else (1, student)
    wanted = [  # name, model's folder, its section of the recipe, stage that makes it, verbalizers, their stage
        ("teacher", recipe.teacher.path, recipe.teacher, 1, teacher, 1),
        ("untouched", recipe.student.path, recipe.student, 1, student, 1),
        ("distilled", run / "student", recipe.student, 2, distilled[1], distilled[0]),
    ]
    verbalize = done(students / "verbalize") or {}
    found, missing = [], []
    for name, folder, role, stage, verb_ffns, verb_stage in wanted[1:] if without_teacher else wanted:
        if not verb_ffns.is_file():
            stage, missing_file = verb_stage, verb_ffns
        elif not (folder / "config.json").is_file():
            missing_file = folder / "config.json"
        else:
            targets = target_layers(Model(path=folder, layers=role.layers))
            side = "teacher" if name == "teacher" else "student"
            ids = ids_of(verbalize, side) if "vocab" in verbalize else vocabulary_rows(folder)
            form = recipe.verbalizer.form
            found.append(TracedModel(name, folder, targets, verb_ffns, ids, form, role.parts))
            continue
        maker = run if stage == 2 else teachers if name == "teacher" else students
        make = train_command(stage, maker / "recipe.yaml")
        missing.append(f"{name} is left out: no {missing_file}; {make}")
    if not found:
        raise RecipeError("nothing to trace yet:\n" + "\n".join(f"  {line}" for line in missing))
    return TracedModels(found, missing, recipe.data, recipe.attention)


def lens_models(arguments: Sequence[str], data: Path | None) -> TracedModels:
    """Models given as [NAME=]DIR, read through the logit lens at every layer. Raises RecipeError if one is no model."""
    found = []
    for name, folder in map(named_model, arguments):
        require_model(folder)
        layers = tuple(range(1, number_of_layers(folder)))
        found.append(TracedModel(name, folder, layers, None, vocabulary_rows(folder)))
    if len({one.name for one in found}) < len(found):
        raise RecipeError("two models have one name; name them: --model NAME=DIR")
    return TracedModels(found, [], Data(train=data or Path()))


def trace_models(
    traced: TracedModels, questions: Sequence[Question], max_new_tokens: int, along_expected: bool
) -> Iterator[tuple[TracedModel, list[ModelTrace | None]]]:
    """Trace the questions through the models one after the other, the smallest first: only one is in memory.

    along_expected: read along the expected answer where there is one, not along each model's own. Of many questions one
    that a model cannot take gives None, and is said.
    Raises RecipeError, before the first is loaded, where one has no room on the devices at hand, and SampleError where
    the only question cannot be taken.
    """
    machine = Machine()
    devices = {one.name: machine.groups(one.backbone, processes=1)[0] for one in traced.models}
    for model in sorted(traced.models, key=lambda one: machine.weights(one.backbone)):
        vlm, side = load_traced_model(model, traced.limits, traced.attention, devices[model.name])
        found: list[ModelTrace | None] = []
        for question in questions:
            try:
                found.append(_trace(model.name, vlm, side, question, max_new_tokens, along_expected))
            except SampleError as error:
                if len(questions) == 1:
                    raise
                say(f"{question.key} is left out: {error}")
                found.append(None)
        yield model, found
        del vlm, side
        free_memory()


def _trace(
    name: str, vlm: Vlm, side: VerbalizedVLM, question: Question, max_new_tokens: int, along_expected: bool
) -> ModelTrace:
    prompt = vlm.encode_question(question.messages, question.images)
    read = None
    if along_expected and question.expected is not None:
        read = expected_ids(vlm, question, question.expected)
    return trace(name, vlm, side, prompt, max_new_tokens, read)


def expected_ids(vlm: Vlm, question: Question, answer: str) -> list[int]:
    """Ids of an answer as the model is trained on it: what the chat template makes of it, with its end of turn."""
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    encoded = vlm.encoder(question.key, [*question.messages, turn], question.images)
    begin = vlm.encoder.prompt(question.messages, question.images)["input_ids"].shape[1]
    return encoded.inputs["input_ids"][0, begin:][encoded.response[begin:]].tolist()


def load_traced_model(
    model: TracedModel, limits: Data, attention: str = "sdpa", devices: Devices = ()
) -> tuple[Vlm, VerbalizedVLM]:
    """Load a model with its verbalizers. Raises RecipeError if they do not fit each other."""
    vlm = load(model.backbone, limits, devices, attention, model.parts)
    if model.verb_ffns is None:
        ffns = nn.ModuleDict({str(layer): nn.Identity() for layer in model.layers})
    else:
        width = int(text_config(vlm.model).hidden_size)
        ffns = stored_verb_ffns(model.verb_ffns, model.layers, width, model.form, vlm.dtype)
    side = VerbalizedVLM(vlm.model, model.layers, ffns, model.vocab)
    for layer in model.layers:
        ffns[str(layer)].to(next(decoder_layers(vlm.model)[layer - 1].parameters()).device)
    side.eval()
    return vlm, side
