"""What several jobs write into one run folder at once: nobody's file is half there, and nobody's lines are lost."""

from __future__ import annotations

import fcntl
import json
from concurrent.futures import ThreadPoolExecutor, wait

from pipeline.runtime.data.bad_samples import Rejected
from pipeline.runtime.folder import read_metrics, write_json
from pipeline.runtime.loop import record_rejected
from pipeline.runtime.metrics import Metrics


def test_many_jobs_write_one_file_at_once(tmp_path):
    values = [{"job": number, "text": "x" * 1000 * number} for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda value: write_json(tmp_path / "done.json", value), values * 4))
    assert json.loads((tmp_path / "done.json").read_text()) in values
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]


def test_a_step_that_jobs_share_keeps_the_lines_of_all(tmp_path):
    first = Metrics(tmp_path, "cache", None)
    first.write(1, {"job": "first"})
    second = Metrics(tmp_path, "cache", None)
    second.write(1, {"job": "second"})
    first.write(2, {"job": "first"})
    first.close()
    second.close()
    assert [line["job"] for line in read_metrics(tmp_path, "cache")] == ["first", "second", "first"]


def test_lines_of_jobs_that_share_a_file_wait_for_one_another(tmp_path):
    """On a disk an append is whole anyway; over NFS only a lock makes it so."""
    metrics, rejected = Metrics(tmp_path, "cache", None), [Rejected("s1", "000000.tar", "no picture")]
    appends = {
        "metrics.jsonl": lambda: metrics.write(1, {}),
        "rejects.jsonl": lambda: record_rejected(tmp_path, rejected),
    }
    with ThreadPoolExecutor(1) as pool:
        for name, append in appends.items():
            with (tmp_path / name).open("a") as another:
                fcntl.flock(another, fcntl.LOCK_EX)
                appended = pool.submit(append)
                assert not wait([appended], timeout=0.3).done and not (tmp_path / name).read_text()
            appended.result()
            assert len((tmp_path / name).read_text().splitlines()) == 1
    metrics.close()


def test_a_resumed_step_drops_its_own_lines_after_its_checkpoint(tmp_path):
    lines = [{"step": step, "update": update} for step in ("cache", "interact") for update in (1, 2, 3)]
    torn = '{"step": "interact", "upd'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    resumed = Metrics(tmp_path, "interact", 1)
    resumed.write(2, {"again": True})
    resumed.close()
    assert [line["update"] for line in read_metrics(tmp_path, "cache")] == [1, 2, 3]
    interact = [(line["update"], line.get("again")) for line in read_metrics(tmp_path, "interact")]
    assert interact == [(1, None), (2, True)]
