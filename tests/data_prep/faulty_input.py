"""Images, chats with faulty faults, and ways to run the command."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.__main__ import main

REPOSITORY = Path(__file__).parents[2]


def picture(seed: int, format: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    """An image file of noise, another for each seed."""
    pixels = random.Random(seed).randbytes(3 * size[0] * size[1])
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(buffer, format)
    return buffer.getvalue()


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A small PNG file that declares that many pixels."""
    content = bytearray(picture(0))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def chat(question: str, answer: str = "A cat.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def good_records(images: Path, count: int, first: int = 0) -> list[dict[str, Any]]:
    """LLaVA records of all good kinds, their images written to a folder."""
    records: list[dict[str, Any]] = []
    for number in range(first, first + count):
        name, other = f"{number}.png", f"sub/{number}.jpg"
        (images / "sub").mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(picture(number))
        (images / other).write_bytes(picture(number, "JPEG"))
        one = {"id": f"one/{number}", "image": name, "conversations": chat("<image>\nWhat is it?", f"Thing {number}.")}
        two = {"id": number, "image": [name, other], "conversations": chat("Which of <image> and <image>?")}
        text = {"id": f"text-{number}", "conversations": chat(f"What is {number} + 1?", str(number + 1))}
        records.append((one, two, text)[number % 3])
    return records


@dataclass(frozen=True)
class FaultyInput:
    """A LLaVA file with faults in it."""

    folder: Path
    good: int
    reasons: dict[int, str]
    """Line, from 1 -> the reason for which it must be rejected."""

    @property
    def arguments(self) -> list[str]:
        return [
            "--source",
            "llava",
            "--input",
            str(self.folder / "chat.jsonl"),
            "--images",
            str(self.folder / "images"),
        ]

    @property
    def read(self) -> int:
        return self.good + len(self.reasons)


def faulty_records(images: Path) -> list[tuple[str, Any]]:
    """(reason, record) for each way in which a record can be bad."""
    (images / "cut.png").write_bytes(picture(1, size=(64, 64))[:-400])
    (images / "cut.jpg").write_bytes(picture(1, "JPEG", size=(64, 64))[:-900])
    (images / "words.png").write_text("not an image")
    (images / "bomb.png").write_bytes(bomb())
    (images.parent / "secret.png").write_bytes(picture(2))
    ask = chat("<image>\nWhat?")
    return [
        ("missing_image", {"id": "f0", "image": "nowhere.png", "conversations": ask}),
        ("missing_image", {"id": "f1", "image": "sub", "conversations": ask}),
        ("missing_image", {"id": "f2", "image": "a\0b.png", "conversations": ask}),
        ("broken_image", {"id": "f3", "image": "cut.png", "conversations": ask}),
        ("broken_image", {"id": "f4", "image": "cut.jpg", "conversations": ask}),
        ("broken_image", {"id": "f5", "image": "words.png", "conversations": ask}),
        ("image_too_large", {"id": "f6", "image": "bomb.png", "conversations": ask}),
        ("image_path_escapes", {"id": "f7", "image": "../secret.png", "conversations": ask}),
        ("image_path_escapes", {"id": "f8", "image": str(images.parent / "secret.png"), "conversations": ask}),
        (
            "more_placeholders_than_images",
            {"id": "f9", "image": "0.png", "conversations": chat("<image><image> same?")},
        ),
        ("more_placeholders_than_images", {"id": "f10", "conversations": ask}),
        ("fewer_placeholders_than_images", {"id": "f11", "image": "0.png", "conversations": chat("What?")}),
        ("image_in_response", {"id": "f12", "image": "0.png", "conversations": chat("Draw.", "Here: <image>")}),
        ("no_assistant_turn", {"id": "f13", "image": "0.png", "conversations": ask[:1]}),
        ("empty_response", {"id": "f14", "image": "0.png", "conversations": chat("<image>", " \n")}),
        ("empty_turn", {"id": "f15", "conversations": chat("")}),
        ("duplicate_id", {"id": "one/0", "conversations": chat("Again?")}),
        ("wrong_type", {"id": "f16", "conversations": "What?"}),
        ("wrong_type", {"id": "f17"}),
        ("wrong_type", {"id": "f18", "conversations": []}),
        ("wrong_type", {"id": ["f19"], "conversations": chat("What?")}),
        ("wrong_type", {"id": True, "conversations": chat("What?")}),
        ("wrong_type", {"id": "f20", "image": {"a": 1}, "conversations": ask}),
        ("wrong_type", {"id": "f21", "conversations": [{"from": "narrator", "value": "Hm."}]}),
        ("wrong_type", {"id": "f22", "conversations": [{"from": "human", "value": 7}]}),
        ("wrong_type", {"id": "f23", "conversations": ["What?"]}),
        ("wrong_type", ["a", "list"]),
        ("bad_utf8", {"id": "f24", "conversations": chat("lone \ud800 surrogate")}),
    ]


def shard(*arguments: Any) -> int:
    """Run `python -m data_prep shard` in this process; returns the exit code."""
    return main(["shard", *map(str, arguments)])


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "data_prep", *map(str, arguments)]


def mpirun(ranks: int, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command on that many MPI ranks; skips where there is no mpirun."""
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        pytest.skip("no mpirun: pip install -e '.[mpi]'")
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        [program, "-n", str(ranks), "--oversubscribe", *arguments],
        env={**os.environ, **allowed, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
