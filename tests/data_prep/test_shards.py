from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.schema import DataError
from data_prep.shards import OPEN_FILES, ShardFolder, describe_shard, write_manifest, write_shard

SAMPLES = [
    (f"key-{number}", {"json": json.dumps({"n": number}).encode(), "0.png": b"p" * number * 300, "10.jpg": b"j"})
    for number in range(7)
]

FORKED = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor  # multiprocessing's Pool may hang where it ends its workers
from data_prep.shards import ShardFolder
read = ShardFolder(sys.argv[1])
read.read(0)  # a file is open when the workers are forked
with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
    samples = list(pool.map(read.read, list(range(7)) * 20))
assert samples == [read.read(index) for index in range(7)] * 20
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    entries = [write_shard(tmp_path / f"{k}.tar", SAMPLES[3 * k : 3 * k + 3]) for k in range(3)]
    write_manifest(tmp_path, entries, format="vlsi-shards", version=1, split="train", provenance={})
    return tmp_path


def test_what_was_written_is_read_in_any_order(folder: Path) -> None:
    read = ShardFolder(folder)
    assert len(read) == 7 and read.keys == [key for key, _ in SAMPLES]
    assert [(shard.first, shard.samples) for shard in read.shards] == [(0, 3), (3, 3), (6, 1)]
    for index in (6, 0, 5, 2, 3, 1, 4):
        assert read.read_members(index) == SAMPLES[index][1]
        assert list(read.read_members(index)) == ["json", "0.png", "10.jpg"]
        sample = read.read(index)
        assert (sample.key, sample.record, sample.images) == (f"key-{index}", {"n": index}, [b"p" * index * 300, b"j"])
    with pytest.raises(IndexError):
        read.read(7)


def test_the_manifest_describes_the_files(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["samples"], manifest["bytes"]) == (7, sum(path.stat().st_size for path in folder.glob("*.tar")))
    for entry in manifest["shards"]:
        assert describe_shard(folder / entry["name"]) == entry
        content = (folder / entry["name"]).read_bytes()
        for key, offset in zip(entry["keys"], entry["offsets"], strict=True):
            assert content[offset:].startswith(f"{key}.json\0".encode())


def test_no_time_and_no_owner_is_in_the_tar(folder: Path) -> None:
    with tarfile.open(folder / "0.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.isreg() and not member.pax_headers


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield SAMPLES[0]
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_shard(tmp_path / "0.tar", samples())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["../up", "a/b", "a.b/c", "", ".hidden", "x" * 100, "blank key"])
def test_names_that_are_not_safe_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not safe as a member"):
        write_shard(tmp_path / "0.tar", [(key, {"json": b"{}"})])


def test_a_key_comes_once_in_a_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' comes twice"):
        write_shard(tmp_path / "0.tar", [("a", {"json": b"{}"})] * 2)


def test_a_folder_travels_to_other_processes(folder: Path) -> None:
    read = ShardFolder(folder)
    assert read.read(0).key == "key-0"  # a file is open now
    assert pickle.loads(pickle.dumps(read)).read(4) == read.read(4)
    # In a process of its own: this one may have threads, and a fork of it may never end.
    subprocess.run([sys.executable, "-c", FORKED, str(folder)], cwd=Path(__file__).parents[2], check=True, timeout=120)


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    count = OPEN_FILES + 5
    entries = [write_shard(tmp_path / f"{k}.tar", [(f"k{k}", {"json": b"{}"})]) for k in range(count)]
    write_manifest(tmp_path, entries, format="vlsi-shards", version=1)
    read = ShardFolder(tmp_path)
    assert [read.read(index).key for index in [*range(count), 0]] == [f"k{k}" for k in [*range(count), 0]]
    assert len(read._open) == OPEN_FILES


def test_a_folder_without_manifest_says_how_to_make_one(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"no .*manifest.json; expected a shard folder .*python -m data_prep shard"):
        ShardFolder(tmp_path / "none")
    with pytest.raises(DataError, match="has not ended yet"):
        ShardFolder(tmp_path / "none", format="vlsi-cache")
    folder.rename(folder.parent / "train")
    with pytest.raises(DataError, match="did you mean .*train"):
        ShardFolder(folder.parent)


