"""In bfloat16, gradients are summed over micro-steps and ranks in float32: accumulation changes no number."""

from __future__ import annotations

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from small_engine import on_ranks, small_recipe
from torch import nn

RANKS, MICRO_STEPS, WIDTH = 2, 16, 257
MICRO_GRADIENTS = torch.randn(RANKS, MICRO_STEPS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
CONFIGS = ("zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload", "zero3_offload_optimizer")


class Dot(nn.Module):
    """The gradient of its weight is the input: each micro-step's is exact in bfloat16."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return (self.weight * x).sum(dtype=torch.float32)


def accumulated(ranks) -> dict[str, list[float]]:
    """For each config the gradient of one update, just before the optimizer takes it."""
    return {zero: _accumulate(ranks, zero) for zero in CONFIGS}


def _accumulate(ranks, zero: str) -> list[float]:
    from pipeline.runtime.engine import Engine

    recipe = small_recipe(zero, "bf16", batch_size=RANKS * MICRO_STEPS, clip=0.0)
    engine = Engine(Dot(), recipe, recipe.reinforce, ranks)
    engine.train()
    for micro in range(MICRO_STEPS):
        last = micro == MICRO_STEPS - 1
        engine.backward(engine(MICRO_GRADIENTS[ranks.rank, micro]), RANKS * MICRO_STEPS, last=last)
    gradient = safe_get_full_grad(engine.module.weight).double().tolist()
    engine.close()
    return gradient


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> list[dict[str, list[float]]]:
    return on_ranks(RANKS, tmp_path_factory.mktemp("gradients"), accumulated)


@pytest.mark.parametrize("zero", CONFIGS)
def test_sixteen_micro_steps_on_two_ranks_lose_nothing_to_bfloat16(gradients, zero):
    exact = MICRO_GRADIENTS.double().sum((0, 1)) / (RANKS * MICRO_STEPS)
    for of_rank in gradients:
        error = (torch.tensor(of_rank[zero], dtype=torch.float64) - exact).norm() / exact.norm()
        # Each of the 32 sums rounds once, by at most half of float32's 1.2e-7 of what is summed so far.
        assert error < 32 * torch.finfo(torch.float32).eps, f"{error:.1e}"
