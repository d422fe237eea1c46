"""Parts that are clipped apart each train as alone: against AdamW in float64, on one rank and on two."""

from __future__ import annotations

import pytest
import torch
from small_engine import on_ranks, small_recipe
from torch import nn

CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero3_offload_optimizer")
BF16_CONFIGS = ("zero1", "zero2", "zero3")
UPDATES, MICRO_STEPS, CLIP, RATE, WIDTH = 3, 2, 0.5, 1e-2, 33
SCALES = (0.01, 3.0, 40.0)
"""Parts whose gradients have norms far below the clip, above it, and far above it."""


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in SCALES)

    def forward(self, x):
        return sum(scale * part(x).float().pow(2).sum() for scale, part in zip(SCALES, self.parts, strict=True))


def parts() -> Parts:
    torch.manual_seed(0)
    return Parts()


def inputs(update: int) -> torch.Tensor:
    """The global batch of an update, [4, WIDTH]."""
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(update))


def trained(ranks) -> dict[str, tuple[list[float], dict[str, list]]]:
    """For each config: the gradient norms, and the weights after the updates; for bfloat16 also of each part alone."""
    runs = {zero: _train(ranks, zero, "fp32") for zero in CONFIGS}
    for zero in BF16_CONFIGS:
        runs[f"{zero} bf16"] = _train(ranks, zero, "bf16")
        for index in range(len(SCALES)):
            runs[f"{zero} bf16 {index}"] = _train(ranks, zero, "bf16", alone=index)
    return runs


def _train(ranks, zero: str, precision: str, alone: int | None = None):
    from pipeline.runtime.engine import Engine

    settings = {"batch_size": 4, "micro_batch_size": 2 // ranks.world, "clip": CLIP, "weight_decay": 0.1}
    recipe = small_recipe(zero, precision, **settings)
    module = parts()
    if alone is not None:
        for index, part in enumerate(module.parts):
            part.requires_grad_(index == alone)
    apart = () if alone is not None else list(module.parts)
    engine = Engine(module, recipe, recipe.verbalize, ranks, clipped_apart=apart)
    engine.train()
    norms = []
    for update in range(UPDATES):
        own = inputs(update).chunk(MICRO_STEPS * ranks.world)[ranks.rank :: ranks.world]
        for micro, one in enumerate(own):
            engine.backward(engine(one.to(engine.dtype)), 4, last=micro == len(own) - 1)
        engine.step(RATE)
        norms.append(engine.gradient_norm())
    weights = engine.gathered(engine.module)
    engine.close()
    return norms, {name: weight.float().tolist() for name, weight in weights.items()}


def reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Each part alone in float64: its own gradient, its own clip, its own AdamW."""
    squares, weights = torch.zeros(UPDATES, dtype=torch.float64), {}
    for index, (scale, part) in enumerate(zip(SCALES, parts().double().parts, strict=True)):
        optimizer = torch.optim.AdamW(part.parameters(), lr=RATE, weight_decay=0.1)
        for update in range(UPDATES):
            optimizer.zero_grad()
            (scale * part(inputs(update).double()).pow(2).sum() / 4).backward()
            squares[update] += nn.utils.clip_grad_norm_(part.parameters(), CLIP) ** 2
            optimizer.step()
        weights |= {f"parts.{index}.{name}": weight.detach() for name, weight in part.named_parameters()}
    return squares.sqrt().tolist(), weights


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def runs(request, tmp_path_factory):
    return on_ranks(request.param, tmp_path_factory.mktemp("clip"), trained)


@pytest.mark.parametrize("zero", CONFIGS)
def test_each_part_moves_as_if_it_trained_alone(runs, zero):
    norms, exact = reference()
    begun = dict(parts().named_parameters())
    found_norms, found = runs[0][zero]
    assert found_norms == pytest.approx(norms, rel=1e-5)
    for name, weight in exact.items():
        moved = (weight - begun[name]).norm()
        # AdamW divides a gradient by its own size, so its relative error, float32's 1e-6, is the update's.
        assert (torch.tensor(found[name], dtype=torch.float64) - weight).norm() < 1e-4 * moved, name


@pytest.mark.parametrize("zero", BF16_CONFIGS)
def test_in_bfloat16_each_part_moves_as_if_it_trained_alone(runs, zero):
    """Its gradients are then the same bits, so only the rounding of the clip factor differs, far below bfloat16."""
    together = runs[0][f"{zero} bf16"][1]
    begun = dict(parts().named_parameters())
    for index in range(len(SCALES)):
        alone = runs[0][f"{zero} bf16 {index}"][1]
        for name in (name for name in alone if name.startswith(f"parts.{index}.")):
            weight, expected = torch.tensor(together[name]), torch.tensor(alone[name])
            assert (weight - begun[name]).abs().max() > RATE / 2, "it has moved"
            assert (weight - expected).abs().max() <= torch.finfo(torch.bfloat16).eps * expected.abs().max(), name
