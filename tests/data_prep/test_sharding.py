"""`shard` as a whole: what it writes, rejects, takes up again and refuses; on one rank and on several."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_input import REPOSITORY, FaultyInput, command, content_of, mpirun, shard

from data_prep.shards import ShardFolder, describe_shard

Chats = Callable[..., list[str]]


def rejects_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]


def folders(output: Path) -> list[ShardFolder]:
    return [ShardFolder(output / split) for split in ("train", "held_out")]


@pytest.fixture(scope="session")
def sharded(faulty: FaultyInput, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faulty records, sharded by one process."""
    output = tmp_path_factory.mktemp("sharded")
    assert shard(*faulty.arguments, *PLENTY, "--output", output) == 0
    return output


PLENTY = ("--repeated-ids", "reject", "--max-rejects", "0.5", "--samples-per-shard", "7", "--held-out", "0.3")


def test_every_planted_fault_is_rejected_for_its_reason(faulty: FaultyInput, sharded: Path) -> None:
    rejects = rejects_of(sharded)
    assert {reject["line"]: reject["reason"] for reject in rejects} == faulty.reasons
    assert all(reject["file"] == "chat.jsonl" and reject["detail"] for reject in rejects)
    by_line = {reject["line"]: reject.get("id") for reject in rejects}
    records = (faulty.folder / "chat.jsonl").read_bytes().split(b"\n")
    for line in list(by_line)[:16]:  # where the id can be read, it is told
        assert by_line[line] == json.loads(records[line - 1])["id"]
    repeated = next(reject for reject in rejects if reject["reason"] == "duplicate_id")
    assert repeated["detail"] == "'one/0' was at chat.jsonl:1"


