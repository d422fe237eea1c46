"""A disk that is full or read-only while shards, a cache or models are written.

The error is plain and names the file; nothing half-written stands under a final name or is left aside; and when the
disk is mended the same thing goes on.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from disks import small_disk
from running import deepspeed, tiny_recipe
from safetensors.torch import load_file
from tiny import write_data

from data_prep.__main__ import main as data_prep
from data_prep.atomic import storage_fault, write_file
from data_prep.shards import ShardFolder
from pipeline.vlm.export import copy_student, save_student
from pipeline.vlm.verb_ffns import save_verb_ffns
from pipeline.vlm.whole import whole_folder


def llava(folder: Path, samples: int) -> list[str]:
    """The arguments of `data_prep shard` for text-only chats of a kilobyte or two."""
    folder.mkdir()
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "so " * 500}]
    chats = [{"id": f"c{number}", "conversations": turns} for number in range(samples)]
    (folder / "chats.json").write_text(json.dumps(chats))
    return ["shard", "--source", "llava", "--input", str(folder / "chats.json"), "--samples-per-shard", "10",
            "--held-out", "0"]  # fmt: skip


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_sharding_goes_on_when_the_disk_is_mended(tmp_path, capsys, fault, survived):
    command = llava(tmp_path / "input", 40)
    with small_disk(tmp_path / "disk", 64) as disk:
        disk.allow_writing(fault == "full")
        shard = [*command, "--output", str(disk.path / "out")]
        assert data_prep(shard) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and f"error: {disk.path / 'out'}" in said
        assert {"full": "No space left on device; free some space", "read-only": "Read-only file system; mount it"}[
            fault
        ] in said
        made = [name for name in disk.files() if name.startswith("out/train")]
        assert all(name.endswith(".tar") and "/." not in name for name in made), "no part of a shard, and no manifest"
        disk.allow_writing(True)
        disk.resize(4096)
        assert data_prep(shard) == 0
        assert f"{len(made)} of 4 shards were finished by an earlier run" in capsys.readouterr().out or not made
        assert len(ShardFolder(disk.path / "out" / "train")) == 40
    survived(faults=1)


@pytest.fixture(scope="module")
def student(tiny_models):
    from pipeline.vlm.backbone import load_vlm

    folder = tiny_models["qwen2_vl", "student"]
    return load_vlm(folder, torch.float32), folder


def test_an_export_is_whole_or_nothing(tmp_path, student):
    model, folder = student
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    verb_ffns = {"1.down.weight": torch.zeros(300, 300)}
    with small_disk(tmp_path / "disk", 128) as disk:
        writes = {
            "student": lambda path: save_student(model, weights, folder, path),
            "copy": lambda path: copy_student(folder, path),
            "teacher.safetensors": lambda path: save_verb_ffns(verb_ffns, path),
        }
        for name, write in writes.items():
            path = disk.path / name
            with pytest.raises(OSError) as raised:
                write(path)
            said = storage_fault(raised.value)
            assert said is not None and said.startswith(f"{path}: No space left on device; free some space"), name
            assert disk.files() == [] and not path.exists(), "nothing of it keeps the disk full"
        disk.resize(8192)
        for name, write in writes.items():
            write(disk.path / name)
        was, written = load_file(folder / "model.safetensors"), load_file(disk.path / "student" / "model.safetensors")
        assert was.keys() == written.keys() and all(was[name].equal(written[name]) for name in was)
        assert (disk.path / "copy" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
        assert torch.equal(load_file(disk.path / "teacher.safetensors")["1.down.weight"], verb_ffns["1.down.weight"])


def test_an_export_that_fails_leaves_the_one_before(tmp_path, survived):
    with whole_folder(tmp_path / "student") as aside:
        (aside / "config.json").write_text("{}")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "student") as aside:
        (aside / "config.json").write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "student" / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    survived(faults=1)


def test_every_storage_fault_has_its_advice(tmp_path):
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE):
        said = storage_fault(OSError(number, os.strerror(number), "RUN/cache/000001.tar"))
        assert said is not None and said.startswith(f"RUN/cache/000001.tar: {os.strerror(number)}; ")
        assert said.endswith("and run the same command again: what is whole stays")
    assert storage_fault(FileNotFoundError(errno.ENOENT, "No such file")) is None
    assert storage_fault(ValueError("28")) is None
    assert storage_fault(OSError(errno.ENOTCONN, "Transport endpoint is not connected")) is None, "of a socket"


def test_a_job_on_a_read_only_or_full_run_folder_says_so(tmp_path, tiny_models, survived):
    """The run folder's disk, first read-only and then full in the middle of the step; then the run goes on."""
    data = write_data(tmp_path / "data", 8)
    short = {"steps": 2, "batch_size": 4}
    with small_disk(tmp_path / "disk", 4) as disk:
        recipe = tiny_recipe(
            tmp_path, tiny_models, "qwen2_vl", data, "zero0", run=str(disk.path / "run"), verbalize=short
        )
        stage = ["train.py", "--stage", 1, "--only", "verbalize", "--recipe", recipe]
        disk.allow_writing(False)
        said = deepspeed(1, *stage, check=2)
        assert "Read-only file system; mount it for writing" in said and "Traceback" not in said
        disk.allow_writing(True)
        (disk.path / "filling").write_bytes(b"x" * 4096)
        said = deepspeed(1, *stage, check=2)
        assert "No space left on device; free some space on that disk" in said and "Traceback" not in said
        (disk.path / "filling").unlink()
        assert not (disk.path / "run" / "verbalize" / "done.json").exists()
        disk.resize(64 * 1024)
        deepspeed(1, *stage)
        assert (disk.path / "run" / "verbalize" / "done.json").is_file()
    survived(faults=2)


def test_writing_names_the_file(tmp_path):
    with small_disk(tmp_path / "disk", 4) as disk:
        with pytest.raises(OSError) as raised:
            write_file(disk.path / "manifest.json", b"x" * 9000)
        assert raised.value.filename == str(disk.path / "manifest.json") and disk.files() == []
