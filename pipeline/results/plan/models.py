"""The two models as a plan needs them: sizes and numbers of elements, from config.json. No weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from pipeline.errors import RecipeError
from pipeline.recipe.checks import target_layers
from pipeline.recipe.schema import Model, ModelParts, Recipe, StudentTraining
from pipeline.vlm.lora import add_lora
from pipeline.vlm.parts import (
    decoder_layers,
    image_parts,
    lm_head,
    parts_of,
    recognise,
    set_trainable,
    text_config,
)
from pipeline.vlm.structure import POSITIONS
from pipeline.vlm.verbalizer import VerbFFN

_OF_EXPERTS = re.compile(r"(^|\.)experts\.")
"""Found in the name of a parameter of routed experts; shared ones serve every token."""
_GRID = ("spatial_merge_size", "merge_kernel_size", "merge_size")
"""Fields of families that take images of any size, and say with it how many patches lie along a side of the square
that becomes one image token."""
_SIDES = (
    *_GRID,
    "scale_factor",
    "downsample_factor",
    "hidden_stride",
    "projector_pooling_ratio",
    "pooling_kernel_size",
)
"""All fields that say it."""
_INVERSE_SIDES = ("downsample_ratio", "pixel_shuffle_ratio")
"""Fields that say the inverse of it."""
_TOKENS = ("mm_tokens_per_image",)
"""Fields that say how many image tokens an image has, whose size is always the same then."""


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor of a model."""

    module: str
    """Name of the module that holds it: ZeRO-3 gathers the parameters of one module together."""
    elements: int
    trained: bool = False


@dataclass(frozen=True)
class PlannedModel:
    """One model of a recipe, on torch's meta device: shapes without weights."""

    role: str
    """"teacher" or "student"."""
    module: nn.Module
    layers: tuple[int, ...]
    """Target layers, counted from 1."""

    @property
    def width(self) -> int:
        """d, the width of the decoder."""
        return int(text_config(self.module).hidden_size)

    @property
    def depth(self) -> int:
        """L, the number of decoder layers."""
        return int(text_config(self.module).num_hidden_layers)

    @property
    def rows(self) -> int:
        """Rows of the language head, including the vocabulary's padding."""
        return int(text_config(self.module).vocab_size)

    @property
    def head_module(self) -> str:
        """Name of the module that holds the language head's weight: of a tied head the embedding's."""
        weight = lm_head(self.module).weight
        return next(name for name, tensor in self.module.named_parameters() if tensor is weight).rpartition(".")[0]

    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of the modules; a tied head is counted once."""
        found = []
        for name, tensor in self.module.named_parameters():
            found.append(Parameter(name.rpartition(".")[0], tensor.numel(), tensor.requires_grad))
        return found

    def elements(self) -> int:
        """Number of parameters."""
        return sum(tensor.numel() for tensor in self.module.parameters())

    def decoder_elements(self, trained: bool = False) -> float:
        """Elements of the decoder layers' matrices that a token is multiplied with: of experts those that it goes to.

        trained: of those that train alone.
        """
        share = _routed_share(text_config(self.module))
        return sum(
            tensor.numel() * (share if _OF_EXPERTS.search(name) else 1.0)
            for name, tensor in decoder_layers(self.module).named_parameters()
            if tensor.dim() > 1 and (tensor.requires_grad or not trained)
        )

    @property
    def dense_layers(self) -> int:
        """Decoder layers without experts."""
        layers = decoder_layers(self.module)
        return sum(not any(_OF_EXPERTS.search(name) for name, _ in layer.named_parameters()) for layer in layers)

    def verb_ffns(self, form: str, trained: bool) -> list[Parameter]:
        """The parameters of the verb-FFNs of all target layers."""
        with torch.device("meta"):
            block = VerbFFN(self.width, form)
        each = [(name.rpartition(".")[0], tensor.numel()) for name, tensor in block.named_parameters()]
        return [
            Parameter(f"verb_ffns.{layer}.{name}", elements, trained)
            for layer in self.layers
            for name, elements in each
        ]


@dataclass(frozen=True)
class Vision:
    """The image encoder's sizes."""

    blocks: int
    width: int
    inner: int
    """Width inside a block's MLP."""
    patch_numbers: int
    """Numbers of one patch as the model gets it."""
    patches_per_token: int
    """Patches that become one image token of the decoder."""
    elements: int
    """Elements of the tower's matrices, without the projectors: each patch is multiplied with them."""
    projector_elements: int
    """Elements of the projectors' matrices: each image token is multiplied with them."""
    spans: tuple[float, ...]
    """Of each block, the patches among which its attention is at most: those of a tile, or of a window."""


