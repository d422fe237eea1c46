"""Whatever a source holds: read = written + rejected, each reject says why, and nothing else ends a run."""

from __future__ import annotations

import copy
import io
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_input import bomb, chat, picture, shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_images import deep_grey, float_grey, sideways, transparent

from data_prep.images import check_image, decode_image, image_bytes
from data_prep.layouts import read_sample
from data_prep.lint import lint, shard_folders
from data_prep.records import Accepted, Location, check_record
from data_prep.schema import REASONS, BadSample
from data_prep.sources import LazyRecord

PICTURES = {
    "plain.png": picture(0),
    "plain.jpg": picture(1, "JPEG"),
    "sideways.jpg": sideways(),
    "deep.png": deep_grey(),
    "float.tiff": float_grey(),
    "clear.png": transparent(),
    "cut.png": picture(2, size=(64, 64))[:-300],
    "bomb.png": bomb(),
    "empty.png": b"",
    "words.png": b"not a picture",
    "narrow.png": picture(3, size=(1, 500)),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, content in PICTURES.items():
        (folder / name).write_bytes(content)
    return folder


def run(records: list[bytes], images: Path, output: Path, *options: Any) -> tuple[int, int]:
    """Shard lines of JSON; returns how many samples were written and how many records rejected."""
    (output / "in.jsonl").write_bytes(b"\n".join(records))
    arguments = ("--source", "llava", "--input", output / "in.jsonl", "--images", images, "--max-rejects", 1)
    assert shard(*arguments, "--output", output / "out", *options) == 0
    rejects = [json.loads(line) for line in (output / "out/rejects.jsonl").read_text().splitlines()]
    assert all(reject["reason"] in REASONS and reject["detail"] and reject["line"] for reject in rejects)
    folders = shard_folders(output / "out")
    assert lint(folders)[0] == []
    written = sum(map(len, folders))
    assert folders[0].manifest["provenance"]["read"] == written + len(rejects)
    return written, len(rejects)


TEXT = st.sampled_from(["What?", "<image>", "<image>\nWhat?", "", " ", "a <image> b <image>", "\ud800", "<video>"])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["<image>", "user"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*PICTURES, "none.png", "../words.png", "/etc/hostname", "https://x.org/a.png", "data:,", ""])
PART = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, TEXT),
    st.builds(lambda name: {"type": "image", "image": name}, NAMES),
    st.builds(lambda name: {"type": "image_url", "image_url": {"url": name}}, NAMES),
    st.sampled_from([{"type": "image"}, {"type": "video"}, {"type": "input_audio"}, {"image": "plain.png"}]),
    JSON,
)
CONTENT = TEXT | st.lists(PART, max_size=4) | JSON
ROLE = st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool", ""])
TURN = st.one_of(
    st.builds(lambda role, content: {"role": role, "content": content}, ROLE, CONTENT),
    st.builds(lambda role, content: {"from": role, "value": content}, ROLE, CONTENT),
    JSON,
)
TURNS = st.lists(TURN, max_size=4) | JSON
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("conversations", "messages", "prompt", "completion", "history"), TURNS),
    **dict.fromkeys(("image", "images", "file_name"), NAMES | st.lists(NAMES, max_size=3) | JSON),
    **dict.fromkeys(("query", "response", "system", "system_prompt"), TEXT | JSON),
    "texts": st.lists(st.fixed_dictionaries({"user": CONTENT, "assistant": CONTENT}), max_size=2) | JSON,
    "id": st.sampled_from(["a", "b", 1]) | JSON,
    "video": JSON,
}
RECORD = st.fixed_dictionaries({}, optional=FIELDS) | st.fixed_dictionaries(
    {"conversations": st.lists(TURN, min_size=1, max_size=4)}, optional={"image": FIELDS["image"], "id": FIELDS["id"]}
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(record=RECORD | JSON)
def test_a_record_is_a_sample_or_says_why_not(images: Path, record: Any) -> None:
    found = check_record(Location(0, "in", 1), LazyRecord(lambda: read_sample(record, images)), "any", None)
    if isinstance(found, Accepted):
        sample = read_sample(record, images)
        parts = [part for turn in sample.messages for part in turn["content"]]
        assert sum(part == {"type": "image"} for part in parts) == len(sample.images)
        assert len(found.pictures) == max(1, len(sample.images))  # of the text where there is none
        assert "<image>" not in "".join(part.get("text", "") for part in parts)
    else:
        assert found.reason in REASONS and found.detail
        json.loads(found.to_json())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(records=st.lists(RECORD | JSON, min_size=1, max_size=30), convert=st.sampled_from([(), ("--convert",)]))
def test_read_is_written_and_rejected(images: Path, records: list[Any], convert: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps(record).encode() for record in [SEEDS[0], *records]]  # the first line tells the layout
        assert sum(run(lines, images, Path(folder), *convert)) == len(lines)


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]


