"""One checkpoint on disk: a safetensors file for each rank that wrote it, then checkpoint.json, which makes it whole.

    update_000000500/
      rank_00000.safetensors   KIND/PARAMETER -> float32 [length]: a span of each of some parameters
      checkpoint.json          the update, the loop's own state, and of each file its bytes, SHA-256 and spans

No code can hide in either form. Nothing is loaded before each file has its recorded length and hash.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_prep.atomic import AtomicFile, write_file
from pipeline.errors import CheckpointError
from pipeline.runtime.checkpoint.trained_state import KINDS, Piece, Span

INDEX = "checkpoint.json"
FORMAT, VERSION = "vlsi-checkpoint", 1


class Damaged(CheckpointError):
    """A checkpoint is not as it was written."""


_RANK_FILE = re.compile(r"rank_\d+\.safetensors")
_BLOCK = 1 << 22


@dataclass(frozen=True)
class RankFile:
    """A file of a checkpoint."""

    name: str
    bytes: int
    sha256: str
    pieces: Mapping[str, tuple[int, int, float]]
    """Parameter -> start and length of its span in this file, and how often AdamW has moved it."""


@dataclass(frozen=True)
class Index:
    """The content of checkpoint.json."""

    update: int
    """The update that it was written after, from 1."""
    state: Mapping[str, Any]
    """What the training loop keeps beside the trained state."""
    parameters: Mapping[str, int]
    """Trained parameter -> its elements."""
    files: Sequence[RankFile]


def file_size(spans: Sequence[Span]) -> int:
    """Bytes of the file that `write_rank_file` writes for these spans."""
    return len(_header(spans)) + 8 + 4 * len(KINDS) * sum(span.length for span in spans) if spans else 0


def write_rank_file(folder: Path, rank: int, spans: Sequence[Span], pieces: Iterable[Piece]) -> RankFile | None:
    """Write a rank's pieces, in the order of `spans`; None where there are none.

    It is hashed as it is written: once more from the disk would be once more the time. Raises OSError; then no file is
    left behind.
    """
    if not spans:
        return None
    name, header, digest, size = f"rank_{rank:05}.safetensors", _header(spans), hashlib.sha256(), 0
    written: dict[str, tuple[int, int, float]] = {}
    file = AtomicFile(folder / name)
    try:
        for block in _blocks(header, pieces, written):
            file.file.write(block)
            digest.update(block)
            size += len(block)
        file.commit()
    finally:
        file.discard()
    return RankFile(name, size, digest.hexdigest(), written)


def write_index(folder: Path, index: Index) -> None:
    """Write checkpoint.json, which makes the checkpoint whole. Raises OSError."""
    content = {"format": FORMAT, "version": VERSION, **asdict(index)}
    write_file(folder / INDEX, json.dumps({**content, "checksum": _checksum(content)}).encode())


def read_index(folder: Path) -> Index:
    """Read checkpoint.json. Raises Damaged, or CheckpointError where it has a newer version."""
    path = folder / INDEX
    try:
        content = json.loads(path.read_bytes())
        checksum, version = content.pop("checksum"), int(content["version"])
        if version > VERSION:
            raise CheckpointError(f"{path} has version {version}; this program reads up to {VERSION}: update it")
        if content["format"] != FORMAT or checksum != _checksum(content):
            raise Damaged(f"{path} is damaged: it does not match its own checksum")
        files = [_rank_file(entry) for entry in content["files"]]
        return Index(int(content["update"]), content["state"], content["parameters"], files)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {type(error).__name__}: {error}") from None


def find_damage(folder: Path, files: Iterable[RankFile]) -> list[str]:
    """What is wrong with these files of a checkpoint; all of each is read."""
    found = []
    for file in files:
        path = folder / file.name
        try:
            size = path.stat().st_size
            if size != file.bytes:
                found.append(f"{path} is damaged: {size:,} bytes, expected {file.bytes:,}")
            elif _sha256(path) != file.sha256:
                found.append(f"{path} is damaged: its SHA-256 is not the one that {INDEX} has")
        except OSError as error:
            found.append(f"{path} cannot be read: {error.strerror}")
    return found


class Reader:
    """Reads any spans of a checkpoint's parameters, whatever spans they were written in."""

    def __init__(self, folder: Path, index: Index):
        self._folder, self._index = folder, index
        self._open: dict[str, Any] = {}
        self._places: dict[str, list[tuple[Span, float, str]]] = {}
        for file in index.files:
            for name, (start, length, step) in file.pieces.items():
                self._places.setdefault(name, []).append((Span(name, start, length), step, file.name))

    def check_parameters(self, sizes: Mapping[str, int]) -> None:
        """Raise CheckpointError where what trains now, {name: elements}, is not what the checkpoint has."""
        saved = self._index.parameters
        if differing := sorted(name for name in {*sizes, *saved} if sizes.get(name) != saved.get(name)):
            first = differing[0]
            raise CheckpointError(
                f"{self._folder} has other trained parameters than this step: {len(differing)} differ, first {first}: "
                f"{saved.get(first, 'no')} elements in the checkpoint, {sizes.get(first, 'no')} now. Were the models "
                f"or what trains changed? Put that back, or remove {self._folder.parent} to begin the step anew"
            )
        for name, size in sizes.items():
            ends = [0]
            for span, _, _ in sorted(self._places.get(name, []), key=lambda place: place[0].start):
                ends.append(span.start + span.length if span.start == ends[-1] else -1)
            if ends[-1] != size:
                raise CheckpointError(f"{self._folder}: the spans of {name} in {INDEX} are not its {size} elements")

    def read(self, span: Span) -> Piece:
        """The values of a span, put together from the files that have parts of it. Raises CheckpointError."""
        values, steps = {kind: torch.empty(span.length) for kind in KINDS}, [0.0]
        for saved, step, name in self._places[span.name]:
            begin, end = max(span.start, saved.start), min(span.start + span.length, saved.start + saved.length)
            if begin >= end:
                continue
            steps.append(step)
            for kind, target in values.items():
                part = self._part(name, f"{kind}/{span.name}", begin - saved.start, end - saved.start)
                target[begin - span.start : end - span.start] = part
        return Piece(span, max(steps), values)

    def _part(self, name: str, tensor: str, begin: int, end: int) -> torch.Tensor:
        try:
            part = self._file(name).get_slice(tensor)[begin:end]
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder / name} has no {tensor}[{begin}:{end}]: {error}") from error
        if part.shape != (end - begin,) or part.dtype != torch.float32:
            raise CheckpointError(
                f"{self._folder / name}: {tensor} is {part.dtype} {list(part.shape)}, not as {INDEX} says"
            )
        return part

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        return self._open[name]


