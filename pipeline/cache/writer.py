"""Write a teacher cache with any number of jobs. Any job may write any shard; there is no coordinator.

A job asks for the missing shards and writes some of them, each completely or not at all. Then it calls `finish`. The
job that finishes last finds all sidecars and writes the manifest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards import ShardFolder, data_fingerprint, write_file, write_manifest, write_shard
from data_prep.storage import is_file, is_url
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
from pipeline.cache.mapping import has_map, save_map
from pipeline.cache.order import ORDER, has_order, save_order
from pipeline.cache.paths import IDENTITY
from pipeline.codec.packing import pack_record, pack_skipped
from pipeline.codec.registry import Codec, make_codec
from pipeline.commands import cache_command
from pipeline.errors import CacheError, SampleError
from pipeline.signal import Unembedding
from pipeline.vocabulary_map import VocabularyMap


class CacheFolder:
    """A cache that is being written. Raises CacheError where the folder already holds a cache of another identity."""

    def __init__(self, path: Path, identity: CacheIdentity, data: ShardFolder, recipe: Path | str = "R"):
        self.path, self.identity, self.recipe = path, identity, recipe
        self._shards = {shard["name"]: shard for shard in data.manifest["shards"]}
        self._data_fingerprint = data_fingerprint(data.manifest)
        if not is_file(path / IDENTITY):  # jobs that start at once write the same bytes
            write_file(path / IDENTITY, _json(identity.to_json()))
        if differing := identity.differences(read_identity(path, recipe)):
            raise CacheError(mismatch_message(path, differing, recipe))

    @property
    def missing_files(self) -> set[str]:
        """Which of "head", "order" and "mapping" are needed and the folder lacks. They must be saved before any shard.

        A head that does not match its recorded hash counts as missing. Each call hashes the head.
        """
        codec = make_codec(**self.identity.codec)
        present = {"head": has_head(self.path), "order": has_order(self.path)}
        needed = {"head": codec.needs_head, "order": codec.needs_order, "mapping": self.identity.mapped}
        if needed["mapping"]:
            present["mapping"] = has_map(self.path, self.identity.fingerprints, self.identity.vocab)
        return {name for name in needed if needed[name] and not present[name]}

    def save_head(self, unembedding: Unembedding) -> None:
        """Store the teacher's language head, for a codec with `needs_head`."""
        save_head(self.path, unembedding)

    def save_map(self, mapping: VocabularyMap) -> None:
        """Store the teacher's ids as the student's, for a mapped vocabulary."""
        save_map(self.path, mapping)

    def save_order(self, order: np.ndarray) -> None:
        """Store the vocabulary order, unless another job has stored one already."""
        save_order(self.path, order)

    def codec(self) -> Codec:
        """The cache's codec. Raises CacheError where it needs a vocabulary order and the folder has none."""
        return self._identity_and_codec[1]

    @property
    def made_for(self) -> str:
        """The hash of the identity and of the order that this job uses. Its sidecars and records are bound to it."""
        return self._identity_and_codec[0]

    @cached_property
    def _identity_and_codec(self) -> tuple[str, Codec]:
        # Read once for each job, the hash first: check_order then detects any later change of the order.
        return self.identity.made_for(self.path), cache_codec(self.path, self.identity, self.recipe)

    def check_order(self) -> None:
        """Raise CacheError where the stored vocabulary order is no longer the one that this job uses."""
        if (found := self.identity.made_for(self.path)) != self.made_for:
            raise CacheError(
                f"{self.path / ORDER}, the order of the vocabulary, changed while this job used the old one: "
                f"expected a cache made for {self.made_for}, found {found}. "
                f"Run again: {cache_command(self.recipe, '--only-missing')}"
            )

    def missing(self, names: Iterable[str] | None = None, verify: bool = False) -> dict[str, str]:
        """{shard name: reason} of the data's shards (or of `names`) that must be made.

        verify: also hash the existing shards.
        """
        checked = self._shards if names is None else names
        return missing_shards(self.path, self.identity, [self._shards[name] for name in checked], verify=verify)

    def writer(self, shard: str) -> CacheWriter:
        """A writer of the cache shard that mirrors the data shard of this name."""
        return CacheWriter(self, self._shards[shard])

    def finish(self, summary: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda sidecars: {}) -> bool:
        """Write the manifest if all shards are there; return whether they are. Every job calls this at its end.

        summary: makes additional manifest fields from all sidecars. Raises ValueError where the codec needs a head or
        an order, or a mapped vocabulary its map, and none was saved.
        """
        if self.missing_files:
            raise ValueError(f"{self.path}: save {self.missing_files} before finish, for codec {self.identity.codec}")
        sidecars = read_sidecars(self.path, self._shards)
        if missing_shards(self.path, self.identity, list(self._shards.values()), sidecars):
            return False
        fields = self.identity.to_json()
        fields["fingerprints"]["data"] = self._data_fingerprint
        fields["tokens"] = sum(sidecar["tokens"] for sidecar in sidecars.values())
        if self.identity.mapped:
            fields["response_tokens"] = sum(sidecar["response_tokens"] for sidecar in sidecars.values())
        fields["skipped"] = sum(len(sidecar["skipped"]) for sidecar in sidecars.values())
        fields |= summary(list(sidecars.values()))
        if (sha256 := head_sha256(self.path)) is not None:
            fields["head_sha256"] = sha256
        write_manifest(self.path, list(sidecars.values()), **fields)
        return True


