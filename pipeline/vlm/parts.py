"""A model's parts, by their role in the method: decoder layers, final norm, head, and what images go through."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.recipe.schema import ModelParts
from pipeline.signal import Unembedding
from pipeline.vlm.families import family
from pipeline.vlm.structure import Parts, find_parts


@dataclass(frozen=True)
class LogitRule:
    """What a model does to its head's products: softcap * tanh(scale * products / softcap); no softcap: scale alone."""

    scale: float = 1.0
    softcap: float | None = None


def recognise(model: nn.Module, named: ModelParts | None = None) -> Parts:
    """Find a model's parts and keep them with it; `named`: those that the recipe names.

    Raises RecipeError for a part that is not found, saying how to name it.
    """
    given: Mapping[str, Any] = {} if named is None else named.model_dump(exclude_none=True)
    parts = find_parts(model, {**family(model).parts, **given})
    model._vlsi_parts = parts  # type: ignore[assignment]
    return parts


def parts_of(model: nn.Module) -> Parts:
    """The parts that were found when the model was loaded; found now where nobody has looked yet."""
    return getattr(model, "_vlsi_parts", None) or recognise(model)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The L decoder layers, layer 1 first."""
    return model.get_submodule(parts_of(model).layers)  # type: ignore[return-value]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the language head."""
    return model.get_submodule(parts_of(model).norm)


def lm_head(model: nn.Module) -> nn.Linear:
    """The language head."""
    return model.get_submodule(parts_of(model).head)  # type: ignore[return-value]


def text_config(model: nn.Module) -> Any:
    """Configuration of the language model inside."""
    return model.config.get_text_config()  # type: ignore[union-attr,operator]


def set_logit_rule(model: nn.Module, rule: LogitRule) -> None:
    """Keep what the probe found that the model does to its logits."""
    model._vlsi_logit_rule = rule  # type: ignore[assignment]


def logit_rule(model: nn.Module) -> LogitRule:
    """What the probe found that the model does to its logits; before a probe, what its config says."""
    found = getattr(model, "_vlsi_logit_rule", None)
    if found is not None:
        return found
    config = text_config(model)
    scale, softcap = getattr(config, "logit_scale", None), getattr(config, "final_logit_softcapping", None)
    return LogitRule(scale or 1.0, softcap)


def unembedding(model: nn.Module, weight, bias, vocab: int) -> Unembedding:
    """The head's tensors with whatever scaling or soft-cap the model applies to its logits."""
    rule = logit_rule(model)
    return Unembedding(weight=weight, bias=bias, vocab=vocab, scale=rule.scale, softcap=rule.softcap)


def image_parts(model: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that text alone does not reach."""
    parts = parts_of(model)
    return (*parts.vision, *parts.projectors)


def may_be_unused(model: nn.Module) -> tuple[str, ...]:
    """Endings of the names of parameters that a batch may leave without a gradient though nothing is wrong."""
    return family(model).may_be_unused


def set_trainable(model: nn.Module, train: Collection[str]) -> None:
    """Mark what stage 2 trains: the parts that `train` names, as in a recipe.

    Projectors may lie inside an image encoder; they follow "projector" alone. A head that is tied to the embeddings is
    the decoder's as well: it trains where both are named.
    """
    parts = parts_of(model)
    model.requires_grad_("decoder" in train)
    head = lm_head(model)
    tied = any(own is other for own in head.parameters() for other in _embeddings(model))
    head.requires_grad_("head" in train and ("decoder" in train or not tied))
    for name in parts.vision:
        model.get_submodule(name).requires_grad_("vision" in train)
    for name in parts.projectors:
        model.get_submodule(name).requires_grad_("projector" in train)
    for name in parts.others:
        model.get_submodule(name).requires_grad_(False)


def _embeddings(model: Any) -> list[nn.Parameter]:
    return list(model.get_input_embeddings().parameters())
