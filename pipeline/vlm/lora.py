"""LoRA on the student's decoder (peft): adapters in training, plain merged weights in exports."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.vlm.families import decoder_layers


def add_lora(model: nn.Module, rank: int, alpha: int, seed: int) -> None:
    """Put an adapter on every linear layer of the decoder; nothing else trains from here on.

    Raises RecipeError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise RecipeError("lora_rank is set, but peft is not installed: pip install -e '.[lora]'") from None
    stack = decoder_layers(model)
    names = [name for name, part in stack.named_modules() if isinstance(part, nn.Linear)]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)
    with torch.random.fork_rng(devices=[]):  # the same adapters on every rank
        torch.manual_seed(seed)
        inject_adapter_in_model(config, stack)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


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
            product = (
                adapters[f"{stem}.lora_B.default.weight"].float() @ adapters[f"{stem}.lora_A.default.weight"].float()
            )
            weight = (weight.float() + product * (alpha / rank)).to(weight.dtype)
        plain[name.replace(".base_layer.", ".")] = weight
    return plain
