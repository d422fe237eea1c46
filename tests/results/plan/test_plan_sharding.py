"""Shards and gathered weights, against naive counts."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.results.plan.models import Parameter
from pipeline.results.plan.sharding import (
    Zero,
    gathered_elements,
    gradient_bytes,
    optimizer_bytes,
    read_zero,
    weight_bytes,
)
from pipeline.results.plan.traffic import traffic


def zero(tmp_path, **settings):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": settings}))
    return read_zero(path)


PARAMETERS = [
    Parameter("a", 1000, True),
    Parameter("a", 10, True),
    Parameter("b", 300, False),
    Parameter("c", 7, False),
]


@pytest.mark.parametrize("ranks", [1, 2, 7, 64])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shards_are_those_of_torch_chunk_and_all_ranks_hold_the_whole(tmp_path, stage, ranks):
    config = zero(tmp_path, stage=stage, stage3_param_persistence_threshold=0)
    shard = {p.elements: max(len(part) for part in torch.zeros(p.elements).tensor_split(ranks)) for p in PARAMETERS}
    held = sum(shard.values()) if stage == 3 else 1317
    assert weight_bytes(PARAMETERS, config, ranks, 2) == 2 * held
    trained = 1010 if stage < 2 else shard[1000] + shard[10]
    assert gradient_bytes(PARAMETERS, config, ranks) == 4 * trained
    assert optimizer_bytes(PARAMETERS, config, ranks, 2) == 12 * (shard[1000] + shard[10])


def test_small_parameters_stay_whole_beside_their_shards(tmp_path):
    config = zero(tmp_path, stage=3, stage3_param_persistence_threshold=100)
    assert weight_bytes(PARAMETERS, config, 2, 2) == 2 * (500 + 5 + 150 + 4 + 10 + 7)


def test_offloaded_weights_and_states_are_not_on_the_gpu(tmp_path):
    config = zero(tmp_path, stage=3, offload_param={"device": "cpu"}, offload_optimizer={"device": "nvme"})
    assert (config.offload_weights, config.offload_optimizer) == ("cpu", "nvme")
    assert weight_bytes([Parameter("a", 10**6)], config, 2, 2) == 0


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.integers(0, 12),
)
def test_gathered_weights_against_a_step_by_step_count(uses, reuse):
    """A module stays from its use to its next one where fewer than `reuse` elements are used between them."""
    sizes = [3, 5, 8, 2, 13]
    sequence = [(module, sizes[module]) for module in uses]
    peak, gathered = 0, set()
    for place, (module, _) in enumerate(sequence):
        gathered.add(module)
        peak = max(peak, sum(sizes[one] for one in gathered))
        between, stays = 0, False
        for later, elements in sequence[place + 1 :]:
            if between >= reuse:
                break
            stays |= later == module
            between += elements
        if not stays:
            gathered.remove(module)
    config = Zero(Path("zero3.json"), 3, 1, 0, 0, reuse, False, "gpu", "gpu", 1, 4, 4)
    assert gathered_elements(sequence, config) == peak


def test_traffic_counts_what_a_ring_receives(tmp_path):
    """Of n ranks each receives (n - 1) / n: in a forward, in a backward, and of the gradients."""
    config = zero(tmp_path, stage=3, stage3_param_persistence_threshold=100, stage3_max_reuse_distance=0)
    frozen, passed = [Parameter("f", 400)], [Parameter("a", 1000, True), Parameter("b", 200), Parameter("c", 50, True)]
    moved = traffic(frozen, passed, config, 4, 2)
    assert moved.gathered == (400 + 2 * 1200) * 2 * 3 / 4 and moved.reduced == 1050 * 4 * 3 / 4
    assert moved.update(5) == 5 * (moved.gathered + moved.reduced)
    once = traffic(frozen, passed, zero(tmp_path, stage=1, overlap_comm=False), 4, 2)
    assert once.update(5) == 1050 * (4 + 2) * 3 / 4  # gradients to their owners, new weights back
    assert traffic(frozen, passed, config, 1, 2).update(5) == 0


def test_a_second_copy_in_each_node_keeps_frozen_weights_off_the_slow_links(tmp_path):
    """With zero_hpz_partition_size only trained weights come from other nodes, once: the backward's are in the node."""
    config = zero(
        tmp_path, stage=3, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0, zero_hpz_partition_size=4
    )
    frozen, passed = [Parameter("f", 400)], [Parameter("a", 1000, True), Parameter("b", 200)]
    moved = traffic(frozen, passed, config, 8, 2)
    assert moved.gathered == 1000 * 2 * 7 / 8
    assert moved.inside == (400 + 1000 + 2 * 200) * 2 * 3 / 4
    assert weight_bytes(frozen, config, 8, 2) == 2 * (50 + 100)
