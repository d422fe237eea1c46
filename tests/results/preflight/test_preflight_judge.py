"""Facts of several machines -> lines: each fault is found, named with its hosts, and has a mend."""

from dataclasses import replace

import pytest

from pipeline.results.preflight.facts import Facts
from pipeline.results.preflight.judge import Finding, judge
from pipeline.results.preflight.needs import Needs

GB = 10**9
SEEN = {"data.train": "a1", "student.path": "b2"}
NEEDED = Needs(disk=50 * GB, memory=(100 * GB, "cache"), shared_memory=(2 * GB, "cache"), device=(70 * GB, "verbalize"))


def machine(rank: int, host: str, **other) -> Facts:
    found = Facts(
        rank=rank, host=host, local_rank=rank % 2, commit="5278929201ae", versions={"python": "3.11", "torch": "2.8"},
        paths=SEEN, disk_free=90 * GB, memory=500 * GB, shared_memory=60 * GB, device="H100",
        device_id=f"GPU-{host}-{rank}", device_free=79 * GB,
        unwritable={"run": ""},
    )  # fmt: skip
    return replace(found, **other)


def wrong(facts: list[Facts], needed: Needs | None = NEEDED) -> list[Finding]:
    return [finding for finding in judge(facts, needed) if not finding.right]


def ranks(**other) -> list[Facts]:
    """Two nodes of two ranks; `other` holds for rank 3, on node2."""
    nodes = [machine(rank, f"node{rank // 2 + 1}") for rank in range(4)]
    return [*nodes[:3], replace(nodes[3], **other)]


def test_like_machines_with_room_are_right():
    assert wrong(ranks()) == []
    assert [finding.what for finding in judge(ranks(), NEEDED)] == [
        "hosts", "commit", "versions", "shared paths", "disk", "memory", "/dev/shm", "GPU memory", "devices",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "what", "text"),
    [
        ({"host": "node3"}, "hosts", r"3 reached, 1 or 2 ranks each: node1, node2, node3; give each the same number"),
        ({"commit": "0a1b"}, "commit", r"5278929201ae on node1, node2, 0a1b on node2; .*git pull"),
        ({"versions": {"python": "3.11", "torch": "2.7"}}, "versions", r"torch: 2.8 on node1, node2, 2.7 on node2"),
        ({"paths": SEEN | {"data.train": "no /d/manifest.json (No such file)"}}, "data.train",
         r"no /d/manifest.json \(No such file\) on node2; mount it there, or correct data.train in the recipe"),
        ({"paths": SEEN | {"student.path": "c3"}}, "student.path", r"another file on node2; .*that all nodes share"),
        ({"unwritable": {"run": "/r cannot be written (Read-only)"}}, "run",
         r"/r cannot be written \(Read-only\) on node2"),
        ({"disk_free": 39 * GB}, "disk", r"39.0 GB free, 50.0 GB needed, on node2; make room.*--set run=FOLDER"),
        ({"memory": 9 * GB}, "memory", r"9.0 GB free, 100.0 GB needed by cache, on node2; lower data.workers"),
        ({"shared_memory": 10**6}, "/dev/shm", r"1.0 MB free, 2.0 GB needed by cache, on node2; .*--shm-size"),
        ({"device_free": 50 * GB}, "GPU memory", r"50.0 GB free, 70.0 GB needed by verbalize, on node2; end what else"),
        ({"device_problem": "uncorrectable ECC error"}, "devices",
         r"H100 1 of node2: uncorrectable ECC error; .*--exclude=node2"),
        ({"device": "cpu"}, "devices", r"H100 on node1, node2, cpu on node2"),
        ({"device_id": "GPU-node2-2"}, "devices", r"ranks 2 and 3 of node2 have the same GPU"),
    ],
)  # fmt: skip
def test_each_fault_is_one_line_with_its_mend(fault, what, text):
    import re

    found = wrong(ranks(**fault))
    assert [finding.what for finding in found] == [what]
    assert found[0].fix and str(found[0]).startswith("WRONG ")
    assert re.search(text, str(found[0])), str(found[0])


def test_other_versions_name_what_chooses_them_under_each_launcher():
    """.deepspeed_env alone was named, which only DeepSpeed's launcher reads."""
    (found,) = wrong(ranks(versions={"python": "3.11", "torch": "2.7"}))
    for launcher in (".deepspeed_env for deepspeed --hostfile", "-x PATH for mpirun", "for torchrun", "for SLURM"):
        assert launcher in found.fix


def test_gpus_of_two_names_are_noted_and_stop_no_job():
    facts = ranks(device="H100 PCIe")
    assert wrong(facts) == []
    (noted,) = [finding for finding in judge(facts, NEEDED) if finding.noted]
    assert str(noted).startswith("note  devices:       H100 on node1, node2, H100 PCIe on node2; leave the odd nodes")


def test_many_hosts_are_not_all_named():
    facts = [machine(rank, f"node{rank}", local_rank=0, memory=GB) for rank in range(64)]
    (found,) = wrong(facts)
    assert found.found.endswith("on node0, node1, node2, node3 and 60 more")


def test_where_the_plan_cannot_tell_the_rest_is_judged():
    assert wrong(ranks(memory=0, disk_free=0), None) == []
    assert [finding.what for finding in wrong(ranks(commit="0a1b"), None)] == ["commit"]


def test_a_plan_is_an_estimate_and_stops_no_job_that_may_fit():
    assert wrong(ranks(memory=81 * GB, device_free=57 * GB, disk_free=41 * GB)) == []


def test_a_processor_has_no_gpu_memory():
    facts = [machine(rank, "node1", device="cpu", device_id="", device_free=None) for rank in range(2)]
    assert wrong(facts) == [] and "GPU memory" not in [finding.what for finding in judge(facts, NEEDED)]
