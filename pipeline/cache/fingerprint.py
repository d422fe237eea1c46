"""Whose words a cache holds: SHA-256 fingerprints of everything that made it, as a flat {name: hex digest}."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CacheError

# What decides how text becomes ids, the most complete first: the first that a folder has is the tokenizer.
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt", "added_tokens.json"), ("tokenizer.model",))
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# Written by the library that saved the file, not by the model.
INCIDENTAL = ("transformers_version", "_name_or_path", "chat_template")


@dataclass(frozen=True)
class Mismatch:
    """One fingerprint that is not what was expected."""

    name: str
    expected: str
    found: str | None
    """None: not recorded at all."""

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found {self.found or 'none recorded'}"


def compare(expected: Mapping[str, str], found: Mapping[str, str]) -> list[Mismatch]:
    """What differs, in the order of `expected`; names that only `found` has are not asked about."""
    return [Mismatch(name, value, found.get(name)) for name, value in expected.items() if found.get(name) != value]


def model_fingerprints(folder: Path) -> dict[str, str]:
    """weights, config, tokenizer and processor of a Hugging Face folder.

    Raises CacheError where the folder has no safetensors weights or no tokenizer.
    """
    return {
        "weights": weights_fingerprint(folder),
        "config": json_fingerprint([folder / "config.json"]),
        "tokenizer": tokenizer_fingerprint(folder),
        "processor": json_fingerprint([folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]),
    }


def teacher_fingerprints(folder: Path, chat_template: str) -> dict[str, str]:
    """Everything of the teacher that decides what it says: its folder's fingerprints and its chat template."""
    return {**model_fingerprints(folder), "chat_template": text_fingerprint(chat_template)}


def limit_fingerprints(max_length: int, min_pixels: int | None, max_pixels: int | None) -> dict[str, str]:
    """The limits on a sample: plain numbers, not hashes. That of pixels only where one is set, as in older caches."""
    limits = {"max_length": str(max_length)}
    if min_pixels is not None or max_pixels is not None:
        limits["pixels"] = f"{min_pixels or 'any'} to {max_pixels or 'any'}"
    return limits


def weights_fingerprint(folder: Path) -> str:
    """All *.safetensors of a folder and their index: verbalizers as well as whole models, one file or many.

    Files are hashed in parallel, and remembered by path, size and time of change. Raises CacheError where there
    are none.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    if not any(file.suffix == ".safetensors" for file in files):
        pickles = sorted(file.name for file in folder.glob("*.bin")) if folder.is_dir() else []
        found = f"found {pickles[0]}, which is a pickle and is not read" if pickles else "found none"
        raise CacheError(
            f"{folder}: expected weights as *.safetensors, {found}. Convert them once: "
            "model.save_pretrained(FOLDER) with transformers writes safetensors"
        )
    return files_fingerprint(files)


def tokenizer_fingerprint(folder: Path) -> str:
    """The files that decide how text becomes ids. Raises CacheError where there are none."""
    for names in TOKENIZER_FILES:
        files = [folder / name for name in names if (folder / name).is_file()]
        if files:
            return files_fingerprint(files)
    raise CacheError(f"{folder}: expected a tokenizer (tokenizer.json), found none; copy the model's tokenizer there")


def files_fingerprint(files: Sequence[Path]) -> str:
    """Names and bytes of files, in order, such as the teacher's verbalizers. Raises OSError where one is not there."""
    return _combine(_file_digests(files))


def json_fingerprint(files: Iterable[Path]) -> str:
    """What JSON files say, whatever their spacing, key order, or the version of the library that saved them."""
    said = {}
    for file in files:
        values = json.loads(file.read_text(encoding="utf-8"))
        said[file.name] = {key: value for key, value in values.items() if key not in INCIDENTAL}
    return text_fingerprint(json.dumps(said, sort_keys=True, ensure_ascii=False))


def text_fingerprint(text: str) -> str:
    """A string, such as the chat template."""
    return hashlib.sha256(text.encode()).hexdigest()


def data_fingerprint(manifest: Mapping[str, Any]) -> str:
    """A shard folder's data: its shards' names and hashes, in order."""
    return _combine({shard["name"]: shard["sha256"] for shard in manifest["shards"]})


def file_sha256(path: Path) -> str:
    """SHA-256 of one file's bytes."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def _combine(digests: Mapping[str, str]) -> str:
    return text_fingerprint("".join(f"{name} {digest}\n" for name, digest in digests.items()))


def _file_digests(files: Sequence[Path]) -> dict[str, str]:
    """{file name: SHA-256}, from memory where path, size and mtime are those of the last time."""
    stats = {file: file.stat() for file in files}
    places = {file: f"{file.resolve()} {stats[file].st_size} {stats[file].st_mtime_ns}" for file in files}
    remembered = _recall()
    unknown = [file for file in files if places[file] not in remembered]
    if unknown:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the GIL
            new = dict(zip((places[file] for file in unknown), pool.map(file_sha256, unknown), strict=True))
        remembered |= new
        _remember(new)
    return {file.name: remembered[places[file]] for file in files}


def _memory_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlsi" / "sha256.json"


def _recall() -> dict[str, str]:
    try:
        known = json.loads(_memory_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # never written, unreadable, or no home: hash again
        return {}
    return known if isinstance(known, dict) else {}


def _remember(new: Mapping[str, str]) -> None:
    """Best effort: a memory that cannot be written only costs the hashing next time."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _memory_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(_recall() | dict(new), file)
        os.replace(file.name, path)