def vision_of(model: PlannedModel) -> Vision:
    """The image encoder's sizes, from the model's config."""
    whole: Any = model.module.config
    config = whole.vision_config
    width = _size(config, "embed_dim", "hidden_size")
    inner = int(width * config.mlp_ratio) if hasattr(config, "mlp_ratio") else _size(config, "intermediate_size")
    patch = _size(config, "patch_size")
    channels = int(getattr(config, "in_channels", None) or getattr(config, "num_channels", None) or 3)
    projector = sum(_matrix_elements(model.module.get_submodule(name)) for name in parts_of(model.module).projectors)
    tower = sum(_matrix_elements(model.module.get_submodule(name)) for name in _outermost(image_parts(model.module)))
    blocks = _size(config, "depth", "num_hidden_layers")
    return Vision(
        blocks=blocks,
        width=width,
        inner=inner,
        patch_numbers=channels * int(getattr(config, "temporal_patch_size", 1)) * patch * patch,
        patches_per_token=_patches_per_token(whole),
        elements=tower - projector,
        projector_elements=projector,
        spans=tuple(_span(whole, block) for block in range(blocks)),
    )


def _patches_per_token(config: Any) -> int:
    """Patches that become one image token, from whichever field a family has for that; 1 where it has none."""
    for part in (config, config.vision_config):
        if any(getattr(part, name, None) for name in _SIDES):
            return _size(part, *_SIDES) ** 2
        for name in _INVERSE_SIDES:
            if ratio := getattr(part, name, None):
                return round(ratio**-2)
        if any(getattr(part, name, None) for name in _TOKENS):
            return round(_tile(config.vision_config) / _size(part, *_TOKENS))
    return 1


def _span(config: Any, block: int) -> float:
    """Patches among which a block of the image encoder attends at most: its window, a tile, or an image of any size."""
    vision = config.vision_config
    window = getattr(vision, "window_size", None)
    if window and block not in (getattr(vision, "fullatt_block_indexes", None) or ()):
        return (window // _size(vision, "patch_size")) ** 2
    any_size = any(getattr(part, name, None) for part in (config, vision) for name in _GRID)
    return math.inf if any_size or getattr(vision, "image_size", None) is None else _tile(vision)


def _tile(vision: Any) -> int:
    """Patches of an image, or of a tile of it, of an encoder that takes them in one size."""
    return (_size(vision, "image_size") // _size(vision, "patch_size")) ** 2


def planned_model(role: str, model: Model) -> PlannedModel:
    """A recipe's model from its config.json. Raises RecipeError where there is none, or where its family is unknown."""
    return PlannedModel(role, _on_meta(model.path, model.parts), target_layers(model))


def planned_student(model: Model, training: StudentTraining, train: Collection[str]) -> PlannedModel:
    """The student with what a step of stage 2 trains: adapters, or its own weights."""
    module = _build(_config(model.path))
    recognise(module, model.parts)
    if training.lora_rank:
        with torch.device("meta"):
            add_lora(module, training, seed=0)
    else:
        set_trainable(module, train)
    return PlannedModel("student", module, target_layers(model))


def vocabulary_size(recipe: Recipe, teacher: PlannedModel, student: PlannedModel) -> int:
    """V, an upper bound of what distributions are over; the tokenizers decide.

    Of a shared vocabulary the rows that both heads have; of a mapped one those of the larger head, and the bucket.
    """
    rows = (teacher.rows, student.rows)
    return min(rows) if recipe.vocabulary == "shared" else max(rows) + 1


def modules_in_order(parameters: list[Parameter]) -> Iterator[int]:
    """The elements of each module's own parameters, in the order of the modules."""
    sizes: dict[str, int] = {}
    for parameter in parameters:
        sizes[parameter.module] = sizes.get(parameter.module, 0) + parameter.elements
    yield from sizes.values()


def _size(config: Any, *names: str) -> int:
    """A size that families call by different names: the first that the config has. Raises StopIteration without."""
    size = next(getattr(config, name) for name in names if getattr(config, name, None) is not None)
    return int(size[0] if isinstance(size, (list, tuple)) else size)  # InternVL: [height, width]


def _routed_share(config: Any) -> float:
    """Share of a text model's experts that one token goes to; 1 where it has none."""
    try:
        chosen = _size(config, "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
        experts = _size(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    except StopIteration:
        return 1.0
    # transformers' Llama 4 gives every token to all experts, most of them scaled by 0.
    return 1.0 if config.model_type == "llama4_text" else chosen / experts


def _matrix_elements(part: nn.Module) -> int:
    """Of what its inputs are multiplied with: positions are added."""
    named = part.named_parameters()
    return sum(tensor.numel() for name, tensor in named if tensor.dim() > 1 and not POSITIONS.search(name))


def _outermost(names: tuple[str, ...]) -> list[str]:
    """Without those that lie inside another."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


@lru_cache
def _on_meta(folder: Path, parts: ModelParts) -> nn.Module:
    module = _build(_config(folder))
    recognise(module, parts)
    return module.requires_grad_(False).eval()


def _build(config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"no {folder}/config.json: a plan needs each model's config.json, and nothing else of its folder. Copy it "
            "there, or name a folder that has it: --set teacher.path=DIR student.path=DIR"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"{folder}/config.json is not the config of a model that transformers knows: {error}"
        ) from error
