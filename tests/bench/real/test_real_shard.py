"""The questions of the real pictures: parts are disjoint, wrong answers are planted, shuffled pictures never fit."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from bench.real import pictures, shard
from data_prep import __main__ as data_prep

CAPTIONS = [f"a thing of kind {number}" for number in range(120)]


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Path:
    """An index of small pictures, as pictures.main leaves it."""
    pytest.importorskip("easy_vqa")
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        group = ("objects", "symbols", "people")[number % 3]
        rows.append(pictures.Picture(f"{number}.png", caption, group, pictures.part_of(caption)))
    (folder / "pictures.jsonl").write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows))
    monkeypatch.setattr(pictures, "INDEX", folder / "pictures.jsonl")
    monkeypatch.setattr(shard, "PICTURES", folder)
    return tmp_path


def samples(folder: Path, split: str) -> list[dict]:
    """The JSON of each sample of a split."""
    found = []
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(file)) for file in tar.getmembers() if file.name.endswith(".json")]
    return found


def make(folder: Path, *arguments: str) -> Path:
    assert data_prep.main(["shard", "--source", "real", *arguments, "--output", str(folder)]) == 0
    return folder


def shown(sample: dict) -> str:
    return sample["provenance"]["images"][0]


def test_no_picture_stands_in_two_parts(drawn):
    sizes = ("--count", "60", "--held-out-count", "30")
    student, teacher = make(drawn / "student", *sizes), make(drawn / "teacher", *sizes, "--part", "teacher")
    kinds = {"shape", "color"}
    of = {
        name: {(one["question_type"] in kinds, split, shown(one)) for one in samples(folder, split)}
        for name, folder, split in (("s", student, "train"), ("t", teacher, "train"), ("h", student, "held_out"))
    }
    without_split = {name: {(easy, file) for easy, _, file in found if not easy} for name, found in of.items()}
    assert not without_split["s"] & without_split["t"]
    assert not without_split["h"] & (without_split["s"] | without_split["t"])
    assert not {file for easy, _, file in of["s"] if easy} & {file for easy, _, file in of["t"] if easy}
    assert samples(student, "held_out") == samples(teacher, "held_out")


def test_types_are_mixed_by_their_shares(drawn):
    found = Counter(one["question_type"] for one in samples(make(drawn / "data", "--count", "60"), "train"))
    assert found == {"shape": 10, "color": 10, "group": 20, "caption": 20}


def test_planted_answers_differ_from_the_right_ones(drawn):
    arguments = ("--count", "60", "--held-out-count", "30", "--seed", "3")
    clean = {one["id"]: one for one in samples(make(drawn / "clean", *arguments), "train")}
    noisy = {one["id"]: one for one in samples(make(drawn / "noisy", *arguments, "--noise", "0.4"), "train")}
    changed = {key for key, one in noisy.items() if one["messages"] != clean[key]["messages"]}
    assert clean.keys() == noisy.keys()
    assert changed == {key for key, one in noisy.items() if one["provenance"]["noise"]}
    assert len(changed) == 24
    assert all(shown(noisy[key]) == shown(clean[key]) for key in clean)


def test_shuffled_pictures_are_those_of_other_questions_of_the_type(drawn):
    arguments = ("--count", "0", "--held-out-count", "30")
    own = samples(make(drawn / "own", *arguments), "held_out")
    shuffled = samples(make(drawn / "shuffled", *arguments, "--pictures", "shuffled"), "held_out")
    assert [one["messages"] for one in own] == [one["messages"] for one in shuffled]
    for kind in shard.TYPES:
        before, after = ([shown(one) for one in data if one["question_type"] == kind] for data in (own, shuffled))
        assert sorted(before) == sorted(after)
        assert before != after
    captions = [(shown(a), shown(b)) for a, b in zip(own, shuffled, strict=True) if a["question_type"] == "caption"]
    assert all(ours != other for ours, other in captions)
