"""All that the project knows about single model families: where their parts are. One row each, keyed by model_type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.errors import RecipeError
from pipeline.signal import Unembedding


@dataclass(frozen=True)
class Family:
    """Names of a model's parts, from the model that AutoModelForImageTextToText gives."""

    vision_tower: str
    """The image encoder: frozen in stage 2 unless the recipe trains it."""
    projectors: tuple[str, ...]
    """What maps the tower's output into the decoder; trains in stage 2, also where it lies inside the tower."""
    decoder: str = "model.language_model"
    """The decoder stack, with its `layers` and final `norm`."""
    may_be_unused: tuple[str, ...] = ()
    """Parameters that a batch may leave without a gradient though nothing is wrong."""


_QWEN = Family("model.visual", ("model.visual.merger",))
FAMILIES = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": Family("model.visual", ("model.visual.merger", "model.visual.deepstack_merger_list")),
    "llava": Family("model.vision_tower", ("model.multi_modal_projector",)),
    "llava_onevision": Family(
        "model.vision_tower", ("model.multi_modal_projector",), may_be_unused=("model.image_newline",)
    ),
}


def family(model: nn.Module) -> Family:
    """Raise RecipeError for a model_type that the table does not know."""
    kind: str = model.config.model_type  # type: ignore[union-attr,assignment]
    if kind not in FAMILIES:
        raise RecipeError(
            f"model_type '{kind}' is not supported; known: {', '.join(FAMILIES)}. A new family is one row in "
            "pipeline/vlm/families.py"
        )
    return FAMILIES[kind]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The L decoder layers, layer 1 first."""
    return model.get_submodule(family(model).decoder).layers  # type: ignore[return-value]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the language head."""
    return model.get_submodule(family(model).decoder).norm  # type: ignore[return-value]


def lm_head(model: nn.Module) -> nn.Linear:
    """The language head."""
    return model.get_output_embeddings()  # type: ignore[operator]


def text_config(model: nn.Module) -> Any:
    """Configuration of the language model inside."""
    return model.config.get_text_config()  # type: ignore[union-attr,operator]


def unembedding(model: nn.Module, weight, bias, vocab: int) -> Unembedding:
    """The head's tensors with whatever scaling or soft-cap the model applies to its logits."""
    config = text_config(model)
    return Unembedding(
        weight=weight,
        bias=bias,
        vocab=vocab,
        scale=getattr(config, "logit_scale", None) or 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def image_parts(model: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that text alone does not reach."""
    parts = family(model)
    return (parts.vision_tower, *parts.projectors)


def set_trainable(model: nn.Module, train_vision: bool, train_projector: bool) -> None:
    """Mark what stage 2 trains: the decoder and its head, and of the rest what is asked for.

    Projectors may lie inside the vision tower; they follow train_projector alone.
    """
    parts = family(model)
    model.requires_grad_(True)
    model.get_submodule(parts.vision_tower).requires_grad_(train_vision)
    for name in parts.projectors:
        model.get_submodule(name).requires_grad_(train_projector)
