"""A manifest says how large each sample is; one from before there were sizes is read as it was."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from faulty_input import shard
from PIL import Image

from data_prep.lint import lint
from data_prep.schema import DataError
from data_prep.shards import FORMAT, MANIFEST, ShardFolder, describe_shard, write_manifest, write_shard
from data_prep.sizes import SampleSize, is_size, sample_size


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, kind)
    return buffer.getvalue()


def chat(number: int, images: int) -> bytes:
    question = [{"type": "image"}] * images + [{"type": "text", "text": "wië?"}]
    answer = [{"type": "text", "text": "x" * number}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": f"k{number}", "messages": messages, "provenance": {}}).encode()


SAMPLES = [
    ("k1", {"json": chat(1, 1), "0.png": picture(30, 20)}),
    ("k2", {"json": chat(2, 2), "0.png": picture(8, 9), "1.jpg": picture(100, 7, "JPEG")}),
    ("k3", {"json": chat(3, 0)}),
]
SIZES = [SampleSize(5, ((30, 20),)), SampleSize(6, ((8, 9), (100, 7))), SampleSize(7, ())]


def write(folder: Path, entries: list) -> ShardFolder:
    write_manifest(folder, entries, format=FORMAT, version=1, split="train", provenance={})
    return ShardFolder(folder)


def test_sizes_are_of_characters_and_pixels_and_survive_the_manifest(tmp_path):
    entries = [write_shard(tmp_path / "000000.tar", SAMPLES[:2]), write_shard(tmp_path / "000001.tar", SAMPLES[2:])]
    folder = write(tmp_path, entries)
    assert entries[0]["sizes"] == [[5, 30, 20], [6, 8, 9, 100, 7]]
    assert folder.has_sizes and [folder.size(index) for index in range(3)] == SIZES
    assert [describe_shard(tmp_path / entry["name"]) for entry in entries] == entries, "also read back from the tar"


def test_bytes_of_a_sample_are_those_between_the_offsets(tmp_path):
    folder = write(tmp_path, [write_shard(tmp_path / "000000.tar", SAMPLES)])
    (entry,) = folder.manifest["shards"]
    assert [folder.nbytes(index) for index in range(3)] == [
        end - start for start, end in zip(entry["offsets"], [*entry["offsets"][1:], entry["end"]], strict=True)
    ]
    with pytest.raises(IndexError):
        folder.nbytes(3)


def test_a_folder_from_before_there_were_sizes_is_read_and_linted(tmp_path):
    entry = write_shard(tmp_path / "000000.tar", SAMPLES)
    folder = write(tmp_path, [{name: value for name, value in entry.items() if name != "sizes"}])
    assert not folder.has_sizes and folder.read(1).images == list(SAMPLES[1][1].values())[1:]
    assert lint([folder])[0] == []
    with pytest.raises(KeyError):
        folder.size(0)


def test_wrong_sizes_are_found_by_lint(tmp_path):
    entry = write_shard(tmp_path / "000000.tar", SAMPLES)
    entry["sizes"][2] = [700]
    (problem,) = lint([write(tmp_path, [entry])])[0]
    assert "sizes differ from the manifest's" in problem.what


@pytest.mark.parametrize("sizes", [[[1], [2]], [[1], [2], [3, 4]], [[1], [2], [-3]], [[1], [2], ["3"]], "abc"])
def test_impossible_sizes_make_a_manifest_damaged(tmp_path, sizes):
    entry = write_shard(tmp_path / "000000.tar", SAMPLES) | {"sizes": sizes}
    with pytest.raises(DataError, match="damaged: shard 0: sizes are not those of its samples"):
        write(tmp_path, [entry])


@pytest.mark.parametrize(
    "content", [b"{}", b"not json", b'{"messages": 3}', b'{"messages": [{"content": ["a"]}]}', b"[" * 100_000]
)
def test_what_holds_no_chat_has_no_size(content, tmp_path):
    assert sample_size({"json": content}) is None and sample_size({"bin": content}) is None
    assert "sizes" not in write_shard(tmp_path / "000000.tar", [SAMPLES[0], ("other", {"json": content})])


def test_an_image_that_no_reader_opens_has_no_pixels():
    assert sample_size({"json": chat(1, 1), "0.png": b"no picture"}) == SampleSize(5, ((0, 0),))
    assert is_size(SampleSize(5, ((0, 0),)).to_json())


def test_the_same_shard_command_again_adds_the_sizes_and_keeps_the_shards(tmp_path):
    """As an error of training advises: what a teacher cache was made for stays as it is."""
    command = ["--source", "puzzles", "--count", "12", "--samples-per-shard", "5", "--output", str(tmp_path / "data")]
    assert shard(*command) == 0
    path = tmp_path / "data" / "train"
    new = (path / MANIFEST).read_bytes()
    manifest = json.loads(new)
    fields = {name: manifest[name] for name in ("format", "version", "split", "provenance")}
    for entry in manifest["shards"]:
        del entry["sizes"]
    write_manifest(path, manifest["shards"], **fields)
    before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.glob("*.tar")}
    assert not ShardFolder(path).has_sizes
    assert shard(*command) == 0
    assert (path / MANIFEST).read_bytes() == new and ShardFolder(path).has_sizes
    assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.glob("*.tar")} == before
