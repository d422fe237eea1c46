"""Load a vision-language model, and compute its hidden states at chosen layers and positions, without its head.

T response positions of the batch, d width, L number of layers asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from pipeline.errors import RecipeError
from pipeline.recipe.schema import Recipe, StudentTraining
from pipeline.vlm.attention import check_attention, check_family_attention
from pipeline.vlm.families import decoder_layers, family, set_trainable
from pipeline.vlm.lora import add_lora


def load_vlm(
    folder: Path | str,
    dtype: torch.dtype,
    attention: str = "sdpa",
    device_map: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a Hugging Face VLM folder. Inside sharded_loading, ZeRO-3 shards it as it loads.

    attention: as in the recipe. device_map: {module name: device} to load onto, "" for the whole model; None: onto the
    CPU. Raises RecipeError if the attention cannot be had here, before anything is loaded; also if the folder is no
    VLM, its family is unknown, or its weights do not fit its config.
    """
    check_attention(attention, dtype)
    try:
        check_family_attention(attention, folder)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            device_map=None if device_map is None else dict(device_map),
            output_loading_info=True,
        )
        model, report = loaded
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder} could not be loaded as an image-text-to-text model: {error}") from error
    absent = sorted(report.get("missing_keys") or ())
    if absent:
        raise RecipeError(f"{folder}: {len(absent)} weight(s) missing from its safetensors, first {absent[0]}")
    family(model)
    _forget_unused_renamings(model)
    return model


def load_student(folder: Path | str, dtype: torch.dtype, recipe: Recipe, training: StudentTraining) -> nn.Module:
    """Load the model that a step of stage 2 trains.

    Parameters that train require gradients; LoRA adapters are added.
    """
    model: Any = load_vlm(folder, dtype, recipe.attention)
    if training.lora_rank:
        add_lora(model, training.lora_rank, training.lora_alpha, recipe.seed)
    else:
        set_trainable(model, recipe.train_vision, recipe.train_projector)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def run_backbone(model: nn.Module, inputs: dict[str, Tensor], layers: Sequence[int], positions: Tensor) -> list[Tensor]:
    """Hidden states [T, d] after each of the given decoder layers (counted from 1), before any final norm.

    Only the given positions are kept: no [B, S, d] tensor stays in memory for the heads. Each layer's states lie on
    that layer's device.
    """

    def gather(hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1)[positions.to(hidden.device)]

    # With gradients autograd keeps the layers' outputs anyway, and what a hook does to them may lie inside the part
    # that gradient checkpointing runs again, without the hook: so they are gathered behind the model.
    late = torch.is_grad_enabled()
    with _captured(model, layers, (lambda hidden: hidden) if late else gather) as states:
        model.model(**inputs, use_cache=False)  # type: ignore[operator]  # the model without its head
    return [gather(states[layer]) if late else states[layer] for layer in layers]


def _forget_unused_renamings(model: Any) -> None:
    """Keep of the renamings done while loading only those that matched a weight, for saving under the old names.

    transformers 5.23 does so itself, but not under ZeRO-3: there it would undo on saving what it never did on loading.
    """
    renamings = getattr(model, "_weight_conversions", None)
    if renamings is not None:
        model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]


@contextmanager
def _captured(
    model: nn.Module, layers: Sequence[int], keep_of: Callable[[Tensor], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """Collect a part of the outputs of layers, through forward hooks.

    transformers' own hidden_states would keep every layer whole, and its last entry is already normed.
    """
    states: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook(_module, _inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            states[layer] = keep_of(hidden)

        return hook

    stack = decoder_layers(model)
    handles = [stack[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
