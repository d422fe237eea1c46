"""A closed engine keeps nothing: the next step of the process has its memory."""

from __future__ import annotations

import pytest
import torch
from small_engine import bytes_alive, on_ranks, small_recipe
from torch import nn

CASES = [("zero0", "fp32"), ("zero1", "bf16"), ("zero1", "fp32"), ("zero2", "bf16"), ("zero2", "fp32")]
CASES += [("zero3", "bf16"), ("zero3_hpz", "bf16"), ("zero3_offload", "bf16"), ("zero3_offload_optimizer", "bf16")]
WIDTH = 256
WEIGHTS = 2 * WIDTH * WIDTH


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.trained = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.trained(self.frozen(x)).float().pow(2).sum()


def left(ranks) -> dict[str, tuple[int, int]]:
    """For each case, bytes of tensors alive in this process because of an engine: before and after it is closed."""
    return {f"{zero} {precision}": _left(ranks, zero, precision) for zero, precision in CASES}


def _left(ranks, zero: str, precision: str) -> tuple[int, int]:
    from pipeline.runtime.engine import Engine

    before = bytes_alive()
    recipe = small_recipe(zero, precision, batch_size=4)
    module = Half()
    engine = Engine(module, recipe, recipe.interact, ranks)
    engine.train()
    for _ in range(4):
        engine.backward(engine(torch.ones(1, WIDTH, dtype=engine.dtype)), 4)
        engine.step(1e-3)
    held = bytes_alive() - before
    engine.close()
    # The module is still referred to here, as by a step that is about to return.
    return held, bytes_alive() - before


@pytest.fixture(scope="module")
def bytes_left(tmp_path_factory) -> list[dict[str, tuple[int, int]]]:
    return on_ranks(2, tmp_path_factory.mktemp("close"), left)


@pytest.mark.parametrize("case", [" ".join(case) for case in CASES])
def test_a_closed_engine_holds_less_than_a_percent_of_what_it_held(bytes_left, case):
    for of_rank in bytes_left:
        held, after = of_rank[case]
        assert held > WEIGHTS, "the count sees weights and optimizer states"
        assert after < held / 100
