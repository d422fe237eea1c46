from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from faulty_input import picture, shard

from data_prep.shards import RawSample, ShardFolder

PICTURES = [picture(number, "JPEG" if number % 2 else "PNG") for number in range(6)]


def rows(**columns: Callable[[int], Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{name: make(n) for name, make in columns.items()} for n in range(6)])


def messages(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {number}?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": f"Thing {number}."}]},
    ]


def with_bytes(number: int) -> dict[str, Any]:
    return {"bytes": PICTURES[number], "path": None}


def embedded() -> datasets.Dataset:
    return rows(messages=messages, image=with_bytes).cast_column("image", datasets.Image())


def read_back(tmp_path: Path, *arguments: Any) -> list[RawSample]:
    output = tmp_path / "out"
    assert shard("--source", "hf", "--output", output, "--held-out", 0, *arguments) == 0
    folder = ShardFolder(output / "train")
    return [folder.read(index) for index in range(len(folder))]


def check(samples: list[RawSample]) -> None:
    assert [sample.images for sample in samples] == [[content] for content in PICTURES]
    assert [sample.record["messages"] for sample in samples] == [messages(number) for number in range(6)]
    assert [sample.key for sample in samples] == [f"{number:08d}" for number in range(6)]


def test_parquet_images_come_byte_for_byte(tmp_path: Path) -> None:
    embedded().to_parquet(tmp_path / "a.parquet")
    check(read_back(tmp_path, "--input", tmp_path / "a.parquet"))


def test_a_folder_of_files_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        embedded().select(range(2 * number, 2 * number + 2)).to_parquet(tmp_path / f"in/{number}.parquet")
    check(read_back(tmp_path, "--input", tmp_path / "in"))


def test_arrow_folders_of_save_to_disk_are_read(tmp_path: Path) -> None:
    embedded().save_to_disk(tmp_path / "in")
    check(read_back(tmp_path, "--input", tmp_path / "in"))


def test_jsonl_with_paths_reads_the_files(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    lines = []
    for number, content in enumerate(PICTURES):
        (tmp_path / f"pictures/{number}").write_bytes(content)
        lines.append(json.dumps({"messages": messages(number), "images": [str(number)]}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    check(read_back(tmp_path, "--input", tmp_path / "a.jsonl", "--images", tmp_path / "pictures"))


def test_lists_of_images_come_byte_for_byte(tmp_path: Path) -> None:
    features = datasets.Features({**embedded().features, "images": datasets.List(datasets.Image())})
    del features["image"]
    rows(messages=messages, images=lambda n: [with_bytes(n)]).cast(features).to_parquet(tmp_path / "a.parquet")
    check(read_back(tmp_path, "--input", tmp_path / "a.parquet"))


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    turns = {
        "chat": lambda n: [
            {"from": "human", "value": f"<image>\nWhat is {n}?"},
            {"from": "gpt", "value": f"Thing {n}."},
        ],
        "pictures": lambda n: [with_bytes(n)],
        "uid": lambda n: 100 + n,
        "kind": lambda n: "what",
    }
    rows(**turns).to_parquet(tmp_path / "a.parquet")
    mapping = "messages=chat,images=pictures,id=uid,question_type=kind"
    samples = read_back(tmp_path, "--input", tmp_path / "a.parquet", "--columns", mapping)
    assert [sample.record["messages"] for sample in samples] == [messages(number) for number in range(6)]
    assert [sample.key for sample in samples] == [str(100 + number) for number in range(6)]
    assert {sample.record["question_type"] for sample in samples} == {"what"}


def test_text_only_data_need_no_images(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rows(conversations=lambda n: chat).to_parquet(tmp_path / "a.parquet")
    assert [sample.images for sample in read_back(tmp_path, "--input", tmp_path / "a.parquet")] == [[]] * 6


def test_a_bad_line_costs_that_line_only(tmp_path: Path) -> None:
    good = {"messages": messages(0)}
    lines = [json.dumps(good), "{", json.dumps({"messages": 3}), json.dumps({**good, "extra": {"a": [1, "b"]}})]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/0").write_bytes(PICTURES[0])
    records = [json.dumps({**json.loads(line), "image": "0"}) if line != "{" else line for line in lines]
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    arguments = ("--input", tmp_path / "a.jsonl", "--images", tmp_path / "pictures", "--max-rejects", 0.5)
    assert [sample.images for sample in read_back(tmp_path, *arguments)] == [[PICTURES[0]]] * 2
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [(2, "bad_json"), (3, "wrong_type")]


def test_pictures_inside_the_messages_come_byte_for_byte(tmp_path: Path) -> None:
    def with_picture(number: int) -> list[dict[str, Any]]:
        parts = [{"type": "image", "text": None, "image": with_bytes(number)},
                 {"type": "text", "text": f"What is {number}?", "image": None}]  # fmt: skip
        answer = [{"type": "text", "text": f"Thing {number}.", "image": None}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]

    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({"messages": datasets.List(turn)})
    rows(messages=with_picture).cast(features).to_parquet(tmp_path / "a.parquet")
    check(read_back(tmp_path, "--input", tmp_path / "a.parquet"))


def test_a_sound_is_rejected_and_not_decoded(tmp_path: Path) -> None:
    sound = {"bytes": b"no sound", "path": None}
    table = rows(messages=messages, image=with_bytes, audio=lambda n: sound if n == 2 else None)
    features = datasets.Features({**table.features, "audio": datasets.Audio(decode=False)})
    table.cast(features).to_parquet(tmp_path / "a.parquet")
    samples = read_back(tmp_path, "--input", tmp_path / "a.parquet", "--max-rejects", 0.5)
    assert len(samples) == 5
    (reject,) = (json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines())
    assert (reject["index"], reject["reason"]) == (2, "video_or_audio")


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: Any) -> str:
    assert shard("--source", "hf", "--output", tmp_path / "out", *arguments) == 2
    return capsys.readouterr().err


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(text=str).to_parquet(tmp_path / "a.parquet")
    said = refused(capsys, tmp_path, "--input", tmp_path / "a.parquet")
    assert "no column 'messages or conversations' among text; say where they are: --columns" in said
    said = refused(capsys, tmp_path, "--input", tmp_path / "a.parquet", "--columns", "messages=text,images=photo")
    assert "no column 'photo' among text" in said
    assert "no such file or folder" in refused(capsys, tmp_path, "--input", tmp_path / "none.parquet")
    (tmp_path / "a.csv").touch()
    assert "expected a file that ends in .parquet" in refused(capsys, tmp_path, "--input", tmp_path / "a.csv")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    said = refused(capsys, tmp_path, "--input", tmp_path / "b.parquet")
    assert "datasets cannot read record 0" in said and "Traceback" not in said
    with pytest.raises(SystemExit):
        shard("--source", "hf", "--output", tmp_path / "out", "--input", "a", "--columns", "chat=messages")
    assert "'chat'; expected FIELD=COLUMN pairs, the fields being some of messages, images" in capsys.readouterr().err


def test_a_name_that_is_no_path_goes_to_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    said = refused(capsys, tmp_path, "--input", "nobody/nothing")
    assert "--input nobody/nothing: datasets cannot read record 0" in said
