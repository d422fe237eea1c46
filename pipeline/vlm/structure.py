"""Where a model's parts are, found from its structure; pipeline/vlm/probe.py then checks what was found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.errors import RecipeError


@dataclass(frozen=True)
class Parts:
    """Names of a model's parts, from the model that AutoModelForImageTextToText gives; "" is the model itself."""

    body: str
    """What computes the hidden states without the language head; "" where only the whole model does."""
    layers: str
    """The list of the decoder layers."""
    norm: str
    """The norm between the last decoder layer and the head."""
    head: str
    """The language head, a linear layer."""
    vision: tuple[str, ...]
    """The image encoders: frozen in stage 2 unless the recipe trains them."""
    projectors: tuple[str, ...]
    """What maps their output into the decoder; trains in stage 2, also where it lies inside an image encoder."""
    others: tuple[str, ...] = ()
    """What neither text nor an image reaches, such as an audio encoder: never trains."""


NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "embedding_norm", "norm_f", "layer_norm")
"""Names of the final norm, beside the list of layers, likeliest first."""
PROJECTOR = re.compile(r"proj|merger|connector|align|adapter|resampler|qformer|neck|abstractor")
"""Found in the name of a part between an image encoder and the decoder."""
VISION = re.compile(r"vision|visual|image")
"""Found in the name of an image encoder."""
OTHER = re.compile(r"audio|speech|sound|video|generation|vq")
"""Found in the name of a part that neither text nor an image reaches."""
POSITIONS = re.compile("pos")
"""Found in the name of a table of positions, and in that of no table of tokens."""


def find_parts(model: Any, named: Mapping[str, Any]) -> Parts:
    """The parts of a model; `named`: those that the recipe names, by their fields' names in it.

    Raises RecipeError for the first part that is not found, or whose name in the recipe is no module of the model.
    """
    if model.config.get_text_config().is_encoder_decoder:
        kind = model.config.model_type
        raise RecipeError(f"model_type '{kind}' has an encoder and a decoder for text; expected a decoder alone")
    layers = _layers(model, named.get("decoder"))
    norm = _norm(model, layers, named.get("norm"))
    head = _head(model, named.get("head"))
    body = _body(model, layers, head)
    vision, projectors, others = _image_parts(model, body, layers, head)
    if named.get("vision") is not None:
        vision = tuple(_existing(model, "vision", name) for name in named["vision"])
    if named.get("projector") is not None:
        projectors = tuple(_existing(model, "projector", name) for name in named["projector"])
    vision = tuple(name for name in vision if name not in projectors)
    if not vision and not projectors:
        raise not_recognised(model, "vision", "no module outside the decoder that an image could go through")
    return Parts(body, layers, norm, head, vision, projectors, tuple(set(others) - {*vision, *projectors}))


def not_recognised(model: Any, field: str, found: str) -> RecipeError:
    """The error for a part that was not recognised: field of `parts` in the recipe, and what was found instead."""
    example = f"[{_EXAMPLES[field]}]" if field in ("vision", "projector") else _EXAMPLES[field]
    children = ", ".join(f"{name} ({type(part).__name__})" for name, part in _upper(model))
    return RecipeError(
        f"{field} of model_type '{model.config.model_type}' was not recognised: {found}. Name it in the recipe, as in "
        f"teacher.parts or student.parts: {{{field}: {example}}}. The model's parts are {children}"
    )


_EXAMPLES = {
    "decoder": "model.language_model",
    "norm": "model.language_model.norm",
    "head": "lm_head",
    "vision": "model.vision_tower",
    "projector": "model.multi_modal_projector",
}


def name_of(model: nn.Module, part: object) -> str | None:
    """The name of a submodule, "" for the model itself; None where it is no part of the model."""
    return next((name for name, module in model.named_modules() if module is part), None)


