"""What `shard` and `lint` say of repeated ids and of pictures that lose something when decoded."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from faulty_input import chat, command, content_of, mpirun, picture, shard
from test_images import deep_grey, float_grey, transparent

from data_prep.__main__ import main
from data_prep.images import decode_image
from data_prep.shards import RawSample, ShardFolder

Capture = pytest.CaptureFixture[str]


def written(folder: Path, records: list[dict[str, Any]]) -> list[Any]:
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["--source", "llava", "--input", folder / "in.jsonl", "--held-out", 0]


def stored(output: Path) -> list[RawSample]:
    folder = ShardFolder(output / "train")
    return [folder.read(index) for index in range(len(folder))]


def repeated(folder: Path) -> list[Any]:
    ids = ["a", "b", "a", "a", "a-2", 1]
    return written(folder, [{"id": id, "conversations": chat(f"What is {n}?")} for n, id in enumerate(ids)])


def test_repeated_ids_are_numbered_and_counted(tmp_path: Path, capsys: Capture) -> None:
    arguments = repeated(tmp_path)
    assert shard(*arguments, "--output", tmp_path / "out") == 0
    assert "note: 2 records had the id of an earlier one and were numbered" in capsys.readouterr().out
    samples = stored(tmp_path / "out")
    assert [sample.record["id"] for sample in samples] == ["a", "b", "a-3", "a-4", "a-2", "1"]  # a-2 is another's own
    assert [sample.record["provenance"].get("repeated_id") for sample in samples] == [None, None, "a", "a", None, None]
    assert [sample.record["provenance"]["index"] for sample in samples] == list(range(6))
    assert main(["lint", str(tmp_path / "out")]) == 0
    run = mpirun(2, command("shard", *arguments, "--output", tmp_path / "ranks"))
    assert run.returncode == 0, run.stderr
    assert content_of(tmp_path / "ranks") == content_of(tmp_path / "out")


def test_repeated_ids_are_rejected_where_asked(tmp_path: Path) -> None:
    output = ("--output", tmp_path / "out", "--max-rejects", 0.5)
    assert shard(*repeated(tmp_path), "--repeated-ids", "reject", *output) == 0
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(reject["reason"], reject["index"]) for reject in rejects] == [("duplicate_id", 2), ("duplicate_id", 3)]


PICTURES = {"deep.png": deep_grey(), "float.tiff": float_grey(), "clear.png": transparent(), "plain.png": picture(1)}


def odd_pictures(folder: Path) -> list[Any]:
    for name, content in PICTURES.items():
        (folder / name).write_bytes(content)
    return written(folder, [{"image": name, "conversations": chat("<image>")} for name in PICTURES])


def test_what_pictures_lose_is_counted_by_shard_and_lint(tmp_path: Path, capsys: Capture) -> None:
    assert shard(*odd_pictures(tmp_path), "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    for name in ("deep_grey", "float_grey", "transparent"):
        assert f"note: 1 images are {name} (" in said and "shard --convert writes what is seen" in said
    assert [sample.images for sample in stored(tmp_path / "out")] == [[content] for content in PICTURES.values()]
    assert main(["lint", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for name in ("deep_grey", "float_grey", "transparent"):
        assert f"note: 1 images are {name} (" in said


def test_convert_writes_what_is_seen(tmp_path: Path, capsys: Capture) -> None:
    assert shard(*odd_pictures(tmp_path), "--convert", "black", "--output", tmp_path / "out") == 0
    assert "note: 1 images were transparent and are written as they look on black" in capsys.readouterr().out
    deep, floats, clear, plain = (sample.images[0] for sample in stored(tmp_path / "out"))
    assert [list(decode_image(image).convert("L").tobytes()) for image in (deep, floats, clear)] == [
        [0, 100, 255],
        [0, 128, 255],
        [0, 0, 0],
    ]
    assert plain == PICTURES["plain.png"]
    assert main(["lint", str(tmp_path / "out")]) == 0
    assert "note:" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        shard(*odd_pictures(tmp_path), "--convert", "no-colour", "--output", tmp_path / "out")
    assert "'no-colour'; expected a colour" in capsys.readouterr().err


def test_the_split_is_the_same_with_and_without_converting(tmp_path: Path) -> None:
    for number in range(40):
        image = io.BytesIO()
        deep = decode_image(picture(number)).convert("RGBA")
        deep.putalpha(number)
        deep.save(image, "PNG")
        (tmp_path / f"{number}.png").write_bytes(image.getvalue())
    records = [{"id": n, "image": f"{n}.png", "conversations": chat("<image>")} for n in range(40)]
    arguments = [*written(tmp_path, records), "--held-out", 0.3]
    assert shard(*arguments, "--output", tmp_path / "a") == shard(*arguments, "--convert", "--output", tmp_path / "b")
    assert ShardFolder(tmp_path / "a/train").keys == ShardFolder(tmp_path / "b/train").keys
