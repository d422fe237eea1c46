from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.schema import BadSample, DataError
from data_prep.sources import Draft, Sample, all_sources, llava


def drafts(path: Path, images: Path | None = None) -> list[Draft]:
    return list(all_sources()["llava"].read(argparse.Namespace(input=path, images=images)))


def samples(path: Path) -> list[Sample]:
    return [draft.make() for draft in drafts(path)]


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


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_reads_as_the_same_records_in_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr(llava, "CHUNK", chunk)
    lines = written(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in RECORDS))
    whole = written(tmp_path / "a.json", json.dumps(RECORDS, indent=indent, ensure_ascii=False))
    assert samples(lines) == samples(whole) and len(samples(whole)) == len(RECORDS)


def test_places_are_told(tmp_path: Path) -> None:
    lines = drafts(written(tmp_path / "a.jsonl", "\n".join(["", json.dumps(RECORDS[0]), "", json.dumps(RECORDS[1])])))
    assert [(draft.file, draft.line) for draft in lines] == [("a.jsonl", 2), ("a.jsonl", 4)]
    whole = drafts(written(tmp_path / "a.json", json.dumps(RECORDS)))
    assert {(draft.file, draft.line, draft.done) for draft in whole} == {("a.json", None, 1.0)}


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
        ("", r"after 2 good records: expected ',', found 'the end of the file'"),
        (", {", "after 2 good records"),
        (" {}]", "expected ',', found '{'"),
        (", [[", "after 2 good records"),
    ],
)
def test_a_broken_list_says_how_far_it_is_whole(tmp_path: Path, end: str, message: str) -> None:
    path = written(tmp_path / "a.json", "[" + ", ".join(map(json.dumps, RECORDS[:2])) + end)
    with pytest.raises(DataError, match=rf"a.json is not whole JSON: .*{message}.*one record a line"):
        drafts(path)


def test_bytes_that_are_not_utf8_cost_only_their_record(tmp_path: Path) -> None:
    bad = json.dumps({**RECORDS[1], "id": "X"}).encode().replace(b"X", b"\xff")
    path = written(tmp_path / "a.json", b"[" + json.dumps(RECORDS[0]).encode() + b"," + bad + b"]")
    first, second = drafts(path)
    assert first.make().id == "1"
    assert second.make().id == "\udcff"  # which no UTF-8 file can hold: examine rejects it as bad_utf8


def test_images_are_bytes_as_they_came(chats: Callable[..., list[str]], tmp_path: Path) -> None:
    chats(2)
    one, two = [draft.make() for draft in drafts(tmp_path / "chat.jsonl", tmp_path / "images")]
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
        drafts(tmp_path / "none.json")
    with pytest.raises(DataError, match="--images .*none: no such folder"):
        drafts(written(tmp_path / "a.json", "[]"), tmp_path / "none")
