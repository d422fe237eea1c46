"""A rank of a real step that stands still: the others name it, with where it stands, and end."""

from __future__ import annotations

import signal
import socket
import tempfile
import time
from pathlib import Path

from running import free_port, start_ranks, tiny_recipe
from tiny import write_data

from pipeline.runtime.faults.watch import BEAT_S
from pipeline.runtime.folder import read_metrics

STARTS_WITHIN_S = 200
"""On a machine that others use as well: beside seven more jobs on two cores it took over 120."""


def test_a_stopped_rank_is_named_with_where_it_stands(tmp_path: Path, tiny_models, survived):
    data = write_data(tmp_path / "data", 24)
    recipe = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", data, interact={"steps": 0}, reinforce={"steps": 1000})
    program = ["launch/train.py", "--stage", "2", "--recipe", str(recipe), "--set", "hang_minutes=0.1"]
    with tempfile.TemporaryFile("w+") as output:
        ranks = start_ranks(2, str(free_port()), program, output)
        try:
            deadline = time.monotonic() + STARTS_WITHIN_S
            while len(read_metrics(tmp_path / "run")) < 3:
                assert all(one.poll() is None for one in ranks) and time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(2 * BEAT_S)  # what a rank does is known from its beats
            ranks[1].send_signal(signal.SIGSTOP)
            code = ranks[0].wait(timeout=90)
        finally:
            for one in ranks:
                one.kill()
        output.seek(0)
        said = output.read()
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"rank 1 on {socket.gethostname()} (process {ranks[1].pid}), at 'reinforce: update " in line
    assert "does not answer" in line and "Traceback" not in said
    survived(signals=1)
