"""From a recipe to encoders and models with verbalizers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from pipeline.recipe.checks import target_layers
from pipeline.recipe.schema import Data, Model, Recipe
from pipeline.vlm.backbone import load_student, load_vlm
from pipeline.vlm.config import read_config
from pipeline.vlm.image_size import PixelLimits
from pipeline.vlm.mapped_pair import MappedPair
from pipeline.vlm.parts import text_config
from pipeline.vlm.processing import ChatEncoder, load_processor
from pipeline.vlm.verb_ffns import AddTo, initial_verb_ffns, stored_verb_ffns, whole_beside
from pipeline.vlm.verbalizer import VerbalizedVLM
from pipeline.vlm.vocabulary import CommonVocabulary, common_vocabulary
from pipeline.vocabulary_map import VocabularyMap


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The number format of weights and activations."""
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def encoders(recipe: Recipe, roles: Iterable[str]) -> dict[str, ChatEncoder]:
    """{role: chat encoder} for "teacher" and "student". Models with equal processors share one encoder.

    Raises RecipeError where a model's chat template or processor cannot take any chat.
    """
    made: dict[str, ChatEncoder] = {}
    for role in roles:
        encoder = chat_encoder(getattr(recipe, role).path, recipe.data, dtype_of(recipe))
        same = next((other for other in made.values() if _describe(other) == _describe(encoder)), None)
        if same is None:
            encoder.check()
        made[role] = same or encoder
    return made


def chat_encoder(folder: Path, data: Data, dtype: torch.dtype = torch.float32) -> ChatEncoder:
    """The encoder of one model's folder, with the limits that a recipe sets on its data; dtype: of its pixels."""
    return ChatEncoder(load_processor(folder), data.max_length, PixelLimits(data.min_pixels, data.max_pixels), dtype)


def shared_vocabulary(recipe: Recipe, made: dict[str, ChatEncoder]) -> CommonVocabulary:
    """The common vocabulary of both models. Raises RecipeError where an id means different tokens to them."""
    rows = [vocabulary_rows(model.path) for model in (recipe.teacher, recipe.student)]
    return common_vocabulary(made["teacher"].processor.tokenizer, made["student"].processor.tokenizer, *rows)


def mapped_vocabulary(recipe: Recipe, pair: MappedPair) -> VocabularyMap:
    """The teacher's ids as the student's, for vocabulary: mapped. Raises RecipeError where they have no text in common.

    Rows of a head beyond the tokenizer's last id are cut off, as padding is that the models of a shared one lack.
    """
    return pair.vocabulary_map(*(vocabulary_rows(model.path) for model in (recipe.teacher, recipe.student)))


def load_untrained(
    model: Model, recipe: Recipe, vocab: int, dtype: torch.dtype, seed: int, add_to: AddTo = whole_beside
) -> VerbalizedVLM:
    """A backbone with untrained verbalizers on its target layers. Under ZeRO-3: inside sharded_loading, its add_to."""
    backbone, layers = load_vlm(model.path, dtype, recipe.attention, parts=model.parts), target_layers(model)
    width, form = int(text_config(backbone).hidden_size), recipe.verbalizer.form
    ffns = initial_verb_ffns(layers, width, form, dtype, seed, add_to(backbone))
    return VerbalizedVLM(backbone, layers, ffns, vocab)


def load_trained(
    model: Model, recipe: Recipe, vocab: int, dtype: torch.dtype, verb_ffns: Path, add_to: AddTo = whole_beside
) -> VerbalizedVLM:
    """A backbone with the verbalizers of a file. Under ZeRO-3: inside sharded_loading, with its add_to.

    Raises RecipeError if they are for other layers or another form.
    """
    backbone = load_vlm(model.path, dtype, recipe.attention, parts=model.parts)
    return _with_stored(backbone, model, recipe, vocab, dtype, verb_ffns, add_to)


def student_with_verbalizers(
    recipe: Recipe, vocab: int, dtype: torch.dtype, verb_ffns: Path, add_to: AddTo = whole_beside
) -> VerbalizedVLM:
    """The student that stage 2 trains, with the verbalizers of stage 1 on its target layers, frozen by default."""
    backbone = load_student(recipe.student.path, dtype, recipe, recipe.interact)
    side = _with_stored(backbone, recipe.student, recipe, vocab, dtype, verb_ffns, add_to)
    side.verb_ffns.requires_grad_(recipe.interact.train_verbalizers)
    return side


def vocabulary_rows(folder: Path) -> int:
    """Rows of the language head of a Hugging Face folder, padding included."""
    return int(read_config(folder).get_text_config().vocab_size)


def _with_stored(
    backbone: nn.Module, model: Model, recipe: Recipe, vocab: int, dtype: torch.dtype, path: Path, add_to: AddTo
) -> VerbalizedVLM:
    layers, width = target_layers(model), int(text_config(backbone).hidden_size)
    ffns = stored_verb_ffns(path, layers, width, recipe.verbalizer.form, dtype, add_to(backbone))
    return VerbalizedVLM(backbone, layers, ffns, vocab)


def _describe(encoder: ChatEncoder) -> tuple[str, str, str]:
    processor = encoder.processor
    return (str(processor.to_dict()), str(processor.chat_template), processor.tokenizer.backend_tokenizer.to_str())
