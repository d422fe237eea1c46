"""Records as people store them, read by both sources: nothing of a record is lost without a word."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from faulty_input import chat, command, mpirun, picture, shard

from data_prep.__main__ import main
from data_prep.layouts import read_sample
from data_prep.schema import BadSample
from data_prep.shards import RawSample, ShardFolder

IMAGE = {"type": "image"}
PICTURES = {name: picture(number) for number, name in enumerate(("a.png", "b.png", "c.png"))}
TURNS = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


MESSAGES = [
    {"role": "user", "content": [IMAGE, text("What?")]},
    {"role": "assistant", "content": [text("A cat.")]},
]
TEXT_ONLY = [{"role": "user", "content": [text("What?")]}, MESSAGES[1]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, content in PICTURES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def uri(name: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(PICTURES[name]).decode()}"


LAYOUTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[str]]] = {
    "llava": ({"image": "a.png", "conversations": chat("<image>\nWhat?")}, MESSAGES, ["a.png"]),
    "sharegpt4v": ({"id": "1", "image": "a.png", "conversations": chat("What?\n<image>")},
                   [{"role": "user", "content": [text("What?"), IMAGE]}, MESSAGES[1]], ["a.png"]),
    "llava-onevision": ({"id": "1", "image": {"bytes": PICTURES["a.png"], "path": "x.jpg"}, "data_source": "x",
                         "conversations": chat("<image>\nWhat?")}, MESSAGES, ["a.png"]),
    "cauldron": ({"images": ["a.png", "b.png"], "texts": [{"user": "What?", "assistant": "A cat.", "source": "x"},
                                                          {"user": "Sure?", "assistant": "Yes."}]},
                 [{"role": "user", "content": [IMAGE, IMAGE, text("What?")]}, MESSAGES[1],
                  {"role": "user", "content": [text("Sure?")]}, {"role": "assistant", "content": [text("Yes.")]}],
                 ["a.png", "b.png"]),
    "openai": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri("a.png")}},
                                                          text("What?")]}, TURNS[1]]}, MESSAGES, ["a.png"]),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "image", "image": "b.png"}, text("What?")]},
                            MESSAGES[1]]}, MESSAGES, ["b.png"]),
    "trl": ({"prompt": TURNS[:1], "completion": TURNS[1:], "images": ["a.png"]}, MESSAGES, ["a.png"]),
    "trl-text": ({"prompt": "What?", "completion": "A cat."}, TEXT_ONLY, []),
    "trl-first": ({"prompt": [{"role": "user", "content": "What?"}], "completion": TURNS[1:], "images": ["a.png"]},
                  MESSAGES, ["a.png"]),
    "ms-swift": ({"messages": TURNS, "images": ["a.png"]}, MESSAGES, ["a.png"]),
    "ms-swift-query": ({"query": "<image>What?", "response": "A cat.", "history": [], "images": ["a.png"]},
                       MESSAGES, ["a.png"]),
    "ms-swift-history": ({"query": "Sure?", "response": "Yes.", "history": [["What?", "A cat."]]},
                         [*TEXT_ONLY, {"role": "user", "content": [text("Sure?")]},
                          {"role": "assistant", "content": [text("Yes.")]}], []),
    "interleaved": ({"image": ["a.png", "b.png"], "conversations": chat("<image> or <image>?")},
                    [{"role": "user", "content": [IMAGE, text("or"), IMAGE, text("?")]}, MESSAGES[1]],
                    ["a.png", "b.png"]),
    "image-folder": ({"file_name": "c.png", "messages": TURNS}, MESSAGES, ["c.png"]),
    "null-image": ({"image": None, "images": ["b.png"], "conversations": None, "messages": TURNS}, MESSAGES, ["b.png"]),
    "no-image": ({"image": "", "conversations": chat("What?")}, TEXT_ONLY, []),
    "null-object": ({"image": {"bytes": None, "path": None}, "audio": {"bytes": None}, "videos": [None],
                     "conversations": chat("What?")}, TEXT_ONLY, []),
    "fields-of-nulls": ({"messages": [{**TURNS[0], "image": None, "tool_calls": [], "loss": False},
                                      {**TURNS[1], "weight": 1}],
                         "images": ["a.png"], "tools": None}, MESSAGES, ["a.png"]),
    "null-in-list": ({"images": [None], "conversations": chat("What?")}, TEXT_ONLY, []),
    "system": ({"system": "Be brief.", "conversations": chat("What?")},
               [{"role": "system", "content": [text("Be brief.")]}, *TEXT_ONLY], []),
    "system-prompt": ({"system": None, "system_prompt": "Be brief.", "messages": [{"role": "user", "content": "What?"},
                                                                                 TURNS[1]]},
                      [{"role": "system", "content": [text("Be brief.")]}, *TEXT_ONLY], []),
    "named-twice": ({"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                                                                  text("What?")]}, MESSAGES[1]]},
                    MESSAGES, ["a.png"]),
    "some-named": ({"images": ["a.png"], "messages": [
        {"role": "user", "content": [IMAGE, {"type": "image", "image": "c.png"}]}, MESSAGES[1]]},
        [{"role": "user", "content": [IMAGE, IMAGE]}, MESSAGES[1]], ["a.png", "c.png"]),
}  # fmt: skip
"""Layout -> a record, its messages, and its pictures in order."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_record_keeps_its_words_and_pictures(layout: str, images: Path) -> None:
    record, messages, names = LAYOUTS[layout]
    sample = read_sample(record, images)
    assert sample.messages == messages
    assert sample.images == [PICTURES[name] for name in names]


