"""Filling a teacher cache: any number of jobs, any shard by any job, no coordinator.

A job asks for the missing shards, makes some of them, each whole or not at all, and calls `finish`; whoever finishes
last finds all sidecars there and writes the manifest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data_prep.shards import ShardFolder, write_file, write_manifest, write_shard
from pipeline.errors import CacheError, SampleError
from pipeline.teacher.codec import make_codec, to_bytes
from pipeline.teacher.fingerprint import data_fingerprint, file_sha256
from pipeline.teacher.folder import (
    IDENTITY,
    TOKENS,
    CacheIdentity,
    checksum,
    missing_shards,
    other_maker,
    read_identity,
    read_sidecars,
)
from pipeline.teacher.head import HEAD, save_head
from pipeline.teacher.signal import Unembedding


class CacheFolder:
    """A cache in the making. Raises CacheError when the folder already holds a cache of another identity."""

    def __init__(self, path: Path, identity: CacheIdentity, data: ShardFolder, recipe: Path | str = "R"):
        self.path, self.identity, self.recipe = path, identity, recipe
        self._shards = {shard["name"]: shard for shard in data.manifest["shards"]}
        self._data_fingerprint = data_fingerprint(data.manifest)
        if not (path / IDENTITY).is_file():  # jobs that start together write the same bytes
            write_file(path / IDENTITY, _json(identity.to_json()))
        if differing := identity.differences(read_identity(path, recipe)):
            raise CacheError(other_maker(path, differing, recipe))

    def missing(self, names: Iterable[str] | None = None, verify: bool = False) -> dict[str, str]:
        """{shard name: why} of the data's shards, or of some, that must be made; `verify` also hashes those there."""
        asked = self._shards if names is None else names
        return missing_shards(self.path, self.identity, [self._shards[name] for name in asked], verify=verify)

    def writer(self, shard: str) -> CacheWriter:
        """A writer for the cache shard that mirrors this data shard."""
        return CacheWriter(self.path / shard, self.identity, self._shards[shard])

    @property
    def has_head(self) -> bool:
        """Whether head.safetensors is there."""
        return (self.path / HEAD).is_file()

    def save_head(self, unembedding: Unembedding) -> None:
        """Store the teacher's head, which a codec with `needs_head` decodes through."""
        save_head(self.path, unembedding)

    def finish(self) -> bool:
        """Write the manifest if every shard is there; returns whether it is. Every job calls this at its end.

        Raises ValueError when the codec decodes through a head that nobody saved.
        """
        if make_codec(**self.identity.codec).needs_head and not self.has_head:
            raise ValueError(f"{self.path}: save_head comes before finish, for codec {self.identity.codec}")
        if self.missing():
            return False
        sidecars = read_sidecars(self.path, self._shards)
        fields = self.identity.to_json()
        fields["fingerprints"]["data"] = self._data_fingerprint
        fields["tokens"] = sum(sidecar["tokens"] for sidecar in sidecars.values())
        fields["skipped"] = sum(len(sidecar["skipped"]) for sidecar in sidecars.values())
        if self.has_head:
            fields["head_sha256"] = file_sha256(self.path / HEAD)
        write_manifest(self.path, list(sidecars.values()), **fields)
        return True


class CacheWriter:
    """One cache shard in the making. As a context it leaves nothing behind unless `commit` was called.

    Samples may come in any order; the shard has them in the data's. Until then they wait in an unnamed file beside
    the shard, so that memory holds one record at a time.
    """

    def __init__(self, path: Path, identity: CacheIdentity, data: Mapping[str, Any]):
        self.path, self._identity, self._data = path, identity, data
        self._expected = set(data["keys"])
        self._spill = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # closed by __exit__
        self._records: dict[str, dict[str, tuple[int, int]]] = {}
        self._skipped: dict[str, str] = {}
        self._tokens = 0

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._spill.close()

    def add(self, key: str, tokens: Tensor | Sequence[int], arrays: Mapping[str, Tensor]) -> None:
        """A sample's T response token ids and the codec's arrays [T, J, ...].

        Raises SampleError where a number is NaN (the teacher overflowed): skip it then; ValueError for a foreign key,
        one that came already, or arrays of another T or J.
        """
        ids = np.asarray(tokens, "<i4")
        expected = (len(ids), len(self._identity.layers))
        for name, array in arrays.items():
            if tuple(array.shape[:2]) != expected or not len(ids):
                raise ValueError(f"'{key}': {name} is {tuple(array.shape)} for {expected} tokens and layers")
            if array.is_floating_point() and bool(array.isnan().any()):
                raise SampleError(f"what the teacher says is not a number ({name}): run it in bf16 or fp32")
        members = {TOKENS: ids.tobytes(), **to_bytes(arrays)}
        meta = {"tokens": len(ids), "crc32": checksum(members)}
        self._keep(key, {"json": _json(meta), **members})
        self._tokens += len(ids)

    def skip(self, key: str, reason: str) -> None:
        """Record that a sample could not be used: it keeps its place, without words of the teacher."""
        self._keep(key, {"json": _json({"tokens": 0, "skipped": reason})})
        self._skipped[key] = reason

    def commit(self) -> None:
        """Write the shard and then its sidecar. Raises ValueError when a key of the data shard has not come."""
        absent = [key for key in self._data["keys"] if key not in self._records]
        if absent:
            raise ValueError(f"{self.path.name}: {len(absent)} samples have not come, the first '{absent[0]}'")
        sidecar = self.path.with_suffix(".json")
        sidecar.unlink(missing_ok=True)  # a shard that is being replaced is not done
        entry = write_shard(self.path, ((key, self._recall(key)) for key in self._data["keys"]))
        made = {"made_for": self._identity.digest, "data_sha256": self._data["sha256"]}
        write_file(sidecar, _json({**entry, **made, "tokens": self._tokens, "skipped": self._skipped}))

    def _keep(self, key: str, members: Mapping[str, bytes]) -> None:
        if key in self._records or key not in self._expected:
            raise ValueError(f"'{key}' came twice or is not in {self.path.name}")
        places = {}
        for name, content in members.items():
            places[name] = (self._spill.tell(), len(content))
            self._spill.write(content)
        self._records[key] = places

    def _recall(self, key: str) -> dict[str, bytes]:
        members = {}
        for name, (offset, size) in self._records[key].items():
            self._spill.seek(offset)
            members[name] = self._spill.read(size)
        return members


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode()
