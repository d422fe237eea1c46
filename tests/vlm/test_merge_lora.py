"""Merging LoRA adapters: the formula against float64, and no base weight kept beside the one it became."""

from __future__ import annotations

import weakref

import pytest
import torch

from pipeline.vlm.lora import merge_lora

RANK, ALPHA, WIDTH = 4, 8, 16


def with_adapters(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two adapted linear layers, one of them with a bias, and a weight without adapters."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"norm.weight": (WIDTH,), "q.base_layer.bias": (WIDTH,)}
    for part in "qk":
        shapes |= {f"{part}.base_layer.weight": (WIDTH, WIDTH), f"{part}.lora_A.default.weight": (RANK, WIDTH)}
        shapes |= {f"{part}.lora_B.default.weight": (WIDTH, RANK)}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(dtype):
    found, given = merge_lora(with_adapters(dtype), RANK, ALPHA), with_adapters(dtype)
    assert set(found) == {"norm.weight", "q.weight", "q.bias", "k.weight"}
    for part in "qk":
        base, down, up = (
            given[f"{part}.{name}.weight"].double() for name in ("base_layer", "lora_A.default", "lora_B.default")
        )
        expected = base + ALPHA / RANK * up @ down
        # One rounding to the dtype, and in float32 those of a sum of RANK + 1 products.
        error = (found[f"{part}.weight"].double() - expected).abs()
        assert (error <= torch.finfo(dtype).eps * (base.abs() + ALPHA / RANK * up.abs() @ down.abs())).all()
    assert torch.equal(found["norm.weight"], given["norm.weight"])
    assert torch.equal(found["q.bias"], given["q.base_layer.bias"])


def test_the_model_is_not_in_memory_twice():
    weights = with_adapters(torch.float32)
    adapted = [weakref.ref(weights[f"{part}.base_layer.weight"]) for part in "qk"]
    merge_lora(weights, RANK, ALPHA)
    assert not weights and all(base() is None for base in adapted)
