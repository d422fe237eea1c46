"""puzzles and easy-vqa: sources with a split, a noise share and question types of their own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from faulty_input import content_of, shard

from data_prep.puzzles import puzzle
from data_prep.shards import RawSample, ShardFolder
from data_prep.sources import all_sources
from data_prep.sources.easy_vqa import ANSWERS


def made(output: Path, *arguments: Any) -> dict[str, list[RawSample]]:
    assert shard("--output", output, *arguments) == 0
    folders = {split: ShardFolder(output / split) for split in ("train", "held_out")}
    return {split: [folder.read(index) for index in range(len(folder))] for split, folder in folders.items()}


def answer(sample: RawSample) -> str:
    return sample.record["messages"][-1]["content"][0]["text"]


PUZZLES = ("--source", "puzzles", "--count", 30, "--held-out-count", 10, "--seed", 3)


def test_puzzles_are_those_that_were_drawn(tmp_path: Path) -> None:
    splits = made(tmp_path, *PUZZLES, "--kinds", "next,tile")
    for split, count in (("train", 30), ("held_out", 10)):
        assert len(splits[split]) == count
        for index, sample in enumerate(splits[split]):
            drawn = puzzle(3, index, split, ("next", "tile")[index % 2])
            assert sample.images == [drawn.image] and answer(sample) == drawn.answer
            assert sample.record["question_type"] == drawn.question_type
            assert sample.record["messages"][0]["content"] == [
                {"type": "image"},
                {"type": "text", "text": drawn.question},
            ]
            assert sample.record["provenance"]["rule"] == drawn.rule


def test_just_the_share_asked_for_is_wrong_and_only_in_train(tmp_path: Path) -> None:
    clean, noisy = made(tmp_path / "a", *PUZZLES), made(tmp_path / "b", *PUZZLES, "--noise", 0.4)
    wrong = [answer(one) != answer(other) for one, other in zip(clean["train"], noisy["train"], strict=True)]
    assert sum(wrong) == 12
    assert [sample.record["provenance"]["noise"] for sample in noisy["train"]] == wrong
    assert noisy["held_out"] == clean["held_out"]


def test_an_unknown_kind_of_question_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(*PUZZLES, "--output", tmp_path, "--kinds", "next,riddle") == 2
    assert "no kind 'riddle'; expected some of next,tile" in capsys.readouterr().err


def test_deep_puzzles_are_those_that_were_drawn(tmp_path: Path) -> None:
    splits = made(tmp_path, *PUZZLES, "--level", "deep", "--kinds", "next,tile", "--noise", 0.4)
    for split, samples in splits.items():
        for index, sample in enumerate(samples):
            drawn = puzzle(3, index, split, ("next", "tile")[index % 2], "deep")
            assert sample.images == [drawn.image] and sample.record["provenance"]["rule"] == drawn.rule
            assert (answer(sample) != drawn.answer) == sample.record["provenance"]["noise"]
    assert sum(sample.record["provenance"]["noise"] for sample in splits["train"]) == 12


def test_an_unknown_level_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(*PUZZLES, "--output", tmp_path, "--level", "high") == 2
    assert "--level high: no such level; expected one of plain,deep" in capsys.readouterr().err


EASY = ("--source", "easy-vqa", "--seed", 1)


def test_easy_vqa_has_its_own_split_and_types(tmp_path: Path) -> None:
    easy_vqa = pytest.importorskip("easy_vqa")
    splits = made(tmp_path, *EASY, "--count", 200, "--held-out-count", 60, "--noise", 0.25)
    questions = {"train": easy_vqa.get_train_questions(), "held_out": easy_vqa.get_test_questions()}
    paths = {"train": easy_vqa.get_train_image_paths(), "held_out": easy_vqa.get_test_image_paths()}
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 200, "held_out": 60}
    wrong = 0
    for split, samples in splits.items():
        assert {sample.record["question_type"] for sample in samples} == set(ANSWERS)
        for sample in samples:
            number = int(sample.record["id"].rpartition("-")[2])
            question, right, image = (column[number] for column in questions[split])
            assert sample.images == [Path(paths[split][image]).read_bytes()]
            assert sample.record["messages"][0]["content"][1]["text"] == question
            assert sample.record["provenance"]["noise"] == (answer(sample) != right)
            assert answer(sample) in ANSWERS[sample.record["question_type"]]
            assert right in ANSWERS[sample.record["question_type"]]
            wrong += answer(sample) != right
            assert split == "train" or answer(sample) == right
    assert wrong == 50


def test_easy_vqa_is_complete() -> None:
    pytest.importorskip("easy_vqa")
    source = all_sources()["easy-vqa"]
    options = argparse.Namespace(count=None, held_out_count=None, noise=0.0, seed=0, types="yes-no,shape,color")
    files = [record.file for record in source.read(options)]
    assert files.count("train/questions.json") == 38_575 and files.count("test/questions.json") == 9_673


def test_easy_vqa_gives_the_types_that_were_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("easy_vqa")
    splits = made(tmp_path / "some", *EASY, "--count", 60, "--held-out-count", 30, "--types", "color,shape")
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 60, "held_out": 30}
    for samples in splits.values():
        assert {sample.record["question_type"] for sample in samples} == {"color", "shape"}
    assert shard(*EASY, "--output", tmp_path / "none", "--types", "color,size") == 2
    assert "no type 'size'; expected some of yes-no,shape,color" in capsys.readouterr().err


def test_another_seed_makes_another_choice_and_the_same_seed_the_same(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made(tmp_path / name, "--source", "easy-vqa", "--seed", seed, "--count", 20, "--held-out-count", 5)
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")
    keys = [set(ShardFolder(tmp_path / name / "train").keys) for name in "ac"]
    assert keys[0] != keys[1]