def check_room(folder: Path, needed: int) -> None:
    """Raise CheckpointError where a folder, which need not be there yet, cannot take so many bytes. Writes nothing."""
    above = _existing(folder)
    code = None
    if not os.access(above, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES
    elif _free(above) < needed:
        code = errno.ENOSPC
    if code is not None:
        raise CheckpointError(write_problem(folder, OSError(code, os.strerror(code)), needed))


def write_problem(folder: Path, error: OSError, needed: int) -> str:
    """What kept a checkpoint of so many bytes from being written, with what is free, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    room = f": it needs {needed:,} bytes, and {_free(folder):,} are free" if full else ""
    fix = "free some, or lower keep_checkpoints" if full else "make it writable"
    return (
        f"{folder}: the checkpoint cannot be written ({error.strerror or error}){room}. Those written before it stay: "
        f"{fix}, and run the same command again"
    )


def _free(folder: Path) -> int:
    status = os.statvfs(_existing(folder))
    return status.f_bavail * status.f_frsize


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _header(spans: Sequence[Span]) -> bytes:
    """A safetensors header: for each tensor its type, shape and place, padded to a multiple of 8."""
    entries, at = {}, 0
    for span in spans:
        for kind in KINDS:
            end = at + 4 * span.length
            entries[f"{kind}/{span.name}"] = {"dtype": "F32", "shape": [span.length], "data_offsets": [at, end]}
            at = end
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)


def _blocks(
    header: bytes, pieces: Iterable[Piece], written: dict[str, tuple[int, int, float]]
) -> Iterator[bytes | memoryview]:
    """The bytes of a file. Notes each piece in `written` as it goes."""
    yield len(header).to_bytes(8, "little")
    yield header
    for piece in pieces:
        for kind in KINDS:
            values: Any = piece.values[kind].cpu().numpy()
            yield memoryview(values).cast("B")
        written[piece.span.name] = (piece.span.start, piece.span.length, piece.step)


def _rank_file(entry: Mapping[str, Any]) -> RankFile:
    if not _RANK_FILE.fullmatch(entry["name"]):
        raise ValueError(f"a file is named {entry['name']!r}")
    pieces = {name: (int(start), int(length), float(step)) for name, (start, length, step) in entry["pieces"].items()}
    return RankFile(entry["name"], int(entry["bytes"]), str(entry["sha256"]), pieces)


def _checksum(content: Mapping[str, Any]) -> str:
    """Of the content as JSON: it is the same after it has been written and read."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()
