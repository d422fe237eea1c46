"""What ranks tell each other: also where one takes longer than a collective waits."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import CacheError
from pipeline.runtime import ranks
from pipeline.runtime.ranks import Ranks, gather_when_ready

SLOW = """
import os, pathlib, sys, time
from datetime import timedelta
import torch.distributed as dist
from pipeline.runtime import ranks
rank = int(sys.argv[1])
pathlib.Path(f"{sys.argv[2]}-{rank}").touch()
while not pathlib.Path(f"{sys.argv[2]}-{1 - rank}").exists():
    time.sleep(0.05)  # the other may still be importing torch, longer than a collective waits
dist.init_process_group("gloo", f"file://{sys.argv[2]}", timedelta(seconds=10), 2, rank)
ranks.HEARTBEAT_S = 0.5
def make():
    time.sleep(0 if rank else 1)
    return [f"of rank {rank}"]
done = []
def work():
    time.sleep(13)
    done.append(rank)
ranks.on_first_rank(ranks.Ranks(rank, 2), "exporting", work)
assert done == ([] if rank else [0])
print(ranks.gather_when_ready(ranks.Ranks(rank, 2), "hashing", make), flush=True)
os._exit(0)  # as pipeline/job.py leaves, and for its reason: a thread of gloo's may abort the interpreter's way out
"""


def test_a_rank_may_take_longer_than_a_collective_waits(tmp_path):
    command = [sys.executable, "-c", SLOW]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet")],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=60)[0] for process in both]
    for text in said:
        assert text.splitlines()[-1] == "['of rank 0', 'of rank 1']"
    assert "exporting, " in said[0] and "exporting, " not in said[1], "rank 0 says what takes so long"


def test_what_makes_one_rank_fail_is_raised(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "HEARTBEAT_S", 0.01)

    def fail():
        time.sleep(0.1)
        raise CacheError("expected weights as *.safetensors, found none")

    with pytest.raises(CacheError, match="found none"):
        gather_when_ready(Ranks(), "cache: hashing the teacher", fail)
    assert "cache: hashing the teacher, 0 s" in capsys.readouterr().out


def test_that_the_ranks_meet_is_no_progress_of_what_one_of_them_makes(monkeypatch):
    """It was said again at each meeting: a rank whose `make` stood still was never found to hang."""
    said = []
    monkeypatch.setattr(ranks.watch, "doing", lambda what, long: said.append((what, long)))
    monkeypatch.setattr(ranks.watch, "now", lambda: "cache: opening data and models")
    monkeypatch.setattr(ranks, "HEARTBEAT_S", 0.01)
    assert gather_when_ready(Ranks(), "hashing", lambda: time.sleep(0.1) or [7]) == [7]
    words = ["hashing", "hashing: done here, waiting for the other ranks", "cache: opening data and models"]
    assert said == [(what, True) for what in words]
