"""Every shipped DeepSpeed config: DeepSpeed knows its keys, and weights stay within a node where hpZ says so."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from small_engine import ROOT, on_ranks, small_recipe
from torch import nn

from pipeline.recipe.checks import OWNED_BY_RECIPE

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
NODE, RANKS, WIDTH = 2, 4, 64


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_has_keys_that_deepspeed_knows_and_numbers_that_the_recipe_does_not(path):
    config = json.loads(path.read_text())
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])  # raises at a key that it does not know
    assert path.stem.startswith(f"zero{int(zero.stage)}")
    for key in config:
        known = {"zero_optimization", "bf16", "aio", "zero_force_ds_cpu_optimizer", *OWNED_BY_RECIPE}
        assert key in known, key
        assert key not in OWNED_BY_RECIPE or config[key] == "auto"
    if "aio" in config:
        assert config["aio"].items() <= get_aio_config(config).items()
    if config["zero_optimization"].get("overlap_comm") is False:
        assert path.stem.endswith("_cpu"), "a GPU waits for its network then"


def gathers(ranks, config: str) -> tuple[list[int], list[float]]:
    """Sizes of the groups that the weights of a frozen module are gathered in, and what the module computes."""
    from pipeline.runtime.deepspeed_config import step_config
    from pipeline.runtime.engine import Engine

    recipe = small_recipe("zero3").model_copy(update={"deepspeed": Path(config)})
    torch.manual_seed(0)
    with deepspeed.zero.Init(
        config_dict_or_path=step_config(recipe, recipe.cache, clip=0.0)
    ):  # as from_pretrained does
        module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))).requires_grad_(False)
    engine = Engine(module, recipe, recipe.cache, ranks)
    engine.eval()
    sizes: list[int] = []
    plain = partition_parameters._dist_allgather_fn

    def counted(given, output, group=None):
        sizes.append(torch.distributed.get_world_size(group))
        return plain(given, output, group)

    partition_parameters._dist_allgather_fn = counted
    with torch.no_grad():
        computed = [engine(torch.full((1, WIDTH), float(i))).sum().item() for i in range(3)]
    partition_parameters._dist_allgather_fn = plain
    return sizes, computed


def both(ranks, folder: str):
    return [gathers(ranks, f"{folder}/{name}.json") for name in ("zero3", "zero3_hpz")]


def test_with_hpz_frozen_weights_are_gathered_within_a_node_only(tmp_path):
    for name in ("zero3", "zero3_hpz"):
        config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if name == "zero3_hpz":
            assert config["zero_optimization"]["zero_hpz_partition_size"] == 8
            config["zero_optimization"]["zero_hpz_partition_size"] = NODE
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    (wide, computed), (narrow, computed_with_hpz) = on_ranks(RANKS, tmp_path, both, str(tmp_path))[0]
    assert wide and set(wide) == {RANKS}
    assert narrow and set(narrow) == {NODE}
    assert computed_with_hpz == computed
