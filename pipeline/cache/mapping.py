"""A cache's vocabulary map on disk: mapping.int32, where teacher and student have different tokenizers.

What the distributions of such a cache are over (vocabulary_map.py) belongs to its identity: the fingerprint VOCABULARY
is MAPPED, and MAP is the map's hash. A cache without them is of a shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.shards import write_file
from data_prep.storage import read_bytes
from pipeline.errors import CacheError
from pipeline.vocabulary_map import VocabularyMap

MAPPING = "mapping.int32"
VOCABULARY, SHARED, MAPPED = "vocabulary", "shared", "mapped"
MAP = "mapping"


def is_mapped(fingerprints: Mapping[str, str]) -> bool:
    """Whether a cache's distributions are over the student's ids and a bucket."""
    return fingerprints.get(VOCABULARY, SHARED) == MAPPED


def save_map(path: Path, mapping: VocabularyMap) -> None:
    """Write a cache folder's map: V_t int32. Jobs that begin at once write the same bytes."""
    write_file(path / MAPPING, mapping.class_of.astype("<i4").tobytes())


def has_map(path: Path, fingerprints: Mapping[str, str], size: int) -> bool:
    """Whether a cache folder has the map that its identity names. size: the cache's number of ids, V_s + 1."""
    try:
        return _read(path, size).digest == fingerprints[MAP]
    except (OSError, ValueError, KeyError):
        return False


def read_map(path: Path, fingerprints: Mapping[str, str], size: int, repair: str) -> VocabularyMap:
    """A mapped cache's map. Raises CacheError, ending in `repair`, where it is missing or another one."""
    try:
        mapping = _read(path, size)
    except FileNotFoundError:
        raise CacheError(f"{path}: no {MAPPING}, the teacher's ids as the student's. {repair}") from None
    except ValueError as error:
        raise CacheError(f"{path / MAPPING} is damaged: {error}. {repair}") from None
    if mapping.digest != fingerprints.get(MAP):
        raise CacheError(
            f"{path / MAPPING} is damaged: expected SHA-256 {fingerprints.get(MAP)}, found {mapping.digest}. {repair}"
        )
    return mapping


def _read(path: Path, size: int) -> VocabularyMap:
    return VocabularyMap(np.frombuffer(bytearray(read_bytes(path / MAPPING)), "<i4"), size - 1)
