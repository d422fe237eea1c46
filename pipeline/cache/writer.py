"""Filling a teacher cache: any number of jobs, any shard by any job, no coordinator.

A job asks for the missing shards, makes some of them, each whole or not at all, and calls `finish`; whoever finishes
last finds all sidecars there and writes the manifest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards import ShardFolder, write_file, write_manifest, write_shard
from pipeline.cache.fingerprint import data_fingerprint
from pipeline.cache.head import has_head, head_sha256, save_head
from pipeline.cache.layout import (
    RECORD,
    CacheIdentity,
    cache_codec,
    mismatch_message,
    missing_shards,
    read_identity,
    read_sidecars,
    sidecar_crc32,
)
from pipeline.cache.order import ORDER, has_order, save_order
from pipeline.cache.paths import IDENTITY
from pipeline.codec.packing import pack_record, pack_skipped
from pipeline.codec.registry import Codec, make_codec
from pipeline.commands import cache_command
from pipeline.errors import CacheError, SampleError
from pipeline.signal import Unembedding


class CacheFolder:
    """A cache in the making. Raises CacheError when the folder already holds a cache of another identity."""

    def __init__(self, path: Path, identity: CacheIdentity, data: ShardFolder, recipe: Path | str = "R"):
        self.path, self.identity, self.recipe = path, identity, recipe
        self._shards = {shard["name"]: shard for shard in data.manifest["shards"]}
        self._data_fingerprint = data_fingerprint(data.manifest)
        if not (path / IDENTITY).is_file():  # jobs that start together write the same bytes
            write_file(path / IDENTITY, _json(identity.to_json()))
        if differing := identity.differences(read_identity(path, recipe)):
            raise CacheError(mismatch_message(path, differing, recipe))

    @property
    def missing_files(self) -> set[str]:
        """Which of "head" and "order" the codec needs and the folder has not; they come before any shard.

        A head that is not what was written is lacking: it is hashed, once a job.
        """
        codec = make_codec(**self.identity.codec)
        there = {"head": has_head(self.path), "order": has_order(self.path)}
        needed = {"head": codec.needs_head, "order": codec.needs_order}
        return {name for name in needed if needed[name] and not there[name]}

    def save_head(self, unembedding: Unembedding) -> None:
        """Store the teacher's head, which a codec with `needs_head` decodes through."""
        save_head(self.path, unembedding)

    def save_order(self, order: np.ndarray) -> None:
        """Store the vocabulary's order, unless another job has done so meanwhile."""
        save_order(self.path, order)

    def codec(self) -> Codec:
        """The codec, ready to write. Raises CacheError where it needs an order that is not there."""
        return self._coding[1]

    @property
    def made_for(self) -> str:
        """What the sidecars and records of this job are made for: with the order that its codec was read with."""
        return self._coding[0]

    @cached_property
    def _coding(self) -> tuple[str, Codec]:
        # Once a job, and the hash first: an order that changes from here on is seen by check_order.
        return self.identity.made_for(self.path), cache_codec(self.path, self.identity, self.recipe)

    def check_order(self) -> None:
        """Raise CacheError where the vocabulary's order is no longer the one that this job codes with."""
        if (found := self.identity.made_for(self.path)) != self.made_for:
            raise CacheError(
                f"{self.path / ORDER}, the order of the vocabulary, changed while this job wrote in the old one: "
                f"expected a cache made for {self.made_for}, found {found}. "
                f"Run again: {cache_command(self.recipe, '--only-missing')}"
            )

    def missing(self, names: Iterable[str] | None = None, verify: bool = False) -> dict[str, str]:
        """{shard name: why} of the data's shards, or of some, that must be made; `verify` also hashes those there."""
        asked = self._shards if names is None else names
        return missing_shards(self.path, self.identity, [self._shards[name] for name in asked], verify=verify)

    def writer(self, shard: str) -> CacheWriter:
        """A writer for the cache shard that mirrors this data shard."""
        return CacheWriter(self, self._shards[shard])

    def finish(self, summary: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda sidecars: {}) -> bool:
        """Write the manifest if every shard is there; returns whether it is. Every job calls this at its end.

        `summary` makes further fields of all sidecars. Raises ValueError when the codec needs a head or an order that
        nobody saved.
        """
        if self.missing_files:
            raise ValueError(f"{self.path}: save {self.missing_files} before finish, for codec {self.identity.codec}")
        sidecars = read_sidecars(self.path, self._shards)
        if missing_shards(self.path, self.identity, list(self._shards.values()), sidecars):
            return False
        fields = self.identity.to_json()
        fields["fingerprints"]["data"] = self._data_fingerprint
        fields["tokens"] = sum(sidecar["tokens"] for sidecar in sidecars.values())
        fields["skipped"] = sum(len(sidecar["skipped"]) for sidecar in sidecars.values())
        fields |= summary(list(sidecars.values()))
        if (written := head_sha256(self.path)) is not None:
            fields["head_sha256"] = written
        write_manifest(self.path, list(sidecars.values()), **fields)
        return True


