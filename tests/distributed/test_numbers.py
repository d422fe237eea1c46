"""Ranks, ZeRO stage and accumulation change speed and memory, never the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import deepspeed, tiny_recipe
from safetensors.torch import load_file
from tiny import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "train", 24)


def finetune(folder: Path, models, kind: str, data: Path, ranks: int, zero: str, cut: dict[str, int]):
    """Three updates of plain finetuning with no interaction: (metrics, exported weights)."""
    recipe = tiny_recipe(folder, models, kind, data, zero, interact={"steps": 0}, reinforce={"steps": 3, **cut})
    deepspeed(ranks, "train.py", "--stage", 2, "--only", "reinforce", "--recipe", recipe)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(folder / "run" / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory, tiny_models, data):
    """One rank, no ZeRO, the whole global batch at once."""
    folder = tmp_path_factory.mktemp("reference")
    return request.param, finetune(
        folder, tiny_models, request.param, data, ranks=1, zero="zero0", cut={"micro_batch_size": 8}
    )


@pytest.mark.parametrize(
    ("reference", "ranks", "zero", "cut"),
    [
        ("qwen2_vl", 2, "zero0", {"micro_batch_size": 2}),
        ("qwen2_vl", 2, "zero2", {"micro_batch_size": 4}),
        ("qwen2_vl", 2, "zero3_cpu", {"micro_batch_size": 4}),
        ("qwen2_vl", 2, "zero3_offload", {"micro_batch_size": 2}),
        ("qwen2_vl", 2, "zero3_cpu", {"micro_batch_size": 1}),
        ("qwen2_vl", 1, "zero3_cpu", {"micro_batch_size": 2}),
        ("llava_onevision", 2, "zero3_cpu", {"micro_batch_size": 1}),
        ("qwen2_vl", 2, "zero0", {"micro_batch_tokens": 110}),
        ("qwen2_vl", 2, "zero2", {"micro_batch_tokens": 110}),
        ("qwen2_vl", 2, "zero3_cpu", {"micro_batch_tokens": 110}),
        ("qwen2_vl", 2, "zero3_cpu", {"micro_batch_tokens": 1}),
        ("llava_onevision", 1, "zero2", {"micro_batch_tokens": 110}),
    ],
    indirect=["reference"],
)
def test_two_ranks_and_accumulation_equal_one_big_batch(reference, tiny_models, data, tmp_path, ranks, zero, cut):
    kind, (lines, weights) = reference
    ours, our_weights = finetune(tmp_path, tiny_models, kind, data, ranks, zero, cut)
    # Responses have 3 to 17 tokens, so a mean of means would be off in the first digit.
    for expected, found in zip(lines, ours, strict=True):
        assert found["tokens"] == expected["tokens"]
        assert found["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=2e-6)
    start = load_file(tiny_models[kind, "student"] / "model.safetensors")
    for name, expected in weights.items():
        # Relative to how far the tensor has moved: Adam turns float32 noise in tiny gradients into noise of that size.
        moved = (expected - start[name]).norm()
        assert (our_weights[name] - expected).norm() <= 2e-3 * moved + 1e-7, name
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
