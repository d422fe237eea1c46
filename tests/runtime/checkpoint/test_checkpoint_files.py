"""A step's checkpoints on disk: whole or not there, verified before they are read, and no code in them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import threading
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.errors import CheckpointError
from pipeline.runtime.checkpoint import checkpoints as module
from pipeline.runtime.checkpoint import trained_state
from pipeline.runtime.checkpoint.checkpoints import Checkpoints
from pipeline.runtime.checkpoint.files import (
    Damaged,
    Index,
    Reader,
    file_size,
    find_damage,
    read_index,
    write_index,
    write_rank_file,
)
from pipeline.runtime.checkpoint.trained_state import KINDS, Piece, Span, TrainedState, host_copy
from pipeline.runtime.ranks import Ranks

WIDTH = 64


class Training:
    """A module under plain AdamW, as ZeRO 0 has it; its first bias is frozen."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        self.module[0].bias.requires_grad_(False)
        self.adamw = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], 1e-2, fused=True)

    def update(self) -> None:
        self.module(torch.randn(4, WIDTH)).square().sum().backward()
        self.adamw.step()
        self.adamw.zero_grad()

    def state(self) -> TrainedState:
        return TrainedState(self.module, self.adamw, 0, Ranks())

    def numbers(self) -> list[torch.Tensor]:
        moments = [t for state in self.adamw.state.values() for t in state.values()]
        return [t.detach().clone() for t in (*self.module.parameters(), *moments)]


def saved(folder: Path, *updates: int, keep: int = 2) -> tuple[Checkpoints, Training, dict[int, list]]:
    """Checkpoints of these updates, and all numbers after each."""
    checkpoints, training, numbers = Checkpoints(folder, keep, Ranks()), Training(), {}
    for update in updates:
        training.update()
        numbers[update] = training.numbers()
        checkpoints.save(training.state(), update, {"read": update})
        checkpoints.finish()
    return checkpoints, training, numbers


def rank_file(folder: Path, update: int) -> Path:
    return folder / "checkpoints" / f"update_{update:09}" / "rank_00000.safetensors"


def index_file(folder: Path, update: int) -> Path:
    return rank_file(folder, update).with_name("checkpoint.json")


def equal(ours: list, theirs: list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("available", [2**30, 0], ids=["beside training", "no memory for a copy"])
def test_what_is_read_is_what_was_when_it_was_saved(tmp_path, monkeypatch, available):
    trained_on = threading.Event()
    if not available:
        trained_on.set()  # it is written before `save` returns

    def late(*arguments):
        assert trained_on.wait(60)
        return write_rank_file(*arguments)

    monkeypatch.setattr(module, "available_memory", lambda: available)
    monkeypatch.setattr(module, "write_rank_file", late)
    checkpoints, training = Checkpoints(tmp_path, 2, Ranks()), Training()
    training.update()
    then = training.numbers()
    checkpoints.save(training.state(), 1, {"averages": {"loss": 0.1 + 0.2}})
    training.update()
    checkpoints.publish()
    assert index_file(tmp_path, 1).exists() != bool(available), "it counts once it is whole"
    trained_on.set()
    checkpoints.finish()
    resumed = Training()
    assert checkpoints.load(checkpoints.newest(), resumed.state()) == {"averages": {"loss": 0.1 + 0.2}}
    assert equal(resumed.numbers(), then) and not equal(resumed.numbers(), training.numbers())


def test_frozen_weights_are_not_saved_and_transformers_own_reader_reads_it(tmp_path):
    _, training, _ = saved(tmp_path, 1)
    tensors = load_file(rank_file(tmp_path, 1))
    names = {"0.weight", "1.weight", "1.bias"}
    assert set(tensors) == {f"{kind}/{name}" for kind in KINDS for name in names}
    assert torch.equal(tensors["master/1.weight"], training.module[1].weight.flatten())
    assert rank_file(tmp_path, 1).stat().st_size == file_size(training.state().spans())


def test_the_newest_stay(tmp_path):
    saved(tmp_path, 1, 2, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "update_000000002",
        "update_000000003",
    ]


def flipped(at: float):
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 16
        path.write_bytes(content)

    return damage


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"}"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(print)),
} | {f"a bit flipped at {at}": flipped(at) for at in (0.0, 0.1, 0.5, 1.0)}