class CacheWriter:
    """One cache shard in the making. As a context it leaves nothing behind unless `commit` was called.

    Samples may come in any order; the shard has them in the data's. Until then they wait in an unnamed file beside
    the shard, so that memory holds one record at a time.
    """

    def __init__(self, cache: CacheFolder, data: Mapping[str, Any]):
        """data: the entry of the data shard to mirror. Raises CacheError where the codec lacks its order."""
        self.path, self._cache, self._data = cache.path / data["name"], cache, data
        self._codec, self._made_for = cache.codec(), cache.made_for
        self._expected = set(data["keys"])
        self._spill = tempfile.TemporaryFile(dir=cache.path)  # noqa: SIM115  # closed by __exit__
        self._records: dict[str, tuple[int, int]] = {}
        self._skipped: dict[str, str] = {}
        self._tokens = 0

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._spill.close()

    def add(self, key: str, tokens: np.ndarray, arrays: Mapping[str, np.ndarray]) -> int:
        """A sample's T response token ids and the codec's arrays [T, J, ...]; returns the bytes that they take.

        Raises SampleError where a number is not finite (the teacher overflowed): skip it then; ValueError for a foreign
        key, one that came already, or arrays of another T or J.
        """
        expected = (len(tokens), len(self._cache.identity.layers))
        for name, array in arrays.items():
            if array.shape[:2] != expected or not len(tokens):
                raise ValueError(f"'{key}': {name} is {array.shape} for {expected} tokens and layers")
        if bad := int((~self._codec.finite(arrays)).sum()):
            raise SampleError(
                f"what the teacher says about {bad} of {len(tokens)} tokens is not finite. If many samples are so in "
                "bf16, set precision: fp32"
            )
        record = pack_record(tokens, self._codec.pack(arrays), self._made_for)
        self._keep(key, record)
        self._tokens += len(tokens)
        return len(record)

    def skip(self, key: str, reason: str) -> None:
        """Record that a sample could not be used: it keeps its place, without words of the teacher."""
        self._keep(key, pack_skipped(reason, self._made_for))
        self._skipped[key] = reason

    def commit(self, **fields: Any) -> None:
        """Write the shard and then its sidecar, with further fields.

        Raises ValueError when a key has not come, CacheError where the vocabulary's order changed meanwhile.
        """
        self._cache.check_order()
        absent = [key for key in self._data["keys"] if key not in self._records]
        if absent:
            raise ValueError(f"{self.path.name}: {len(absent)} samples have not come, the first '{absent[0]}'")
        sidecar = self.path.with_suffix(".json")
        sidecar.unlink(missing_ok=True)  # a shard that is being replaced is not done
        entry = write_shard(self.path, ((key, {RECORD: self._recall(key)}) for key in self._data["keys"]))
        made = {"made_for": self._made_for, "data_sha256": self._data["sha256"]}
        said = {**entry, **made, "tokens": self._tokens, "skipped": self._skipped, **fields}
        write_file(sidecar, _json({**said, "crc32": sidecar_crc32(said)}))

    def _keep(self, key: str, record: bytes) -> None:
        if key in self._records or key not in self._expected:
            raise ValueError(f"'{key}' came twice or is not in {self.path.name}")
        self._records[key] = (self._spill.tell(), len(record))
        self._spill.write(record)

    def _recall(self, key: str) -> bytes:
        offset, size = self._records[key]
        self._spill.seek(offset)
        return self._spill.read(size)


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode()
