"""A rank's share of its machine, whatever binds ranks to cores, and the loader workers that follow from it."""

from __future__ import annotations

import math

import pytest

from pipeline.runtime import node
from pipeline.runtime.node import Machine, Share, loader_workers, share_of, this_machine

ANYWHERE = math.inf


def machine(host: str, cores, quota: float = ANYWHERE) -> Machine:
    return Machine(host, tuple(cores), quota)


def test_ranks_that_may_run_anywhere_share_evenly():
    ranks = [machine("a", range(64))] * 8 + [machine("b", range(16))] * 4
    assert share_of(ranks[0], ranks) == Share(8.0, 8) and share_of(ranks[-1], ranks) == Share(4.0, 4)


def test_ranks_bound_to_cores_of_their_own_keep_them():
    ranks = [machine("a", range(0, 12)), machine("a", range(12, 24))]
    assert [share_of(rank, ranks) for rank in ranks] == [Share(12.0, 2)] * 2


def test_a_containers_quota_is_shared_too():
    ranks = [machine("a", range(64), quota=8.0)] * 2
    assert share_of(ranks[0], ranks) == Share(4.0, 2)


@pytest.mark.parametrize(
    ("cores", "workers"), [(0.5, 0), (1.0, 0), (1.9, 0), (2.0, 1), (2.9999999999, 2), (8.0, 7), (9.0, 8), (64.0, 8)]
)
def test_one_core_is_left_to_the_rank(cores, workers):
    assert loader_workers(None, Share(cores, 1)) == workers
    assert loader_workers(None, Share(cores, 1), most=4) == min(4, workers)


@pytest.mark.parametrize("asked", [0, 3, 100])
def test_what_the_recipe_asks_for_is_what_it_gets(asked):
    assert loader_workers(asked, Share(4.0, 1)) == asked


@pytest.mark.parametrize(
    ("limit", "cores"), [("400000 100000\n", 4.0), ("max 100000\n", math.inf), ("odd", math.inf), (None, math.inf)]
)
def test_the_quota_of_a_control_group(tmp_path, monkeypatch, limit, cores):
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(node, "CPU_QUOTA", tmp_path / "cpu.max")
    assert this_machine().quota == cores and this_machine().cores