def stored(output: Path) -> list[RawSample]:
    folder = ShardFolder(output / "train")
    return [folder.read(index) for index in range(len(folder))]


@pytest.mark.parametrize("source", ["llava", "hf"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "llava-onevision"])
def test_both_sources_read_each_layout_without_a_mapping(layout: str, source: str, images: Path) -> None:
    record, messages, names = LAYOUTS[layout]
    (images / "in.jsonl").write_text(json.dumps(record))
    output = images / "out"
    assert shard("--source", source, "--input", images / "in.jsonl", "--held-out", 0, "--output", output) == 0
    (sample,) = stored(output)
    assert (sample.record["messages"], sample.images) == (messages, [PICTURES[name] for name in names])


@pytest.mark.parametrize("layout", ["llava-onevision", "cauldron", "trl", "parts"])
def test_parquet_of_the_hub_is_read_without_a_mapping(layout: str, images: Path) -> None:
    record, messages, names = LAYOUTS[layout]
    for field in ("image", "images"):
        if field in record:
            pictures = [{"bytes": PICTURES[name], "path": None} for name in names]
            record = {**record, field: pictures if field == "images" else pictures[0]}
    table = datasets.Dataset.from_list([record])
    for field, feature in (("image", datasets.Image()), ("images", datasets.List(datasets.Image()))):
        table = table.cast_column(field, feature) if field in record else table
    table.to_parquet(images / "in.parquet")
    arguments = ("--source", "hf", "--input", images / "in.parquet", "--held-out", 0)
    assert shard(*arguments, "--output", images / "out") == 0
    (sample,) = stored(images / "out")
    assert (sample.record["messages"], sample.images) == (messages, [PICTURES[name] for name in names])


def with_part(part: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part, text("What?")]}, MESSAGES[1]], **fields}


