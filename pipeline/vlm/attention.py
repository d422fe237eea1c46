"""Whether a model's attention can be computed as a recipe asks: found out before any weight is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import is_flash_attn_2_available

from pipeline.errors import RecipeError

SUPPORTED_BY = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
"""transformers' mark on a model class for each implementation that not every family has; all have eager."""

AMPERE = (8, 0)
"""The least compute capability that FlashAttention-2 has kernels for."""


def check_attention(attention: str, dtype: torch.dtype) -> None:
    """Raise RecipeError with all that this machine and this dtype lack for it."""
    lacking = _lacking_for_flash(dtype) if attention == "flash_attention_2" else []
    if lacking:
        raise RecipeError(
            f"attention: {attention} needs {'; '.join(lacking)}. Set attention: sdpa in the recipe, which is everywhere"
        )


def check_family_attention(attention: str, folder: Path | str) -> None:
    """Raise RecipeError if transformers cannot compute it for the family of the model in the folder."""
    config = AutoConfig.from_pretrained(folder)
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    mark = SUPPORTED_BY.get(attention)
    if kind is not None and mark is not None and not getattr(kind, mark, False):
        instead = "eager" if attention == "sdpa" else "sdpa or eager"
        raise RecipeError(
            f"attention: {attention} cannot be had for {folder}: transformers has none for model_type "
            f"'{config.model_type}'. Set attention: {instead} in the recipe"
        )


def _lacking_for_flash(dtype: torch.dtype) -> list[str]:
    lacking = []
    gpu = torch.cuda.is_available()
    if not gpu:
        lacking.append("a GPU, and torch finds none")
    elif torch.cuda.get_device_capability() < AMPERE:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        lacking.append(f"a GPU of compute capability 8.0 or more, and this one has {found}")
    if find_spec("flash_attn") is None or (gpu and not is_flash_attn_2_available()):
        lacking.append("the package flash-attn, 2.3.3 or later (pip install flash-attn --no-build-isolation)")
    if dtype not in (torch.bfloat16, torch.float16):
        lacking.append(f"precision: bf16, and the models' is {str(dtype).removeprefix('torch.')}")
    return lacking
