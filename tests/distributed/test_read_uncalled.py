"""ZeRO-3 has a weight that a module reads without calling its part, as linear attention does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad
from small_engine import ROOT, on_ranks, small_recipe
from torch import nn

RANKS, WIDTH = 1, 64


class LinearAttention(nn.Module):
    """Reads its convolution's weight as those of Qwen3.5 and LFM2 do."""

    def __init__(self):
        super().__init__()
        self.conv1d = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        mixed = nn.functional.conv1d(x.mT, self.conv1d.weight, padding=3, groups=WIDTH)[..., : x.shape[1]]
        return x + self.out(mixed.mT)


class Tower(nn.Module):
    """Resizes its table of positions as SigLIP 2's, of which it reads the weight."""

    def __init__(self):
        super().__init__()
        self.position_embedding = nn.Embedding(3, WIDTH)

    def forward(self, x):
        table = self.position_embedding.weight.T[None]
        return x + nn.functional.interpolate(table, size=x.shape[1], mode="linear").mT


class Layers(nn.Sequential):
    def forward(self, x):
        return super().forward(x).square().sum()


def gradients(ranks, config: str) -> tuple[list[int], dict[str, list[float]]]:
    """The sizes in which a table and a convolution are kept, and the gradients of one update."""
    from pipeline.runtime.engine import Engine

    recipe = small_recipe("zero2", batch_size=RANKS, clip=0.0).model_copy(update={"deepspeed": Path(config)})
    torch.manual_seed(0)
    engine = Engine(Layers(Tower(), *(LinearAttention() for _ in range(3))), recipe, recipe.reinforce, ranks)
    engine.train()
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(ranks.rank))
    engine.backward(engine(x), RANKS, last=True)
    found = {name: safe_get_full_grad(weight).flatten().tolist() for name, weight in engine.module.named_parameters()}
    sizes = [engine.module[0].position_embedding.weight.numel(), engine.module[1].conv1d.weight.numel()]
    engine.close()
    return sizes, found


def both(ranks, configs: list[str]):
    return [gradients(ranks, config) for config in configs]


def test_its_gradient_is_that_of_zero_2(tmp_path):
    partitioned = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    partitioned["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small weights would be kept whole
    (tmp_path / "zero3.json").write_text(json.dumps(partitioned))
    configs = [str(ROOT / "ds_configs" / "zero2.json"), str(tmp_path / "zero3.json")]
    (whole, expected), (kept, found) = on_ranks(RANKS, tmp_path, both, configs)[0]
    assert whole == [3 * WIDTH, 4 * WIDTH] and kept == [0, 0], "between their uses they are partitioned"
    assert found == expected
    assert any(expected["0.position_embedding.weight"]) and any(expected["1.conv1d.weight"])
