"""A rank's share of its machine, whatever binds ranks to cores, the loader workers that follow from it, and memory."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.runtime import node
from pipeline.runtime.node import Machine, Share, available_memory, loader_workers, share_of, this_machine

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


NODE, CACHED = 1000, 30
V1 = {"memory.limit_in_bytes": "500", "memory.usage_in_bytes": "400", "memory.stat": "cache 0\ntotal_active_file 10\n"
      "total_inactive_file 20\n"}  # fmt: skip
"""A group of version 1: of its 500 bytes 400 are in use, CACHED of them by its page cache."""


def v2(limit: object, used: int) -> dict[str, str]:
    """The files of a group of version 2 with a page cache of CACHED."""
    stat = "anon 7\nactive_file 10\ninactive_file 20\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


@pytest.mark.parametrize(
    ("own", "groups", "available"),
    [
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/step_0": v2("max", 90), "slurm/job_7": v2(500, 400)}, 100 + CACHED),
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/step_0": v2(200, 150), "slurm/job_7": v2(500, 100)}, 50 + CACHED),
        ("4:memory:/slurm/job_7\n1:cpu:/\n0::/\n", {"memory/slurm/job_7": V1}, 100 + CACHED),
        ("0::/as/the/host/has/it\n", {"": v2(500, 400)}, 100 + CACHED),  # a container sees its own group at the top
        ("0::/\n", {"": v2(100, 190)}, 0),  # its limit was lowered
        ("0::/\n", {"": v2("max", 400)}, NODE),
        ("0::/\n", {"": v2(5000, 400)}, NODE),
        ("0::/\n", {"": {"memory.max": "500", "memory.current": "odd"}}, NODE),
        ("1:cpu:/slurm\n", {"cpu/slurm": V1}, NODE),
        (None, {}, NODE),
    ],
)
def test_memory_ends_where_the_node_or_a_control_group_has_no_more(tmp_path: Path, monkeypatch, own, groups, available):
    """Only the node's was asked: a job with less than the node was killed at each checkpoint's copy."""
    if own is not None:
        (tmp_path / "own").write_text(own)
    for group, files in groups.items():
        (tmp_path / "groups" / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / "groups" / group / name).write_text(text)
    monkeypatch.setattr(node, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(node, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(node.psutil, "virtual_memory", lambda: SimpleNamespace(available=NODE))
    assert available_memory() == available
