"""A cached teacher head of the hidden codec, sharded over ranks: each holds its part, and nothing else of it."""

import re

import pytest
import torch
from running import deepspeed, tiny_recipe

from pipeline.cache.head import save_head
from pipeline.signal import Unembedding


def test_a_rank_holds_its_part_of_the_head_alone(tiny_models, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", tmp_path)
    head = Unembedding(torch.randn(8000, 64, generator=torch.Generator().manual_seed(0)), 8000)
    (tmp_path / "cache").mkdir()
    save_head(tmp_path / "cache", head)
    said = deepspeed(2, "../tests/distributed/held_head.py", recipe, tmp_path / "cache")
    found = re.findall(r"rank \d: (\d+) bytes, sum (\S+)", said)
    assert len(found) == 2
    for held, total in found:
        assert int(held) <= head.weight.nbytes / 2 * 1.01
        assert float(total) == pytest.approx(head.weight.double().sum().item(), rel=1e-9)
