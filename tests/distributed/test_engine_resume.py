"""A run that was stopped ends bitwise where the uninterrupted one ends, in bfloat16 and under every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_engine import on_ranks, small_recipe
from torch import nn

CONFIGS = ("zero1", "zero2", "zero3", "zero3_offload_optimizer")
UPDATES, STOP_AFTER, WIDTH = 4, 2, 32


def trained(ranks, folder: str) -> dict[str, tuple[list, list]]:
    """For each config the weights after all updates: in one go, and from a checkpoint on."""
    return {zero: _both(ranks, zero, Path(folder) / zero) for zero in CONFIGS}


def _both(ranks, zero: str, folder: Path) -> tuple[list, list]:
    engine = _engine(ranks, zero)
    for update in range(UPDATES):
        if update == STOP_AFTER:
            engine.save(folder, "half", {"update": update})
        _update(engine, ranks, update)
    whole = _weights(engine)
    engine = _engine(ranks, zero)
    assert engine.load(folder, "half")["update"] == STOP_AFTER
    for update in range(STOP_AFTER, UPDATES):
        _update(engine, ranks, update)
    return whole, _weights(engine)


def _engine(ranks, zero: str):
    from pipeline.runtime.engine import Engine

    torch.manual_seed(0)
    recipe = small_recipe(zero, "bf16", batch_size=4)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    module[0].bias.requires_grad_(False)
    engine = Engine(module, recipe, recipe.reinforce, ranks)
    engine.train()
    return engine


def _update(engine, ranks, update: int) -> None:
    for micro in range(2):
        seed = 100 * update + 10 * micro + ranks.rank
        x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))
        engine.backward(engine(x.to(engine.dtype)).float().pow(2).sum(), 4, last=micro == 1)
    engine.step(1e-2)


def _weights(engine) -> list:
    weights = [weight.float().tolist() for weight in engine.gathered(engine.module).values()]
    engine.close()
    return weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return on_ranks(2, folder, trained, str(folder))[0]


@pytest.mark.parametrize("zero", CONFIGS)
def test_a_resumed_engine_goes_on_bitwise(runs, zero):
    whole, resumed = runs[zero]
    assert whole and whole == resumed