def test_read_is_written_and_rejected(faulty: FaultyInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(*faulty.arguments, *PLENTY, "--output", tmp_path) == 0
    table = capsys.readouterr().out
    for label, number in (("read", faulty.read), ("written", faulty.good), ("rejected", len(faulty.reasons))):
        assert f"│ {number} │" in next(line for line in table.splitlines() if line.startswith(f"│ {label}"))
    for reason, number in Counter(faulty.reasons.values()).items():
        assert f"│ {number:>2} │" in next(line for line in table.splitlines() if f" {reason}: " in line)
    assert (
        faulty.read == faulty.good + len(faulty.reasons) == sum(map(len, folders(tmp_path))) + len(rejects_of(tmp_path))
    )


def test_a_json_list_gives_the_same_samples_and_rejects(faulty: FaultyInput, sharded: Path, tmp_path: Path) -> None:
    arguments = [str(argument).replace("chat.jsonl", "chat.json") for argument in faulty.arguments]
    assert shard(*arguments, *PLENTY, "--output", tmp_path) == 0
    assert [folder.keys for folder in folders(tmp_path)] == [folder.keys for folder in folders(sharded)]
    in_lines = [reject["reason"] for reject in rejects_of(sharded) if reject.get("id") or reject["reason"][:3] != "bad"]
    assert [reject["reason"] for reject in rejects_of(tmp_path)] == in_lines


def test_any_number_of_ranks_writes_the_same_bytes(faulty: FaultyInput, sharded: Path, tmp_path: Path) -> None:
    run = mpirun(3, command("shard", *faulty.arguments, *PLENTY, "--output", tmp_path))
    assert run.returncode == 0, run.stderr
    assert content_of(tmp_path) == content_of(sharded)
    assert len(list(sharded.rglob("*.tar"))) > 6
    assert f"wrote {faulty.good} records" in run.stdout + run.stderr  # of all ranks together


def test_samples_stand_in_the_order_of_the_input_in_full_shards(sharded: Path) -> None:
    for folder in folders(sharded):
        samples = [folder.read(index) for index in range(len(folder))]
        order = [sample.record["provenance"]["index"] for sample in samples]
        assert order == sorted(order)
        assert [info.samples for info in folder.shards[:-1]] == [7] * (len(folder.shards) - 1)
        assert all(sample.record["provenance"]["source"] == "llava" for sample in samples)


def test_the_manifest_has_totals_and_provenance(faulty: FaultyInput, sharded: Path) -> None:
    for folder in folders(sharded):
        manifest = folder.manifest
        assert (manifest["format"], manifest["version"], manifest["split"]) == ("vlsi-shards", 1, folder.path.name)
        assert manifest["samples"] == len(folder) == sum(entry["samples"] for entry in manifest["shards"])
        assert manifest["bytes"] == sum(path.stat().st_size for path in folder.path.glob("*.tar"))
        for entry in manifest["shards"]:
            assert hashlib.sha256((folder.path / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]
        assert manifest["provenance"]["source"] == "llava"
        assert (manifest["provenance"]["read"], manifest["provenance"]["rejected"]) == (
            faulty.read,
            len(faulty.reasons),
        )


def test_no_picture_stands_in_both_splits(tmp_path: Path, chats: Chats) -> None:
    arguments = chats(60)
    lines = (tmp_path / "chat.jsonl").read_text().splitlines()
    for number, line in enumerate(lines[:30]):  # ask once more about the same pictures
        lines.append(json.dumps({**json.loads(line), "id": f"again-{number}"}))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    assert shard(*arguments, "--held-out", 0.4, "--output", tmp_path / "out") == 0
    train, held_out = (
        {image for index in range(len(folder)) for image in folder.read(index).images}
        for folder in folders(tmp_path / "out")
    )
    assert train and held_out and not train & held_out


def test_too_many_rejects_write_no_shard(
    faulty: FaultyInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(*faulty.arguments, "--repeated-ids", "reject", "--output", tmp_path) == 1
    said = capsys.readouterr()
    assert f"{len(faulty.reasons)} of {faulty.read} records are bad, more than --max-rejects 0.01" in said.err
    assert "the commonest reason: wrong_type (" in said.err and "No shard was written" in said.err
    assert "good, not written" in said.out
    assert list(content_of(tmp_path)) == ["rejects.jsonl"]
    assert len(rejects_of(tmp_path)) == len(faulty.reasons)


def test_a_rerun_keeps_finished_shards(tmp_path: Path, chats: Chats, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*chats(30), "--samples-per-shard", "5", "--output", str(tmp_path / "out")]
    assert shard(*arguments) == 0
    whole = content_of(tmp_path / "out")
    gone, cut, *rest = sorted((tmp_path / "out").rglob("*.tar"))
    stamps = {path: path.stat().st_mtime_ns for path in rest}
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:1000])
    leftover = gone.with_name(".000000.tar.1-abc.partial")
    leftover.write_bytes(b"half")
    assert shard(*arguments) == 0
    assert f"{len(rest)} of {len(rest) + 2} shards were finished by an earlier run" in capsys.readouterr().out
    assert content_of(tmp_path / "out") == whole
    assert {path: path.stat().st_mtime_ns for path in rest} == stamps


def test_a_killed_run_leaves_no_half_shard(tmp_path: Path, chats: Chats) -> None:
    arguments = [*chats(1200), "--samples-per-shard", "1"]
    run = subprocess.Popen(command("shard", *arguments, "--output", tmp_path / "out"), cwd=REPOSITORY)
    try:
        while not (tmp_path / "out/train/000002.tar").exists():
            assert run.poll() is None
            time.sleep(0.001)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    tars = sorted((tmp_path / "out").rglob("*.tar"))
    assert 3 <= len(tars) < 1200
    for path in tars:
        assert describe_shard(path)["samples"] == 1
    assert not list((tmp_path / "out").rglob("manifest.json"))
    assert shard(*arguments, "--output", tmp_path / "out") == 0
    assert shard(*arguments, "--output", tmp_path / "fresh") == 0
    assert content_of(tmp_path / "out") == content_of(tmp_path / "fresh")


def test_another_input_into_the_same_folder_is_refused(
    tmp_path: Path, chats: Chats, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ("--output", tmp_path / "out")
    assert shard(*chats(30), *output) == 0
    before = content_of(tmp_path / "out")
    assert shard(*chats(30), *output, "--held-out", 0.5) == 2
    assert "begun from something else: held_out was 0.05 and is 0.5. Give another --output" in capsys.readouterr().err
    assert shard(*chats(33), *output) == 2
    assert "the options are the same, so what the input holds has changed" in capsys.readouterr().err
    (tmp_path / "images/0.png").write_bytes((tmp_path / "images/3.png").read_bytes())
    assert shard(*chats(0), *output) == 2
    assert "read 0 records; expected at least one" in capsys.readouterr().err
    assert content_of(tmp_path / "out") == before
    (tmp_path / "out/plan.json").unlink()
    assert shard(*chats(30), *output) == 2
    assert "holds shards, but there is no" in capsys.readouterr().err


def test_a_moved_input_is_the_same_input(tmp_path: Path, chats: Chats) -> None:
    arguments = chats(12)
    assert shard(*arguments, "--output", tmp_path / "a") == 0
    (tmp_path / "elsewhere").mkdir()
    for name in ("chat.jsonl", "images"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    moved = [argument.replace(str(tmp_path), str(tmp_path / "elsewhere")) for argument in arguments]
    assert shard(*moved, "--output", tmp_path / "b") == 0
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_a_limit_reads_the_first_records_only(tmp_path: Path, chats: Chats) -> None:
    assert shard(*chats(30), "--limit", 4, "--held-out", 0, "--output", tmp_path / "out") == 0
    assert ShardFolder(tmp_path / "out/train").keys == [
        "one-0-" + hashlib.sha256(b"one/0").hexdigest()[:16],
        "1",
        "text-2",
        "one-3-" + hashlib.sha256(b"one/3").hexdigest()[:16],
    ]


FAILING = """
import sys
from data_prep.__main__ import main
from data_prep.schema import DataError
from data_prep.ranks import start_ranks
from data_prep.sources import LazyRecord, Sample, source

rank, calls = start_ranks().rank, 0
when, kind = sys.argv[1:3]

def sample(index):
    global calls
    calls += 1
    if rank == 1 and calls == (5 if when == "examining" else 70):  # 60 records are examined by rank 1, then written
        raise DataError("the disk of this host is gone") if kind == "expected" else ZeroDivisionError("a bug")
    user, text = {"role": "user"}, [{"type": "text", "text": str(index)}]
    return Sample([{"role": "user", "content": text}, {"role": "assistant", "content": text}], [])

@source("failing", lambda parser: None)
def read(args):
    "Fails on one rank."
    for index in range(180):
        yield LazyRecord(lambda index=index: sample(index))

sys.exit(main(["shard", "--source", "failing", "--samples-per-shard", "10", "--output", sys.argv[3]]))
"""


@pytest.mark.parametrize("when", ["examining", "writing"])
@pytest.mark.parametrize("kind", ["expected", "bug"])
def test_an_error_on_one_rank_ends_all(tmp_path: Path, when: str, kind: str) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    run = mpirun(3, [sys.executable, str(tmp_path / "failing.py"), when, kind, str(tmp_path / "out")])
    said = run.stdout + run.stderr
    if kind == "expected":
        assert run.returncode == 2
        assert said.count("error: rank 1 of 3: the disk of this host is gone") == 1 and "Traceback" not in said
    else:
        assert run.returncode == 1
        assert said.count("rank 1 of 3: ZeroDivisionError('a bug')") == 1 and said.count("Traceback") == 1
    assert not list((tmp_path / "out").rglob("*.partial")) and not list((tmp_path / "out").rglob("manifest.json"))