def test_another_kind_or_version_or_a_damaged_manifest_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="format 'vlsi-shards'; expected 'vlsi-cache'"):
        ShardFolder(folder, format="vlsi-cache")
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(DataError, match="version 9; this program reads up to 1"):
        ShardFolder(folder)
    path.write_text(text[:100])
    with pytest.raises(DataError, match="is damaged"):
        ShardFolder(folder)
    path.write_text(unsigned(text).replace('"key-6"', '"key-6", "key-7"'))
    with pytest.raises(DataError, match="keys and offsets do not match"):
        ShardFolder(folder)


def unsigned(text: str) -> str:
    """A manifest as versions before the checksum wrote it."""
    return "\n".join(line for line in text.split("\n") if '"checksum"' not in line)


def test_a_manifest_without_checksum_is_read(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(unsigned(path.read_text()))
    assert [ShardFolder(folder).read(index).key for index in range(7)] == [key for key, _ in SAMPLES]


def test_every_changed_byte_of_a_manifest_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DataError, match=r"manifest.json (is damaged|has format|has version)"):
            ShardFolder(folder)
    for end in range(0, len(content), 50):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"manifest.json is damaged"):
            ShardFolder(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.pop("bytes"), "the manifest has no 'bytes'"),
        (lambda m: m.pop("format"), "the manifest has no 'format'"),
        (lambda m: m.update(version="1"), "the manifest has 'version' a str; expected a int"),
        (lambda m: m.update(shards=3), "the manifest has 'shards' a int; expected a list"),
        (lambda m: m["shards"].append(3), "shard 3 is a int; expected an object"),
        (lambda m: m["shards"][1].pop("sha256"), "shard 1 has no 'sha256'"),
        (lambda m: m["shards"][1].pop("end"), "shard 1 has no 'end'"),
        (lambda m: m["shards"][0].update(keys=[1, 2, 3]), "shard 0: a key is no text"),
        (lambda m: m["shards"][0]["offsets"].reverse(), "shard 0: the offsets do not rise"),
        (lambda m: m["shards"][0].update(end=0), "shard 0: the offsets do not rise"),
        (
            lambda m: m["shards"][1].update(name="../../../victim/config.tar"),
            "shard 1: '../../../victim/config.tar' is",
        ),
        (lambda m: m["shards"][1].update(name="/victim/0.tar"), "shard 1: '/victim/0.tar' is not the name of a shard"),
        (lambda m: m["shards"][1].update(name="..\\0.tar"), "shard 1: .* is not the name of a shard"),
        (lambda m: m["shards"][1].update(name="0.tar\n"), "shard 1: .* is not the name of a shard"),
        (lambda m: m["shards"][1].update(name=".hidden.tar"), "shard 1: '.hidden.tar' is not the name of a shard"),
        (lambda m: m["shards"][1].update(name="0.tar"), "0.tar stands there twice"),
    ],
)
def test_what_a_manifest_lacks_is_named(folder: Path, change: Callable[[Any], object], message: str) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(unsigned(path.read_text()))
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"is damaged: {message}"):
        ShardFolder(folder)


def test_a_claimed_size_takes_no_memory(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(unsigned(path.read_text()))
    manifest["shards"][2]["end"] = 2**50
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"cannot read sample 'key-6': the file ends \d+ bytes early"):
        ShardFolder(folder).read(6)


def test_a_damaged_shard_is_named(folder: Path) -> None:
    content = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(content[:2000])
    with pytest.raises(DataError, match=r"1.tar: cannot read sample 'key-5'.*python -m data_prep lint"):
        ShardFolder(folder).read(5)
    with pytest.raises(DataError, match="cut off|not a whole tar"):
        describe_shard(folder / "1.tar")
    (folder / "1.tar").write_bytes(content.replace(b"key-4", b"key-9"))
    with pytest.raises(DataError, match="cannot read sample 'key-4'"):
        ShardFolder(folder).read(4)
    (folder / "1.tar").unlink()
    with pytest.raises(DataError, match="cannot read sample 'key-3'.*No such file"):
        ShardFolder(folder).read(3)
