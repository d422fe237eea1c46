"""LoRA on the student's decoder (peft): adapters in training, plain merged weights in exports.

peft's DoRA is left out: its forward reads a base layer's weight beside the layer's own call, where ZeRO-3 has it not
gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.recipe.schema import StudentTraining
from pipeline.vlm.parts import decoder_layers
from pipeline.vlm.whole import whole_folder

NAME = "default"
"""peft's name for the one adapter, a part of its parameters' names."""


def add_lora(model: nn.Module, training: StudentTraining, seed: int) -> None:
    """Put an adapter on the decoder's linear layers, all or those that the step names; nothing else trains then.

    Raises RecipeError where peft is not installed, or a named layer does not exist.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        raise RecipeError(
            "lora_rank is set, but peft is not installed: pip install -e '.[lora]' in the checkout"
        ) from None
    stack = decoder_layers(model)
    config = _config(training, adapted_layers(stack, training.lora_targets))
    with torch.random.fork_rng(devices=[]):  # the same adapters on every rank
        torch.manual_seed(seed)
        inject_adapter_in_model(config, stack)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def adapted_layers(stack: nn.Module, targets: tuple[str, ...] | None) -> list[str]:
    """Names of the linear layers of a decoder that get an adapter. Raises RecipeError for a target that none has."""
    linear = [name for name, part in stack.named_modules() if isinstance(part, nn.Linear)]
    if targets is None:
        return linear
    known = sorted({name.rpartition(".")[2] for name in linear})
    if unknown := sorted(set(targets) - set(known)):
        raise RecipeError(f"lora_targets: the decoder has no linear layer {unknown[0]}; it has {', '.join(known)}")
    return [name for name in linear if name.rpartition(".")[2] in targets]


def merge_lora(weights: dict[str, Tensor], rank: int, alpha: int) -> dict[str, Tensor]:
    """Whole weights of a model with adapters to those of a plain one: W + alpha / rank * B A, in float32.

    Empties `weights` as it goes, so that the model is not in memory twice.
    """
    adapters = {name: weights.pop(name) for name in list(weights) if "lora_" in name}
    plain = {}
    for name in list(weights):
        weight = weights.pop(name)
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            up, down = (adapters[f"{stem}.lora_{side}.{NAME}.weight"].float() for side in "BA")
            weight = (weight.float() + up @ down * (alpha / rank)).to(weight.dtype)
        plain[name.replace(".base_layer.", ".")] = weight
    return plain


def adapter_beside(model_folder: Path) -> Path:
    """Where the adapters are kept that were merged into a student."""
    return model_folder.with_name("adapter")


def save_adapter(weights: Mapping[str, Tensor], training: StudentTraining, base: Path, folder: Path) -> None:
    """Write the adapters among a model's whole weights as a folder that peft loads onto the model in `base`.

    The folder is whole or absent. Raises OSError, naming it, where the disk does not take it.
    """
    ending = f".lora_A.{NAME}.weight"
    config = _config(training, sorted(name.removesuffix(ending) for name in weights if name.endswith(ending)))
    config.base_model_name_or_path, config.inference_mode = str(base), True
    adapters = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor.contiguous()
        for name, tensor in weights.items()
        if "lora_" in name
    }
    with whole_folder(folder) as aside:
        config.save_pretrained(str(aside))
        save_file(adapters, aside / "adapter_model.safetensors", metadata={"format": "pt"})


def _config(training: StudentTraining, layers: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=layers,
    )