ODD: list[tuple[dict[str, Any], str]] = [
    ({"video": "a.mp4", "conversations": chat("<video>\nWhat?")}, "video_or_audio"),
    ({"audio": {"bytes": b"wav"}, "conversations": chat("What?")}, "video_or_audio"),
    ({"videos": ["a.mp4"], "messages": TURNS}, "video_or_audio"),
    (with_part({"type": "video", "video": "a.mp4"}), "video_or_audio"),
    (with_part({"type": "image", "image": "a.png"}, images=["b.png"]), "conflicting_image"),
    (with_part({"type": "image", "image": "a.png"}, images=["a.png", "b.png"]), "conflicting_image"),
    (with_part({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}), "missing_image: .*network"),
    (with_part({"type": "image_url", "image_url": {"url": "data:image/png,AAAA"}}), "broken_image"),
    (with_part({"type": "image", "base64": "no base64"}), "broken_image"),
    (with_part({"type": "image", "image": "../secret.png"}), "image_path_escapes"),
    (with_part({"type": "image", "image": 7}), "wrong_type: an image is a int"),
    ({"system": "Be brief.", "conversations": [{"from": "system", "value": "No."}]}, "conflicting_system"),
    ({"system": ["Be brief."], "conversations": chat("What?")}, "wrong_type: the system prompt is a list"),
    ({"tools": [{"name": "add"}], "messages": TURNS}, "unused_field: .*'tools'"),
    ({"messages": [{**TURNS[0], "image": "a.png"}, TURNS[1]]}, "unused_field: turn 0 has 'image'"),
    ({"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "Hm."}]}, "unused_field: .*'reasoning_content'"),
    ({"messages": [TURNS[0], {**TURNS[1], "loss": False}]}, "unused_field: turn 1 has loss False"),
    ({"conversations": [{**chat("What?")[0], "video": "a.mp4"}]}, "video_or_audio"),
    ({"texts": "What?", "images": ["a.png"]}, "wrong_type: texts is a str"),
    ({"prompt": "What?", "completion": 3}, "wrong_type: .*completion a int"),
    ({"query": "What?", "response": "A cat.", "history": ["What?"]}, "wrong_type: history"),
    ({"conversations": None, "messages": None}, "wrong_type: the chat is missing"),
]
"""Records that cannot be used, and what is said of them."""


@pytest.mark.parametrize("record, reason", ODD)
def test_what_cannot_be_used_says_why(record: dict[str, Any], reason: str, images: Path) -> None:
    with pytest.raises(BadSample, match=reason):
        read_sample(record, images)


RECORDS = [{"id": str(number), "conversations": chat(f"What is {number}? Übung 🙂")} for number in range(3)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)

FILES: dict[str, bytes] = {
    "list": json.dumps(RECORDS).encode(),
    "lines": LINES.encode(),
    "wrapped": json.dumps({"data": RECORDS}).encode(),
    "wrapped-pretty": json.dumps({"version": 1, "data": RECORDS}, indent=2).encode(),
    "wrapped-annotations": json.dumps({"info": {"a": [1]}, "annotations": RECORDS}, indent=1).encode(),
    "one-by-one": "\n".join(json.dumps(record, indent=4) for record in RECORDS).encode(),
    "utf-8-sig": LINES.encode("utf-8-sig"),
    **{f"lines-{name}": LINES.encode(name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")},
    **{f"list-{name}": json.dumps(RECORDS, ensure_ascii=False).encode(name) for name in ("utf-16", "utf-16-be")},
    "pretty-utf-16": json.dumps({"data": RECORDS}, indent=2).encode("utf-16"),
    "gzip-lines": gzip.compress(LINES.encode(), mtime=0),
    "gzip-list": gzip.compress(json.dumps(RECORDS).encode(), mtime=0),
    "gzip-utf-16": gzip.compress(LINES.encode("utf-16"), mtime=0),
    "carriage-returns": LINES.replace("\n", "\r\n").encode(),
}
"""Ways to store three records."""


@pytest.mark.parametrize("source", ["llava", "hf"])
@pytest.mark.parametrize("form", FILES)
def test_a_file_is_read_however_it_is_stored(form: str, source: str, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_bytes(FILES[form])
    arguments = ("--source", source, "--input", tmp_path / "in.json", "--held-out", 0)
    assert shard(*arguments, "--output", tmp_path / "out") == 0
    samples = stored(tmp_path / "out")
    assert [sample.record["id"] for sample in samples] == ["0", "1", "2"]
    assert samples[2].record["messages"][0]["content"] == [text("What is 2? Übung 🙂")]


def test_one_object_over_several_lines_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(RECORDS[0], indent=2))
    assert shard("--source", "llava", "--input", tmp_path / "in.json", "--held-out", 0, "--output", tmp_path / "o") == 0
    assert len(stored(tmp_path / "o")) == 1


@pytest.mark.parametrize("source", ["llava", "hf"])
def test_an_image_folder_is_read_by_its_metadata(source: str, images: Path) -> None:
    lines = [json.dumps({"file_name": name, "messages": TURNS}) for name in PICTURES]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    assert shard("--source", source, "--input", images, "--held-out", 0, "--output", images / "out") == 0
    assert [sample.images for sample in stored(images / "out")] == [[content] for content in PICTURES.values()]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PAR1....", "is a parquet file: read it with --source hf"),
        (b"PK\x03\x04....", "is a zip archive: unpack it"),
        (b"\x28\xb5\x2f\xfd....", "compressed with zstd: unpack it, or gzip it"),
        (gzip.compress(LINES.encode(), mtime=0)[:-10], "is damaged: "),
        (gzip.compress(LINES.encode(), mtime=0)[:20] + b"\0" * 20, "is damaged: "),
        (LINES.encode("utf-16")[:-1], "is damaged: "),
    ],
    ids=("parquet", "zip", "zstd", "cut-gzip", "broken-gzip", "cut-utf-16"),
)
def test_a_file_of_another_kind_is_named(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.json").write_bytes(content)
    assert shard("--source", "llava", "--input", tmp_path / "in.json", "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_set_with_odd_records_goes_through_with_each_of_them_named(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [(record, reason.partition(":")[0]) for record, reason in ODD if "audio" not in record]
    good = [{"id": n, **LAYOUTS["llava"][0]} for n in range(9 * len(odd))]
    records = [part for n, (record, _) in enumerate(odd) for part in (*good[9 * n : 9 * n + 9], record)]
    (images / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ("--source", "llava", "--input", images / "in.jsonl", "--max-rejects", 0.11, "--samples-per-shard", 50)
    run = mpirun(2, command("shard", *arguments, "--output", images / "out"))
    assert run.returncode == 0, run.stderr
    rejects = [json.loads(line) for line in (images / "out/rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (10 * n + 10, reason) for n, (_, reason) in enumerate(odd)
    ]
    assert main(["lint", str(images / "out")]) == 0
    assert sum(len(ShardFolder(images / "out" / split)) for split in ("train", "held_out")) == len(good)
