"""Every update once in each logger, also after a resume: what a stopped job showed after its checkpoint comes again."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.runtime.folder import read_metrics
from pipeline.runtime.loggers.interface import matches, scalars
from pipeline.runtime.metrics import Metrics

DONE, STOPPED, TOTAL = 60, 63, 110
"""The checkpoint, the last update before the stop, and the step's end."""


def values(update: int) -> dict:
    line = {"layer/2": 1.0 / update, "layer/6": 2.0, "last": 0.5, "tokens": 7, "gradient_norm": None}
    line |= {"match": [2 + 4 * (update % 2), 10 if update % 3 else None], "draw_entropy": [0.5, 0.25]}
    return line | ({"kl": [[2, 2, 0.5], [2, 6, 0.25], [6, 10, 0.125]]} if update % 50 == 1 else {})


def pictures_of(update: int) -> set[str]:
    """What wandb and trackio show of an update besides its numbers."""
    histograms = {"matches/2", "matches/6"} if update % 50 == 0 else set()
    return histograms | ({"kl"} if update % 50 == 1 else set())


def stop_and_resume(run: Path, log_to: list[str]) -> None:
    first = Metrics(run, "interact", 0, log_to)
    for update in range(1, STOPPED + 1):
        first.write(update, values(update))
    first.close()
    again = Metrics(run, "interact", DONE, log_to)
    for update in range(DONE + 1, TOTAL + 1):
        again.write(update, values(update))
    again.close()


def test_tensorboard_has_curves_maps_and_histograms_of_every_update_once(tmp_path):
    stop_and_resume(tmp_path, ["tensorboard"])
    board = EventAccumulator(str(tmp_path / "tensorboard" / "interact"), {"scalars": 0, "images": 0, "histograms": 0})
    board.Reload()
    found = board.Scalars("layer/2")
    assert [point.step for point in found] == list(range(1, TOTAL + 1)), "the checkpoint's own update stays"
    assert found[59].value == pytest.approx(1 / 60) and "time" not in board.Tags()["scalars"]
    assert [image.step for image in board.Images("kl")] == [1, 51, 101]
    assert board.Images("kl")[0].encoded_image_string.startswith(b"\x89PNG")
    histograms = board.Histograms("match/2")
    assert [one.step for one in histograms] == [50, 100]
    assert [one.histogram_value.num for one in histograms] == [50, 50], "also of updates before the stop"
    assert board.Histograms("match/6")[0].histogram_value.num == len([n for n in range(1, 51) if n % 3])


def test_a_step_that_begins_anew_forgets_its_first_try(tmp_path):
    for seed in (1.0, 2.0):
        metrics = Metrics(tmp_path, "interact", 0)
        metrics.write(1, {"last": seed})
        metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard" / "interact"))
    board.Reload()
    assert [point.value for point in board.Scalars("last")] == [2.0]


def test_without_loggers_there_is_the_file(tmp_path):
    stop_and_resume(tmp_path, [])
    assert [line["update"] for line in read_metrics(tmp_path)] == list(range(1, TOTAL + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_numbers_and_matches_of_a_line():
    line = {"step": "interact", "update": 3, "time": 1e9, **values(3)}
    assert dict(scalars(line)) == {"layer/2": pytest.approx(1 / 3), "layer/6": 2.0, "last": 0.5, "tokens": 7.0}
    assert dict(matches(line)) == {"2": 6}, "a layer without a candidate has no match"
    assert not list(matches({"update": 4, "skipped": True}))


def test_wandb_offline_keeps_one_id_and_its_newest_folder_is_whole(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "recipe.yaml").write_text("seed: 7\n")
    stop_and_resume(tmp_path, ["wandb"])
    identity = (tmp_path / "wandb" / "interact.id").read_text()
    first, again = sorted(tmp_path.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))
    assert steps_of_wandb(first) == list(range(1, STOPPED + 1))
    assert steps_of_wandb(again) == list(range(1, TOTAL + 1))


def steps_of_wandb(path: Path) -> list[int]:
    """The steps of an offline run's own file, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for data in records_of(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append(int(items["_step"]))
            shown = {name.removesuffix("/_type") for name in items if name.endswith("/_type")}
            assert shown == pictures_of(steps[-1])
            assert "layer/2" in items and "match/2" in items
    return steps


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: fragments with a head of 7 bytes (CRC, length, kind), none across a block."""
    block, at, record = 2**15, 7, b""  # behind wandb's own head
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield record
            record = b""


def test_trackio_lies_in_the_run_folder_and_has_every_update_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio")
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads TRACKIO_DIR when it is imported
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if "TRACKIO" not in name})
    (tmp_path / "recipe.yaml").write_text("run: runs/a\n")
    stop_and_resume(tmp_path, ["trackio"])
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert Counter(step for _, step, _ in rows) == Counter(range(1, TOTAL + 1))
    assert {name for name, _, _ in rows} == {"interact"} and json.loads(rows[2][2])["match/2"] == 6
    for _, step, metrics in rows:
        assert {name for name, value in json.loads(metrics).items() if isinstance(value, dict)} == pictures_of(step)
    assert sum(json.loads(rows[49][2])["matches/2"]["values"]) == 50, "also of updates before the stop"
    assert list((tmp_path / "trackio").rglob("*.png")), "the picture is there"
    (tmp_path / "recipe.yaml").write_text("run: elsewhere/a\n")  # of the same name, where TRACKIO_DIR is shared
    stop_and_resume(tmp_path, ["trackio"])
    with sqlite3.connect(database) as connection:
        assert connection.execute("select count(*) from metrics").fetchone() == (2 * TOTAL,), "both are there"
    assert capsys.readouterr().out == ""
