from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import json_records
from data_prep.schema import BadSample, DataError
from data_prep.sources import LazyRecord, Sample, all_sources


def records(path: Path, images: Path | None = None) -> list[LazyRecord]:
    return list(all_sources()["llava"].read(argparse.Namespace(input=path, images=images)))


def samples(path: Path) -> list[Sample]:
    return [record.load() for record in records(path)]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


RECORDS: list[Any] = [
    {
        "id": str(number),
        "conversations": [{"from": "human", "value": "Übung " * number}, {"from": "gpt", "value": "Ja."}],
    }
    for number in range(1, 30)
]


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_reads_as_the_same_records_in_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_records, "BLOCK", block)
    lines = written(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in RECORDS))
    whole = written(tmp_path / "a.json", json.dumps(RECORDS, indent=indent, ensure_ascii=False))
    assert samples(lines) == samples(whole) and len(samples(whole)) == len(RECORDS)


def test_places_are_told(tmp_path: Path) -> None:
    lines = records(written(tmp_path / "a.jsonl", "\n".join(["", json.dumps(RECORDS[0]), "", json.dumps(RECORDS[1])])))
    assert [(record.file, record.line) for record in lines] == [("a.jsonl", 2), ("a.jsonl", 4)]
    whole = records(written(tmp_path / "a.json", json.dumps(RECORDS)))
    assert {(record.file, record.line, record.progress) for record in whole} == {("a.json", None, 1.0)}


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    line = json.dumps(RECORDS[0])
    assert samples(written(tmp_path / "a.jsonl", "\ufeff" + line)) == samples(
        written(tmp_path / "a.json", f"\ufeff[{line}]")
    )


def test_an_empty_list_has_no_records(tmp_path: Path) -> None:
    assert samples(written(tmp_path / "a.json", " [ ] ")) == []


@pytest.mark.parametrize(
    "end, message",
    [
        ("", "after 2 good records: Incomplete JSON content"),
        (", {", "after 2 good records"),
        (" {}]", "after 2 good records: Unexpected symbol '{' at"),
        (", [[", "after 2 good records"),
        ("] x", "after 2 good records: Unexpected symbol 'x' at"),
        ("] [3]", "after 2 good records: another list follows the first"),
        (', {"score": NaN}]', "after 2 good records: Unexpected symbol 'N' at"),
    ],
)
def test_a_broken_list_says_how_far_it_is_whole(tmp_path: Path, end: str, message: str) -> None:
    path = written(tmp_path / "a.json", "[" + ", ".join(map(json.dumps, RECORDS[:2])) + end)
    with pytest.raises(DataError, match=rf"a.json is not whole JSON: .*{message}.*one record a line"):
        records(path)


def test_bytes_that_are_not_utf8_cost_only_their_record(tmp_path: Path) -> None:
    bad = json.dumps({**RECORDS[1], "id": "X"}).encode().replace(b"X", b"\xff")
    path = written(tmp_path / "a.json", b"[" + json.dumps(RECORDS[0]).encode() + b"," + bad + b"]")
    first, second = records(path)
    assert first.load().id == "1"
    assert second.load().id == "\udcff"  # which no UTF-8 file can hold: check_record rejects it as bad_utf8


@pytest.mark.parametrize(
    "value",
    [
        "1.0",
        "-0.5e3",
        "12345678901234567890123456789012345678901234567890",
        r'"\ud800"',
        r'"\ud83d\ude00"',
        '"é"',
        "1e-9",
    ],
)
def test_a_value_in_a_list_is_what_json_makes_of_it(tmp_path: Path, value: str) -> None:
    record = f'{{"id": "first", "id": "last", "value": {value}}}'
    (found,) = json_records.json_records(written(tmp_path / "a.json", f"[{record}]"))
    assert repr(found.value) == repr(json.loads(record))  # types too: floats are floats, not decimals


def test_a_record_that_is_nested_without_end_costs_only_itself(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    path = written(tmp_path / "a.json", f"[{json.dumps(RECORDS[0])}, {deep}, {json.dumps(RECORDS[1])}]")
    first, second, third = records(path)
    assert [first.load().id, third.load().id] == ["1", "2"]
    with pytest.raises(BadSample, match="bad_json: 100000 lists and objects inside one another; at most 100 are read"):
        second.load()


def test_images_are_bytes_as_they_came(chats: Callable[..., list[str]], tmp_path: Path) -> None:
    chats(2)
    one, two = [record.load() for record in records(tmp_path / "chat.jsonl", tmp_path / "images")]
    assert one.images == [(tmp_path / "images/0.png").read_bytes()]
    assert two.images == [(tmp_path / "images" / name).read_bytes() for name in ("1.png", "sub/1.jpg")]
    assert two.provenance == {"images": ["1.png", "sub/1.jpg"]}


def test_a_reject_carries_its_id(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps({**RECORDS[0], "image": "none.png"}))
    with pytest.raises(BadSample) as caught:
        samples(path)
    assert caught.value.id == "1"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--input .*none.json: no such file; expected LLaVA JSON"):
        records(tmp_path / "none.json")
    with pytest.raises(DataError, match="--images .*none: no such folder"):
        records(written(tmp_path / "a.json", "[]"), tmp_path / "none")