def encoded(mode: str, size: tuple[int, int], format: str, orientation: int) -> bytes | None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    try:
        Image.new(mode, size).save(buffer, format, exif=exif)
    except (OSError, ValueError, KeyError):  # not every format has every mode
        return None
    return buffer.getvalue()


@settings(max_examples=300, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    format=st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "EPS", "PPM"]),
    orientation=st.integers(0, 9),
    cut=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=4),
)
def test_a_picture_that_is_accepted_decodes(mode, size, format, orientation, cut, flips) -> None:
    content = encoded(mode, size, format, orientation)
    if content is None:
        return
    damaged = bytearray(content if cut is None else content[: int(cut * len(content))])
    for place, value in flips if damaged else ():
        damaged[int(place * len(damaged))] ^= value
    try:
        check_image(bytes(damaged))
    except BadSample as bad:
        assert bad.reason in ("broken_image", "image_too_large")
        with pytest.raises(BadSample):
            decode_image(bytes(damaged))
    else:
        assert decode_image(bytes(damaged)).mode == "RGB"


@given(source=JSON | NAMES)
def test_a_named_picture_is_bytes_or_says_why_not(images: Path, source: Any) -> None:
    try:
        assert isinstance(image_bytes(source, images), bytes)
    except BadSample as bad:
        assert bad.detail


def mutated(rng: random.Random, record: Any) -> Any:
    """A copy with one value somewhere in it changed, removed, repeated or moved."""
    places = list(_places(record))
    holder, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = rng.choice([None, "", 0, -1, 1e300, True, [], {}, [[]], "<image>", "\ud800", "../a", {"a": None}])
    elif kind == 2:
        other_holder, other_key = rng.choice(places)
        holder[key] = copy.deepcopy(other_holder[other_key])
    elif kind == 3:
        holder[key] = [holder[key]] * rng.choice([1, 2, 50])
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[rng.choice(["image", "images", "messages", "system", "video", "role", "type"])] = holder[key]
    return record


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


SEEDS: list[Any] = [
    {"id": "a", "image": "plain.png", "conversations": chat("<image>\nWhat?")},
    {"id": "b", "image": ["plain.png", "plain.jpg"], "conversations": chat("<image> or <image>?")},
    {"id": "c", "system": "Be brief.", "conversations": chat("What?")},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "plain.png"}, {"type": "text", "text": "?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]},
    {"images": ["plain.jpg"], "texts": [{"user": "What?", "assistant": "A cat."}]},
    {"prompt": [{"role": "user", "content": "What?"}], "completion": [{"role": "assistant", "content": "A cat."}]},
    {"query": "<image>What?", "response": "A cat.", "history": [["Hi", "Hello"]], "images": ["plain.png"]},
]  # fmt: skip


def mutated_lines(count: int) -> list[bytes]:
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        record = {"record": copy.deepcopy(rng.choice(SEEDS))}  # so that the record itself may be changed too
        for _ in range(rng.choice([1, 1, 2, 3])):
            if list(_places(record)):
                record = mutated(rng, record)
        line = bytearray(json.dumps(record.get("record")).encode())
        if rng.random() < 0.1 and line:  # and a tenth is damaged as bytes
            line[rng.randrange(len(line))] = rng.choice([0, 10, 34, 92, 123, 255])
        lines += bytes(line).split(b"\n")
    return [line for line in lines if line.strip()]


def test_8000_mutated_records_end_in_no_traceback_and_no_miscount(images: Path, tmp_path: Path) -> None:
    lines = mutated_lines(8000)
    written, rejected = run(lines, images, tmp_path)
    assert written + rejected == len(lines) >= 8000
    assert 800 < written < 7200  # both kinds are there
