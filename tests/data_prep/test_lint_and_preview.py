from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from faulty_input import content_of, picture, shard

from data_prep.__main__ import main
from data_prep.shards import ShardFolder, write_manifest, write_shard

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def output(tmp_path: Path, chats: Callable[..., list[str]]) -> Path:
    assert shard(*chats(24), "--samples-per-shard", 6, "--held-out", 0.3, "--output", tmp_path / "out") == 0
    return tmp_path / "out"


def test_good_shards_pass_whole_and_by_folder(output: Path, capsys: Capture) -> None:
    assert main(["lint", str(output)]) == 0
    assert "all good" in capsys.readouterr().out
    assert main(["lint", str(output / "held_out")]) == 0
    samples = len(ShardFolder(output / "held_out"))
    assert f"held_out: {samples // 6 + 1} shards, {samples} samples" in capsys.readouterr().out


def problems(folder: Path, capsys: Capture) -> list[list[str]]:
    assert main(["lint", str(folder)]) == 1
    *lines, totals, last = capsys.readouterr().out.splitlines()
    lines = [line for line in [*lines, totals] if "\t" in line]
    assert last == f"{len(lines)} problems"
    return [line.split("\t") for line in lines]


def test_a_changed_byte_is_found(output: Path, capsys: Capture) -> None:
    train = ShardFolder(output / "train")
    path = output / "train" / train.shards[1].name
    content = path.read_bytes()
    place = content.index(b"IDAT") + 10
    path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
    key = max(train.keys[6:12], key=lambda key: (content.index(f"{key}.json".encode()) < place, train.keys.index(key)))
    found = problems(output, capsys)
    assert found[0][:2] == ["train/000001.tar", "-"] and "sha256 differ" in found[0][2]
    assert found[1][:2] == ["train/000001.tar", "-"] and "sums differ" in found[1][2]
    assert found[2][:2] == ["train/000001.tar", key] and "its bytes do not match their checksum" in found[2][2]


def test_shards_that_are_cut_gone_or_strange_are_found(output: Path, capsys: Capture) -> None:
    train = ShardFolder(output / "train")
    first, second = (output / "train" / info.name for info in train.shards[:2])
    first.unlink()
    second.write_bytes(second.read_bytes()[:512])
    (output / "train/999999.tar").touch()
    found = problems(output, capsys)
    assert ["train/999999.tar", "-", "is not in the manifest"] in found
    assert {key for _, key, _ in found} >= set(train.keys[:12])  # every sample of the two
    of_shards = {shard_name: what for shard_name, key, what in found if key == "-"}
    assert "is not a whole tar file: " in of_shards["train/000000.tar"]
    assert "No such file" in of_shards["train/000000.tar"]
    assert "is cut off" in of_shards["train/000001.tar"] or "is not a whole tar" in of_shards["train/000001.tar"]


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda m: m.update(split="test"), "split is 'test', expected 'train'"),
        (lambda m: m.update(samples=3), "samples is 3, expected "),
        (lambda m: m.update(bytes=3), "bytes is 3, expected "),
        (lambda m: m["provenance"].update(read=7), "the provenance of the splits differs"),
        (lambda m: m["provenance"].update(read="7"), "read and rejected must be numbers"),
    ],
)
def test_a_manifest_s_own_facts_are_checked(output: Path, capsys: Capture, change: Callable, what: str) -> None:
    """Of a manifest without checksum; with one, no byte can differ."""
    path = output / "train/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert any(what in found for _, _, found in problems(output, capsys))


def test_all_records_of_the_source_are_accounted_for(output: Path, capsys: Capture) -> None:
    for split in ("train", "held_out"):
        path = output / split / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["checksum"]
        manifest["provenance"]["read"] += 1
        path.write_text(json.dumps(manifest))
    assert [what for _, _, what in problems(output, capsys)] == [
        "read 25, written 24, rejected 0: read = written + rejected"
    ]