@pytest.mark.parametrize("of", [rank_file, index_file], ids=["the weights", "the index"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_noticed_and_the_one_before_it_taken(tmp_path, damage, of, capsys):
    checkpoints, _, numbers = saved(tmp_path, 1, 2)
    DAMAGE[damage](of(tmp_path, 2))
    resumed, newest = Training(), checkpoints.newest()
    assert newest.update == 1
    checkpoints.load(newest, resumed.state())
    assert equal(resumed.numbers(), numbers[1])
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: " in said and of(tmp_path, 2).name in said and "damaged_000000002" in said
    assert not rank_file(tmp_path, 2).exists()


def test_a_missing_file_and_nothing_left_to_fall_back_to(tmp_path):
    checkpoints, _, _ = saved(tmp_path, 1, keep=1)
    rank_file(tmp_path, 1).unlink()
    with pytest.raises(
        CheckpointError, match=r"rank_00000.safetensors cannot be read: No such file.*to train the step"
    ):
        checkpoints.newest()
    assert index_file(tmp_path, 1).exists(), "it is left as it is: a disk may have failed for a moment"


@pytest.mark.parametrize("room", [1, 2 * WIDTH * WIDTH + 1, 10**4])
def test_a_copy_has_the_state_of_its_moment_however_it_lies_in_memory(monkeypatch, room):
    monkeypatch.setattr(trained_state, "ROOM", room)
    training = Training()
    training.update()
    expected = [(p.span, p.step, {k: v.clone() for k, v in p.values.items()}) for p in training.state().pieces()]
    copies = host_copy(training.state())
    training.update()
    for (span, step, values), copy in zip(expected, copies, strict=True):
        assert (copy.span, copy.step) == (span, step)
        assert all(torch.equal(copy.values[kind], values[kind]) for kind in KINDS)


def test_half_a_checkpoint_of_a_killed_job_is_removed_and_never_taken(tmp_path):
    checkpoints, _, _ = saved(tmp_path, 1, 2)
    index_file(tmp_path, 2).unlink()
    assert checkpoints.newest().update == 1 and not rank_file(tmp_path, 2).parent.exists()


def test_a_process_killed_while_it_writes_leaves_no_file_of_that_name(tmp_path):
    checkpoints, training, _ = saved(tmp_path, 1)
    folder = rank_file(tmp_path, 2).parent

    def killed_after_the_first():
        for piece in training.state().pieces():
            yield piece
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        write_rank_file(folder, 0, training.state().spans(), killed_after_the_first())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.suffix for path in folder.iterdir()] == [".partial"]
    assert checkpoints.newest().update == 1 and not folder.exists()


class Runs:
    """Unpickled, it makes a file: code that a checkpoint must not run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_the_right_hash_is_not_unpickled(tmp_path):
    checkpoints, training, _ = saved(tmp_path, 1)
    ran, path = tmp_path / "ran", rank_file(tmp_path, 1)
    path.write_bytes(pickle.dumps(Runs(ran)))
    index = read_index(path.parent)
    forged = replace(index.files[0], bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    write_index(path.parent, replace(index, files=[forged]))
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors has no master/"):
        checkpoints.load(checkpoints.newest(), training.state())
    assert not ran.exists()


HOSTILE = {
    "a name that leaves the folder": lambda i: replace(i, files=[replace(i.files[0], name="../../rank_0.safetensors")]),
    "spans of the wrong type": lambda i: replace(i, files=[replace(i.files[0], pieces={"1.bias": [0, "x", 1]})]),
    "files that are none": lambda i: replace(i, files=["rank_00000.safetensors"]),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_an_index_that_says_what_none_can_is_damaged(tmp_path, hostile):
    saved(tmp_path, 1)
    folder = rank_file(tmp_path, 1).parent
    content = {"format": "vlsi-checkpoint", "version": 1, **asdict(read_index(folder))}
    forged = HOSTILE[hostile](read_index(folder))
    content["files"] = [asdict(file) if is_dataclass(file) else file for file in forged.files]
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    index_file(tmp_path, 1).write_text(json.dumps({**content, "checksum": checksum}))
    with pytest.raises(Damaged, match=r"checkpoint\.json is damaged: (Value|Type)Error"):
        read_index(folder)


def test_an_index_of_a_hundred_thousand_brackets_is_damaged(tmp_path):
    saved(tmp_path, 1)
    index_file(tmp_path, 1).write_text("[" * 100_000)
    with pytest.raises(Damaged, match="RecursionError"):
        read_index(rank_file(tmp_path, 1).parent)


def test_checkpoints_of_older_versions_are_refused(tmp_path):
    old = tmp_path / "checkpoints" / "update_000000007"
    old.mkdir(parents=True)
    (old / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(pickle.dumps(print))
    (old / "whole").touch()
    with pytest.raises(CheckpointError, match=r"update_000000007 was written by an older version.*could execute code"):
        Checkpoints(tmp_path, 2, Ranks()).newest()
    assert (old / "whole").exists()


def test_a_newer_version_is_refused_and_left_alone(tmp_path):
    checkpoints, _, _ = saved(tmp_path, 1)
    content = json.loads(index_file(tmp_path, 1).read_text())
    index_file(tmp_path, 1).write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(CheckpointError, match="version 2; this program reads up to 1: update it"):
        checkpoints.newest()
    assert index_file(tmp_path, 1).exists()


def test_other_trained_parameters_are_refused(tmp_path):
    checkpoints, _, _ = saved(tmp_path, 1)
    other = Training()
    other.module[1].bias.requires_grad_(False)
    other.adamw = torch.optim.AdamW([p for p in other.module.parameters() if p.requires_grad], fused=True)
    with pytest.raises(CheckpointError, match=r"1 differ, first 1\.bias: 64 elements in the checkpoint, no now"):
        checkpoints.load(checkpoints.newest(), other.state())


def test_any_spans_are_read_from_any_spans(tmp_path):
    """The whole of each parameter, cut at random for so many writers, is read in as many random cuts."""
    draw = random.Random(0)
    sizes = {"a": 1, "b": 7, "c": 1000}
    whole = {name: {kind: torch.randn(size) for kind in KINDS} for name, size in sizes.items()}

    def cut(size: int) -> list[tuple[int, int]]:
        edges = sorted({0, size, *(draw.randrange(size) for _ in range(draw.randrange(4)))})
        return list(itertools.pairwise(edges))

    for trial in range(20):
        held: dict[int, list[Piece]] = {}
        for name, size in sizes.items():
            for rank, (begin, end) in enumerate(cut(size)):
                values = {kind: value[begin:end] for kind, value in whole[name].items()}
                held.setdefault(rank, []).append(Piece(Span(name, begin, end - begin), float(rank), values))
        folder = tmp_path / str(trial)
        files = [write_rank_file(folder, rank, [p.span for p in held[rank]], held[rank]) for rank in sorted(held)]
        reader = Reader(folder, Index(1, {}, sizes, files))
        reader.check_parameters(sizes)
        assert find_damage(folder, files) == []
        for name, size in sizes.items():
            for begin, end in cut(size):
                piece = reader.read(Span(name, begin, end - begin))
                assert all(torch.equal(piece.values[kind], whole[name][kind][begin:end]) for kind in KINDS)
        with pytest.raises(CheckpointError, match=r"the spans of a in checkpoint\.json are not its 1 elements"):
            Reader(folder, Index(1, {}, sizes, files[1:])).check_parameters(sizes)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; one checkpoint here takes about 100 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_is_an_error_with_numbers_and_the_run_goes_on_once_there_is_room(small_disk, monkeypatch):
    checkpoints, training, numbers = saved(small_disk, 1)
    (small_disk / "else").write_bytes(bytes(100_000))
    training.update()
    with pytest.raises(
        CheckpointError, match=r"No space left on device\): it needs \d+,\d{3} bytes, and [\d,]+ are free"
    ):
        checkpoints.save(training.state(), 2, {})
    monkeypatch.setattr(module, "check_room", lambda *_: None)  # as if it filled up while it is written
    checkpoints.save(training.state(), 2, {})
    with pytest.raises(CheckpointError, match="No space left on device.*free some, or lower keep_checkpoints"):
        checkpoints.finish()
    assert sorted(path.name for path in (small_disk / "checkpoints").iterdir()) == ["update_000000001"]
    resumed = Training()
    checkpoints.load(checkpoints.newest(), resumed.state())
    assert equal(resumed.numbers(), numbers[1]), "the last whole one stays"
    (small_disk / "else").unlink()
    checkpoints.save(training.state(), 2, {})
    checkpoints.finish()
    assert checkpoints.newest().update == 2


def test_a_read_only_disk_is_an_error_before_any_update(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Read-only file system\).*make it writable"):
        Checkpoints(small_disk / "run", 2, Ranks()).check_room(Training().state())
