"""Fingerprints: SHA-256 hashes of everything that a cache was made from, as a flat {name: hex digest}."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.images import DECODING
from data_prep.schema import parse_json
from pipeline.cache.hashes import HashStore
from pipeline.errors import CacheError

# Files that decide how text becomes token ids, the most complete set first. The first set found is the tokenizer.
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt", "added_tokens.json"), ("tokenizer.model",))
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# JSON keys that do not change the outputs (written by the saving library), or that have a fingerprint of their own.
INCIDENTAL = ("transformers_version", "_name_or_path", "chat_template")
PIXELS, ANY = "pixels", "any to any"
"""A fingerprint of limits on images, and what one is that is not recorded."""
STUDENT_FINGERPRINTS = ("student_tokenizer", "student_template")


@dataclass(frozen=True)
class Mismatch:
    """One fingerprint that differs from the expected one."""

    name: str
    expected: str
    found: str | None
    """None where it was not recorded."""

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found {self.found or 'none recorded'}"


def compare(expected: Mapping[str, str], found: Mapping[str, str]) -> list[Mismatch]:
    """The fingerprints that differ, in the order of `expected`. Names that only `found` has are ignored."""
    return [Mismatch(name, value, found.get(name)) for name, value in expected.items() if found.get(name) != value]


def model_fingerprints(folder: Path, hashes: HashStore | None = None) -> dict[str, str]:
    """Fingerprints of a Hugging Face folder: weights, config, tokenizer and processor.

    hashes: where hashes of files are remembered. Raises CacheError where the folder has no safetensors weights or no
    tokenizer.
    """
    return {"weights": weights_fingerprint(folder, hashes), **weightless_fingerprints(folder)}


def weightless_fingerprints(folder: Path) -> dict[str, str]:
    """Fingerprints of all of a Hugging Face folder but its weights. Raises CacheError where it has no tokenizer."""
    return {
        "config": json_fingerprint([folder / "config.json"]),
        "tokenizer": tokenizer_fingerprint(folder),
        "processor": json_fingerprint([folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]),
    }


def teacher_fingerprints(
    folder: Path, chat_template: str, hashes: HashStore | None = None, weights: bool = True
) -> dict[str, str]:
    """Everything about the teacher that affects its outputs: its folder's fingerprints and its chat template.

    weights: whether its weights are there, to be hashed.
    """
    prints = model_fingerprints(folder, hashes) if weights else weightless_fingerprints(folder)
    return {**prints, "chat_template": text_fingerprint(chat_template)}


def student_fingerprints(folder: Path, chat_template: str) -> dict[str, str]:
    """What a cache of a mapped vocabulary depends on of the student: how a chat becomes its response tokens."""
    prints = tokenizer_fingerprint(folder), text_fingerprint(chat_template)
    return dict(zip(STUDENT_FINGERPRINTS, prints, strict=True))


def sample_fingerprints(max_length: int, min_pixels: int | None, max_pixels: int | None) -> dict[str, str]:
    """What decides how a sample becomes model inputs, besides the models: plain text, not hashes."""
    fingerprints = {"max_length": str(max_length), "decoding": DECODING}
    if min_pixels is not None or max_pixels is not None:
        fingerprints[PIXELS] = f"{min_pixels or 'any'} to {max_pixels or 'any'}"
    return fingerprints


def weights_fingerprint(folder: Path, hashes: HashStore | None = None) -> str:
    """The fingerprint of all *.safetensors files of a folder and their index: whole models and verbalizers.

    Files are hashed in parallel, and once: see HashStore. Raises CacheError where there are no such files.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    if not any(file.suffix == ".safetensors" for file in files):
        pickles = sorted(file.name for file in folder.glob("*.bin")) if folder.is_dir() else []
        found = f"found {pickles[0]}, which is a pickle and is not read" if pickles else "found none"
        raise CacheError(
            f"{folder}: expected weights as *.safetensors, {found}. Convert them once: "
            "model.save_pretrained(FOLDER) with transformers writes safetensors"
        )
    return files_fingerprint(files, hashes)


def tokenizer_fingerprint(folder: Path) -> str:
    """The fingerprint of the files that decide how text becomes token ids. Raises CacheError where there are none."""
    for names in TOKENIZER_FILES:
        files = [folder / name for name in names if (folder / name).is_file()]
        if files:
            return files_fingerprint(files)
    raise CacheError(f"{folder}: expected a tokenizer (tokenizer.json), found none; copy the model's tokenizer there")


def files_fingerprint(files: Sequence[Path], hashes: HashStore | None = None) -> str:
    """The fingerprint of files: their names and bytes, in order. Raises OSError where one is missing."""
    digests = (hashes or HashStore()).digests(files)
    return _combine({file.name: digests[file] for file in files})


def json_fingerprint(files: Iterable[Path]) -> str:
    """The fingerprint of JSON files' values. Spacing, key order and the saving library's version do not matter.

    Raises CacheError where one is damaged, or holds no object.
    """
    contents = {}
    for file in files:
        try:
            values = parse_json(file.read_bytes())
        except ValueError as error:
            raise CacheError(f"{file} is damaged: {error}; copy the model again") from None
        if not isinstance(values, dict):
            raise CacheError(f"{file} is damaged: expected an object, found {type(values).__name__}; copy it again")
        contents[file.name] = {key: value for key, value in values.items() if key not in INCIDENTAL}
    return text_fingerprint(json.dumps(contents, sort_keys=True, ensure_ascii=False))


def text_fingerprint(text: str) -> str:
    """The fingerprint of a string, such as the chat template."""
    return hashlib.sha256(text.encode()).hexdigest()


def _combine(digests: Mapping[str, str]) -> str:
    return text_fingerprint("".join(f"{name} {digest}\n" for name, digest in digests.items()))