def test_bad_records_are_found_by_key(tmp_path: Path, capsys: Capture) -> None:
    def members(**changes: object) -> dict[str, bytes]:
        record = {
            "id": "good",
            "messages": [
                {"role": "user", "content": [{"type": "image"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            ],
            "provenance": {},
            **changes,
        }
        return {"json": json.dumps(record).encode(), "0.png": picture(0)}

    samples = [
        ("good", members()),
        ("misnamed", members()),
        ("mute", members(id="mute", messages=[{"role": "user", "content": [{"type": "image"}]}])),
        ("jpeg", {**members(id="jpeg"), "0.png": picture(0, "JPEG")}),
        ("cut", {**members(id="cut"), "0.png": picture(0)[:100]}),
        ("nojson", {"0.png": picture(0)}),
        ("imageless", {"json": members(id="imageless")["json"]}),
    ]
    entries = [write_shard(tmp_path / "000000.tar", samples), write_shard(tmp_path / "000001.tar", samples[:1])]
    write_manifest(tmp_path, entries, format="vlsi-shards", version=1)
    found = {key: what for _, key, what in problems(tmp_path, capsys)}
    assert found.keys() == {"good", *(key for key, _ in samples[1:])}
    assert "this key is also in" in found["good"]
    assert "its id is 'good'" in found["misnamed"]
    assert "no_assistant_turn" in found["mute"]
    assert "members json, 0.png; expected json, 0.jpg" in found["jpeg"]
    assert "broken_image" in found["cut"]
    assert "not a json and numbered images" in found["nojson"]
    assert "more_placeholders_than_images" in found["imageless"]


def test_a_folder_that_holds_no_shards_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    for name in ("lint", "preview"):
        assert main([name, str(tmp_path)]) == 2
        assert "expected a shard folder" in capsys.readouterr().err


class Sheet(HTMLParser):
    """Collects tags, and sources of images."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")


def test_the_sheet_needs_no_other_file(output: Path, capsys: Capture) -> None:
    before = content_of(output)
    assert main(["preview", str(output), "--count", "5"]) == 0
    path = output / "preview.html"
    assert f"10 samples: {path}" in capsys.readouterr().out
    sheet = Sheet(path.read_text())
    assert sheet.tags.count("article") == 10
    assert not {"script", "link", "iframe"} & set(sheet.tags)
    known = {image for split in ("train", "held_out") for n in range(len(ShardFolder(output / split)))
             for image in ShardFolder(output / split).read(n).images}  # fmt: skip
    assert sheet.images
    for uri in sheet.images:
        assert re.match(r"data:image/(png|jpeg);base64,", uri)
        assert base64.b64decode(uri.partition(",")[2]) in known  # small images as they are
    assert {name: content for name, content in content_of(output).items() if name != "preview.html"} == before


def test_text_in_the_sheet_is_text_and_large_images_are_made_small(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/large.png").write_bytes(picture(0, size=(900, 30)))
    (tmp_path / "images/odd.tiff").write_bytes(picture(1, "TIFF"))
    evil = "<script>alert(1)</script><image>&amp;<image>"
    turns = [{"from": "human", "value": evil}, {"from": "gpt", "value": "<b>"}]
    record = {"id": "<img>", "image": ["large.png", "odd.tiff"], "conversations": turns}
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    arguments = ("--source", "llava", "--input", tmp_path / "chat.jsonl", "--images", tmp_path / "images")
    assert shard(*arguments, "--held-out", 0, "--output", tmp_path / "out") == 0
    assert main(["preview", str(tmp_path / "out"), "--output", str(tmp_path / "sheet.html")]) == 0
    page = (tmp_path / "sheet.html").read_text()
    sheet = Sheet(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&amp;amp;" in page and "script" not in sheet.tags
    assert len(sheet.images) == 2 and all(uri.startswith("data:image/png") for uri in sheet.images)


def test_a_sheet_of_bad_shards_says_to_lint(tmp_path: Path, capsys: Capture) -> None:
    entry = write_shard(tmp_path / "000000.tar", [("a", {"json": b"{}"})])
    write_manifest(tmp_path, [entry], format="vlsi-shards", version=1)
    assert main(["preview", str(tmp_path)]) == 2
    assert "wrong_type" in (said := capsys.readouterr().err) and "python -m data_prep lint" in said