class CacheWriter:
    """Writes one cache shard. Used as a context manager, it leaves nothing behind unless `commit` was called.

    Samples may be added in any order; `commit` writes them in the data's order. Until then they are kept in an unnamed
    temporary file, in the cache's folder where that is on a disk, so memory holds only one record at a time.
    """

    def __init__(self, cache: CacheFolder, data: Mapping[str, Any]):
        """data: the manifest entry of the data shard. Raises CacheError where the codec needs an order and has none."""
        self.path, self._cache, self._data = cache.path / data["name"], cache, data
        self._codec, self._made_for = cache.codec(), cache.made_for
        self._expected = set(data["keys"])
        spill_in = None if is_url(cache.path) else cache.path  # None: the local disk
        self._spill = tempfile.TemporaryFile(dir=spill_in)  # noqa: SIM115  # closed by __exit__
        self._records: dict[str, tuple[int, int]] = {}
        self._skipped: dict[str, str] = {}
        self._tokens = self._response_tokens = 0

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._spill.close()

    def add(
        self, key: str, tokens: np.ndarray, arrays: Mapping[str, np.ndarray], places: np.ndarray | None = None
    ) -> int:
        """Add a sample: its response token ids [T] and the codec's arrays [T, J, ...]. Returns the record's bytes.

        places: [T + 1] of a mapped vocabulary, see pack_record. Raises SampleError where a value is not finite (the
        teacher overflowed); the caller then calls `skip`. Raises ValueError for a key that is not in this shard or was
        added already, and for arrays of another T or J.
        """
        expected = (len(tokens), len(self._cache.identity.layers))
        for name, array in arrays.items():
            if array.shape[:2] != expected or not len(tokens):
                raise ValueError(f"'{key}': {name} is {array.shape} for {expected} tokens and layers")
        if bad := int((~self._codec.finite(arrays)).sum()):
            raise SampleError(
                f"the teacher's outputs are not finite at {bad} of {len(tokens)} tokens. If this happens to many "
                "samples in bf16, set precision: fp32"
            )
        record = pack_record(tokens, self._codec.pack(arrays), self._made_for, places)
        self._add_record(key, record)
        self._tokens += len(tokens)
        self._response_tokens += len(tokens) if places is None else int(places[-1])
        return len(record)

    def skip(self, key: str, reason: str) -> None:
        """Record that a sample could not be used. Its record holds the reason and no distributions."""
        self._add_record(key, pack_skipped(reason, self._made_for))
        self._skipped[key] = reason

    def commit(self, **fields: Any) -> None:
        """Write the shard and then its sidecar. `fields`: additional fields of the sidecar.

        Raises ValueError where a sample of the shard was not added, and CacheError where the vocabulary order has
        changed since this job read it.
        """
        self._cache.check_order()
        absent = [key for key in self._data["keys"] if key not in self._records]
        if absent:
            raise ValueError(f"{self.path.name}: {len(absent)} samples were not added, the first '{absent[0]}'")
        sidecar = self.path.with_suffix(".json")
        sidecar.unlink(missing_ok=True)  # while a shard is being replaced, it must not count as done
        entry = write_shard(self.path, ((key, {RECORD: self._read_record(key)}) for key in self._data["keys"]))
        source = {"made_for": self._made_for, "data_sha256": self._data["sha256"]}
        content = {**entry, **source, "tokens": self._tokens, "skipped": self._skipped, **fields}
        if self._cache.identity.mapped:
            content["response_tokens"] = self._response_tokens
        write_file(sidecar, _json({**content, "crc32": sidecar_crc32(content)}))

    def _add_record(self, key: str, record: bytes) -> None:
        if key in self._records or key not in self._expected:
            raise ValueError(f"'{key}' was added twice or is not in {self.path.name}")
        self._records[key] = (self._spill.tell(), len(record))
        self._spill.write(record)

    def _read_record(self, key: str) -> bytes:
        offset, size = self._records[key]
        self._spill.seek(offset)
        return self._spill.read(size)


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode()
