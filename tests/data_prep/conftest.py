"""Chats with faulty faults, and good ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_input import FaultyInput, faulty_records, good_records


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> FaultyInput:
    """60 good records with every kind of fault among them, as JSONL (chat.jsonl) and, less two lines, JSON."""
    folder = tmp_path_factory.mktemp("faulty")
    images = folder / "images"
    good = good_records(images, 60)
    faults = faulty_records(images)
    lines = [json.dumps(record).encode() for record in good]
    reasons = {}
    for number, (reason, record) in enumerate(faults):
        at = 2 * number + 1  # after the record that a duplicate repeats
        lines.insert(at, json.dumps(record).encode())
        reasons[at + 1] = reason
    (folder / "chat.json").write_bytes(b"[\n" + b",\n".join(lines) + b"\n]\n")
    lines += [b'{"id": "g0", "conversations": ', b'{"id": "g1", "conversations": "\xff\xfe"}', b"", b"[" * 100_000]
    reasons |= {len(lines) - 3: "bad_json", len(lines) - 2: "bad_utf8", len(lines): "bad_json"}
    (folder / "chat.jsonl").write_bytes(b"\n".join(lines))
    return FaultyInput(folder, len(good), reasons)


@pytest.fixture
def chats(tmp_path: Path) -> Callable[..., list[str]]:
    """chats(count): write that many good LLaVA records; returns the options that name them."""

    def write(count: int, first: int = 0) -> list[str]:
        records = good_records(tmp_path / "images", count, first)
        (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return ["--source", "llava", "--input", str(tmp_path / "chat.jsonl"), "--images", str(tmp_path / "images")]

    return write
