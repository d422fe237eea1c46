"""The shards load with other people's readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import webdataset
from faulty_input import shard

from data_prep.shards import ShardFolder


@pytest.fixture
def one_image_each(tmp_path: Path) -> ShardFolder:
    arguments = ("--source", "puzzles", "--count", 12, "--held-out-count", 0, "--samples-per-shard", 5)
    assert shard(*arguments, "--output", tmp_path / "out") == 0
    return ShardFolder(tmp_path / "out/train")


@pytest.fixture
def of_all_kinds(tmp_path: Path, chats: Callable[..., list[str]]) -> ShardFolder:
    """No image, one, two; PNG and JPEG."""
    assert shard(*chats(12), "--held-out", 0, "--samples-per-shard", 5, "--output", tmp_path / "out") == 0
    return ShardFolder(tmp_path / "out/train")


def files(folder: ShardFolder) -> list[str]:
    return [str(folder.path / info.name) for info in folder.shards]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets(one_image_each: ShardFolder, streaming: bool, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(
        "webdataset",
        data_files=files(one_image_each),
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    rows = list(loaded)
    assert [row["__key__"] for row in rows] == one_image_each.keys
    for index, row in enumerate(rows):
        assert row["json"]["id"] == one_image_each.read(index).record["id"]
        assert row["0.png"].size == (4 * row["0.png"].height, row["0.png"].height)


def test_datasets_with_samples_of_several_kinds_is_told_the_columns(of_all_kinds: ShardFolder) -> None:
    features = datasets.Features(
        {
            "__key__": datasets.Value("string"),
            "__url__": datasets.Value("string"),
            "json": datasets.Json(),
            "0.png": datasets.Image(),
            "1.jpg": datasets.Image(),
        }
    )
    loaded = datasets.load_dataset(
        "webdataset", data_files=files(of_all_kinds), split="train", streaming=True, features=features
    )
    for index, row in enumerate(loaded):
        sample = of_all_kinds.read(index)
        assert row["json"] == sample.record
        assert [row["0.png"] is not None, row["1.jpg"] is not None] == [len(sample.images) > place for place in (0, 1)]


def test_webdataset(of_all_kinds: ShardFolder) -> None:
    loaded = list(webdataset.WebDataset(files(of_all_kinds), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in loaded] == of_all_kinds.keys
    for index, sample in enumerate(loaded):
        members = {name: sample[name] for name in sample if not name.startswith("__")}
        assert members == of_all_kinds.read_members(index)
        assert json.loads(sample["json"]) == of_all_kinds.read(index).record


def test_webdataset_decodes_them(one_image_each: ShardFolder) -> None:
    for sample in webdataset.WebDataset(files(one_image_each), shardshuffle=False, empty_check=False).decode("pil"):
        assert sample["0.png"].mode == "RGB" and sample["json"]["messages"][1]["role"] == "assistant"