def read_uncalled(model: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """(module, weight) where a module may read the weight of a part without calling it.

    As linear attention does with its convolution, and towers that resize their table of positions. ZeRO-3 gathers a
    weight for the module that is called.
    """
    return [
        (part, weight)
        for part in model.modules()
        for name, child in part.named_children()
        if isinstance(child, nn.Conv1d) or (isinstance(child, nn.Embedding) and POSITIONS.search(name))
        for weight in child.parameters()
    ]


def _layers(model: Any, named: str | None) -> str:
    """Name of the list of as many decoder layers as the config has: in the decoder, wherever it keeps them."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if named is not None:
        decoder, prefix = model.get_submodule(_existing(model, "decoder", named)), named
    else:
        decoder = model.get_decoder()
        prefix = name_of(model, decoder) or ""
    lists = [
        (".".join(filter(None, (prefix, name))), part)
        for name, part in decoder.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == depth
    ]
    if not lists:
        raise not_recognised(model, "decoder", f"{prefix or 'the model'} holds no list of its {depth} decoder layers")
    least = min(name.count(".") for name, _ in lists)
    outer = [name for name, _ in lists if name.count(".") == least]
    preferred = [name for name in outer if name.rpartition(".")[2] == "layers"] or outer
    if len(preferred) > 1:
        raise not_recognised(model, "decoder", f"{' and '.join(preferred)} are both lists of {depth} layers")
    return preferred[0]


def _norm(model: Any, layers: str, named: str | None) -> str:
    if named is not None:
        return _existing(model, "norm", named)
    holder = layers.rpartition(".")[0]
    beside = {name for name, part in model.get_submodule(holder).named_children() if _is_norm(part)}
    for name in NORMS:
        if name in beside:
            return f"{holder}.{name}" if holder else name
    raise not_recognised(model, "norm", f"beside {layers} there is {', '.join(sorted(beside)) or 'no norm'}")


def _head(model: Any, named: str | None) -> str:
    part = model.get_output_embeddings() if named is None else model.get_submodule(_existing(model, "head", named))
    if part is None:  # no accessor; transformers' own name for it
        part = next((inner for name, inner in model.named_modules() if name.rpartition(".")[2] == "lm_head"), None)
    config = model.config.get_text_config()
    width, rows = getattr(config, "hidden_size", 0), getattr(config, "vocab_size", 0)
    if not isinstance(part, nn.Linear) or part.in_features != width or part.out_features < rows:
        sizes = f" from {part.in_features} to {part.out_features}" if isinstance(part, nn.Linear) else ""
        found = type(part).__name__ + sizes
        raise not_recognised(model, "head", f"expected a linear layer from {width} to {rows} or more, found {found}")
    return name_of(model, part) or ""


def _body(model: Any, layers: str, head: str) -> str:
    """transformers' own base model, where it holds the layers and not the head."""
    name = model.base_model_prefix if model.base_model is not model else ""
    return name if name and _inside(layers, name) and not _inside(head, name) else ""


def _image_parts(
    model: Any, body: str, layers: str, head: str
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(image encoders, projectors, what neither text nor images reach): all parts beside the decoder."""
    encoder = name_of(model, model.get_encoder(modality="image"))
    vision, projectors, others = [], [], []
    for name, part in _beside_decoder(model, body, layers, head):
        word = name.rpartition(".")[2]
        if name == encoder or (VISION.search(word) and not PROJECTOR.search(word) and _is_deep(part)):
            vision.append(name)
        elif OTHER.search(word):
            others.append(name)
        else:
            projectors.append(name)
    inside = [f"{tower}.{name}" for tower in vision for name, part in model.get_submodule(tower).named_children()
              if PROJECTOR.search(name) and _has_weights(part)]  # fmt: skip
    return tuple(vision), tuple(projectors or inside), tuple(others)


def _beside_decoder(model: nn.Module, body: str, layers: str, head: str) -> Iterator[tuple[str, nn.Module]]:
    """The parts of the model and of its body that hold weights, but neither the decoder layers nor the head."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    holder = layers.rpartition(".")[0]
    for parent in dict.fromkeys(("", body)):
        if parent == holder:  # what lies beside the layers is the decoder's
            continue
        for child, part in model.get_submodule(parent).named_children():
            name = f"{parent}.{child}" if parent else child
            if _inside(layers, name) or _inside(head, name) or part is embedding or not _has_weights(part):
                continue
            yield name, part


def _upper(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The upper two levels of a model's parts."""
    return [(name, part) for name, part in model.named_modules() if name and name.count(".") < 2]


def _existing(model: nn.Module, field: str, name: str) -> str:
    if name not in dict(model.named_modules()):
        raise not_recognised(model, field, f"the recipe names {name}, and the model has no such module")
    return name


def _inside(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def _has_weights(part: nn.Module) -> bool:
    return next(part.parameters(), None) is not None


def _is_deep(part: nn.Module) -> bool:
    """Whether it is a stack of layers, and not one or two of them."""
    return any(isinstance(inner, nn.ModuleList) for inner in part.modules())


def _is_norm(part: nn.Module) -> bool:
    return "norm" in type(part).__name__.lower()
