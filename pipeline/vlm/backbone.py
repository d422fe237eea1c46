"""Load a vision-language model, and compute its hidden states at chosen layers and positions, without its head.

T response positions of the batch, d width, L number of layers asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.core_model_loading import WeightConverter

from pipeline.errors import RecipeError
from pipeline.recipe.schema import ModelParts, Recipe, StudentTraining
from pipeline.vlm.attention import check_attention, check_family_attention
from pipeline.vlm.faulty_kernels import avoid_faulty_kernels
from pipeline.vlm.lora import add_lora
from pipeline.vlm.parts import decoder_layers, lm_head, parts_of, recognise, set_trainable

SHAPES = "ignore_mismatched_sizes"
"""In transformers' error of weights that have other shapes than the config says."""


def load_vlm(
    folder: Path | str,
    dtype: torch.dtype,
    attention: str = "sdpa",
    device_map: Mapping[str, Any] | None = None,
    parts: ModelParts | None = None,
) -> nn.Module:
    """Load a Hugging Face VLM folder. Inside sharded_loading, ZeRO-3 shards it as it loads.

    attention: as in the recipe. device_map: {module name: device} to load onto, "" for the whole model; None: onto the
    CPU. parts: those that the recipe names. Raises RecipeError if the attention cannot be had here, before anything is
    loaded; also if the folder is no VLM, a part of it is not recognised, or its weights do not fit its config.
    """
    check_attention(attention, dtype)
    try:
        check_family_attention(attention, folder)
        with _whole_shapes():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                device_map=None if device_map is None else dict(device_map),
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,  # without it, a folder's pickles are read where it has no safetensors
            )
        model, report = loaded
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        # RuntimeErrors are of many kinds: out of memory, or a lost connection to another rank.
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError) and SHAPES not in str(error):
            raise
        raise RecipeError(
            f"{folder} could not be loaded as an image-text-to-text model: {error}{_found_pickles(folder)}"
        ) from error
    absent = sorted(report.get("missing_keys") or ())
    if absent:
        raise RecipeError(f"{folder}: {len(absent)} weight(s) missing from its safetensors, first {absent[0]}")
    recognise(model, parts)
    avoid_faulty_kernels(model)
    _forget_unused_renamings(model)
    return model


def _found_pickles(folder: Path | str) -> str:
    """What to do about weights that are there, but as pickles; empty where there are none."""
    pickles = sorted(path.name for path in Path(folder).glob("*.bin"))
    if not pickles or any(Path(folder).glob("*.safetensors")):
        return ""
    return (
        f" {pickles[0]} is a pickle and is not read. Convert it once: model.save_pretrained(FOLDER) with transformers "
        "writes safetensors"
    )


def load_student(folder: Path | str, dtype: torch.dtype, recipe: Recipe, training: StudentTraining) -> nn.Module:
    """Load the model that a step of stage 2 trains.

    Parameters that train require gradients; LoRA adapters are added.
    """
    model: Any = load_vlm(folder, dtype, recipe.attention, parts=recipe.student.parts)
    if training.lora_rank:
        add_lora(model, training, recipe.seed)
    else:
        set_trainable(model, recipe.train)
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
        _run_body(model, inputs)
    return [gather(states[layer]) if late else states[layer] for layer in layers]


def _run_body(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Run the model without its head; where the two are one module, the head sees a single token of the batch."""
    body = parts_of(model).body
    if body:
        model.get_submodule(body)(**inputs, use_cache=False)
        return
    handle = lm_head(model).register_forward_pre_hook(lambda _head, hidden: (hidden[0][:1, :1], *hidden[1:]))
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()


@contextmanager
def _whole_shapes() -> Iterator[None]:
    """While a model loads, let transformers see the whole shape of a parameter that ZeRO-3 has cut to nothing.

    transformers 5.24 transposes a family's experts (Qwen3-VL's) unless the file's have the parameter's shape already,
    and cuts others at its sizes: under ZeRO-3 it would transpose what is right as it is, silently where it is square.
    """

    def get_parameter(model: nn.Module, name: str) -> Tensor:
        parameter = nn.Module.get_parameter(model, name)
        shape = getattr(parameter, "ds_shape", None)
        return parameter if shape is None else torch.empty(shape, dtype=parameter.dtype, device="meta")

    def with_whole_shapes(converter: WeightConverter, *args: Any, **options: Any) -> Any:
        PreTrainedModel.get_parameter = get_parameter  # type: ignore[assignment,method-assign]
        try:
            return convert(converter, *args, **options)
        finally:  # at once: tying weights asks for the parameter itself
            del PreTrainedModel.get_parameter

    convert = WeightConverter.convert
    WeightConverter.convert = with_whole_shapes  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        WeightConverter.convert = convert  # type: ignore[method-assign]


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
