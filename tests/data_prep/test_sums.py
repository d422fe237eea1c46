"""A bit that flips in a shard is found when its sample is read, whichever bit it is."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import pytest
from faulty_input import picture

from data_prep.schema import ChangedSample, DataError
from data_prep.shards import FORMAT, ShardFolder, describe_shard, write_manifest, write_shard

TEXT = [{"type": "text", "text": "hello"}]
RECORD = json.dumps({"id": "a", "messages": [{"role": "user", "content": TEXT}]}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    samples = [(f"key-{number}", {"json": RECORD, "0.bmp": picture(number, "BMP")}) for number in range(4)]
    write_manifest(tmp_path, [write_shard(tmp_path / "000000.tar", samples)], format=FORMAT, version=1, split="train")
    return tmp_path


def test_the_manifest_has_the_crc_of_each_samples_bytes(folder: Path) -> None:
    (entry,) = ShardFolder(folder).manifest["shards"]
    content = (folder / "000000.tar").read_bytes()
    bounds = zip(entry["offsets"], [*entry["offsets"][1:], entry["end"]], strict=True)
    assert entry["sums"] == [zlib.crc32(content[start:stop]) for start, stop in bounds]
    assert describe_shard(folder / "000000.tar") == entry


def test_every_flipped_bit_is_found_by_the_read_of_its_sample_alone(folder: Path) -> None:
    """In a picture without a checksum of its own (BMP) it went unnoticed: another picture was trained on."""
    shard, data, draw = folder / "000000.tar", ShardFolder(folder), random.Random(0)
    (entry,) = data.manifest["shards"]
    good = shard.read_bytes()
    for _ in range(200):
        flipped, at = bytearray(good), draw.randrange(entry["end"])
        flipped[at] ^= 1 << draw.randrange(8)
        shard.write_bytes(flipped)
        hit = sum(offset <= at for offset in entry["offsets"]) - 1
        with pytest.raises(ChangedSample, match=rf"000000.tar: cannot read sample 'key-{hit}': its bytes do not match"):
            data.read(hit)
        for other in {0, 1, 2, 3} - {hit}:
            data.read(other)


def test_a_manifest_from_before_there_were_sums_is_read_as_it_is(folder: Path) -> None:
    (entry,) = ShardFolder(folder).manifest["shards"]
    del entry["sums"]
    write_manifest(folder, [entry], format=FORMAT, version=1, split="train")
    assert ShardFolder(folder).read(2).key == "key-2"


@pytest.mark.parametrize(
    "sums", [[1, 2, 3], [1, 2, 3, -1], [1, 2, 3, 2**32], [1, 2, 3, True], "abcd", [[], [], [], []]]
)
def test_sums_that_cannot_be_are_a_damaged_manifest(folder: Path, sums) -> None:
    (entry,) = ShardFolder(folder).manifest["shards"]
    write_manifest(folder, [entry | {"sums": sums}], format=FORMAT, version=1, split="train")
    with pytest.raises(DataError, match="sums are not those of its samples"):
        ShardFolder(folder)
