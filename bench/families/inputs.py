"""The probe of a model without its processor: random pixels in the forms that families take, and as many image tokens.

S tokens of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.families.shrink import SIDE
from pipeline.vlm.processing import Encoded

QUESTION, RESPONSE = [5, 6, 7, 8, 9], [11, 12, 13, 14]


def probe_rows(model: Any) -> tuple[Encoded, Encoded]:
    """A chat with an image and one without. Raises ValueError with each form of images that the model refused."""
    refused = []
    for images in _forms(model):
        try:
            tokens = _tokens(model, images)
        except Exception as error:  # any form may fail in any way
            refused.append(f"{ {name: list(value.shape) for name, value in images.items()} }: {_short(error)}")
            continue
        if tokens:
            return _row(model, tokens, images), _row(model, 0, {})
    raise ValueError("no form of images is taken: " + "; ".join(refused[:2]))


def _forms(model: Any) -> Iterator[dict[str, Tensor]]:
    """Images in the forms that families take, those with the most particular names first."""
    names = inspect.signature(model.forward).parameters
    vision = getattr(model.config, "vision_config", None) or model.config
    patch = _side(getattr(vision, "patch_size", 14))
    size = _side(getattr(vision, "image_size", None) or SIDE * patch)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    channels = channels if isinstance(channels, int) else 3
    temporal = getattr(vision, "temporal_patch_size", 1) or 1
    grid = torch.tensor([[1, SIDE, SIDE]])
    if "image_merge_sizes" in names:
        merge = torch.tensor([1])
        yield {
            "pixel_values": torch.randn(SIDE * SIDE, channels * patch * patch),
            "image_grid_thw": grid,
            "image_merge_sizes": merge,
        }
    if "image_grid_thw" in names:
        for frames in dict.fromkeys((temporal, 1, 2)):
            elements = channels * frames * patch * patch
            yield {"pixel_values": torch.randn(SIDE * SIDE, elements), "image_grid_thw": grid}
        yield {"pixel_values": torch.randn(SIDE * SIDE, channels, patch, patch), "image_grid_thw": grid}
        yield {"pixel_values": torch.randn(SIDE * SIDE * patch * patch, channels), "image_grid_thw": grid}
    whole = torch.randn(1, channels, size, size)
    if "spatial_shapes" in names:
        mask, shapes = torch.ones(1, SIDE * SIDE, dtype=torch.long), torch.tensor([[SIDE, SIDE]])
        pixels = torch.randn(1, SIDE * SIDE, channels * patch * patch)
        yield {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}
    sizes = torch.tensor([[size, size]])
    if "image_sizes" in names:
        for tiles in (2, 3):
            yield {"pixel_values": whole[:, None].repeat(1, tiles, 1, 1, 1), "image_sizes": sizes}
        yield {"pixel_values": whole, "image_sizes": sizes}
    if "pixel_attention_mask" in names:
        for tiles in (2, 5):
            tiled = whole[:, None].repeat(1, tiles, 1, 1, 1)
            yield {"pixel_values": tiled, "pixel_attention_mask": torch.ones(1, tiles, dtype=torch.bool)}
        for tiles in (1, 2):
            mask = torch.ones(1, tiles, size, size, dtype=torch.long)
            yield {"pixel_values": whole[:, None].repeat(1, tiles, 1, 1, 1), "pixel_attention_mask": mask}
    if "image_position_ids" in names:
        side = 2 * int(getattr(vision, "pooling_kernel_size", 1))
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None]
        for pooled in (patch, patch * side // 2):
            yield {"pixel_values": torch.rand(1, side * side, channels * pooled**2), "image_position_ids": places}
    if "image_grid_hw" in names:
        yield {"pixel_values": whole, "image_grid_hw": grid[:, 1:]}
        yield {"pixel_values": torch.randn(SIDE * SIDE, channels * patch * patch), "image_grid_hw": grid[:, 1:]}
    if "high_res_pixel_values" in names:
        high = _side(getattr(model.config.high_res_vision_config, "image_size", size))
        yield {"pixel_values": whole, "high_res_pixel_values": torch.randn(1, channels, high, high)}
    yield {"pixel_values": whole, "target_sizes": torch.tensor([[SIDE, SIDE]])}
    yield {"pixel_values": whole}
    yield {"pixel_values": whole[:, None]}
    yield {"pixel_values": torch.randn(1, SIDE * SIDE, channels * patch * patch)}
    yield {"pixel_values": whole.permute(0, 2, 3, 1)[:, None]}


def _tokens(model: Any, images: dict[str, Tensor]) -> int:
    """How many image tokens the model makes of them."""
    with torch.no_grad():
        features = (model if hasattr(model, "get_image_features") else model.base_model).get_image_features(**images)
    if hasattr(features, "last_hidden_state"):
        pooled = getattr(features, "pooler_output", None)
        features = features.last_hidden_state if pooled is None else pooled
    width = model.get_input_embeddings().weight.shape[1]
    if isinstance(features, (list, tuple)):
        return sum(one.numel() for one in features) // width
    return features.numel() // width


def _row(model: Any, tokens: int, images: dict[str, Tensor]) -> Encoded:
    names = inspect.signature(model.forward).parameters
    image = next(getattr(model.config, name) for name in ("image_token_id", "image_token_index") if _has(model, name))
    ids = torch.tensor([[*QUESTION[:2], *[image] * tokens, *QUESTION[2:], *RESPONSE]])
    response = torch.zeros(ids.shape[1], dtype=torch.bool)
    response[-len(RESPONSE) :] = True
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    if "mm_token_type_ids" in names:
        inputs["mm_token_type_ids"] = (ids == image).long()
    elif "token_type_ids" in names:
        of_prefix = model.config.model_type == "paligemma"  # what its type 0 sees is not causal
        inputs["token_type_ids"] = response[None].long() if of_prefix else (ids == image).long()
    return Encoded("probe", inputs, response)


def _has(model: Any, name: str) -> bool:
    return getattr(model.config, name, None) is not None


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size["height"] if isinstance(size, dict) else size[0])


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
