"""Read a teacher cache. Opening checks that it fits the run; reading checks each record's checksum.

T response tokens, J cached teacher layers.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.schema import DataError, parse_json
from data_prep.shards import MANIFEST, ShardFolder, data_fingerprint
from data_prep.storage import listed, read_bytes
from pipeline.cache.fingerprint import ANY, PIXELS, Mismatch, compare
from pipeline.cache.head import check_head, read_head
from pipeline.cache.layout import (
    FORMAT,
    RECORD,
    VERSION,
    CacheIdentity,
    cache_codec,
    mismatch_message,
    missing_shards,
    read_identity,
    read_sidecars,
)
from pipeline.cache.mapping import SHARED, VOCABULARY, read_map
from pipeline.codec.packing import join_arrays, unpack_places, unpack_record
from pipeline.commands import cache_command, train_command
from pipeline.errors import CacheError, SampleError
from pipeline.signal import HiddenSignal, Signal, Unembedding


@dataclass(frozen=True)
class CacheRecord:
    """One sample's cached data, in narrow dtypes that are cheap to pass between processes."""

    key: str
    tokens: np.ndarray
    """[T] int32 response token ids that the arrays were made for."""
    arrays: Mapping[str, np.ndarray]
    """The codec's unpacked arrays [T, J, n]."""
    places: np.ndarray | None = None
    """[T + 1] of a mapped vocabulary: the numbers of these tokens among the student's response tokens, from 0; then the
    number of all. None where each response token has distributions."""


class TeacherCache:
    """A finished cache for the given data folder. Record i belongs to sample i of the data folder. Picklable.

    Opening checks, in this order:

    1. the format version;
    2. the `expected` fingerprints (a cache may hold more than these) and the `codec`, where given;
    3. that the requested `layers` are cached;
    4. that every data shard has a cache shard of the recorded size, made from exactly this data shard.

    It raises CacheError where one of these is wrong. The message has the expected and the found value and the command
    that fixes it; `recipe` is the recipe which that command names.
    """

    def __init__(
        self,
        path: Path,
        data: ShardFolder,
        expected: Mapping[str, str] | None = None,
        layers: Sequence[int] = (),
        recipe: Path | str = "R",
        codec: Mapping[str, Any] | None = None,
    ):
        self.path, self.recipe = path, recipe
        self.identity = read_identity(path, recipe)
        if differing := mismatches(self.identity, expected or {}, codec):
            raise CacheError(mismatch_message(path, differing, recipe))
        self.columns(layers)
        self.codec = cache_codec(path, self.identity, recipe)
        mapped, prints = self.identity.mapped, self.identity.fingerprints
        self.mapping = (
            read_map(path, prints, self.identity.vocab, f"Put it right: {self._repair()}") if mapped else None
        )
        self._made_for = self.identity.made_for(path)
        self._check_complete(data)
        if self.codec.needs_head:
            check_head(path, recipe)
        try:
            self._folder = ShardFolder(path, format=FORMAT, newest=VERSION)
        except DataError as error:
            raise CacheError(f"{error}. Put it right: {self._repair()}") from None

    def __len__(self) -> int:
        return len(self._folder)

    @property
    def layers(self) -> tuple[int, ...]:
        """The J cached teacher layers, counted from 1."""
        return self.identity.layers

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json, with totals and shards."""
        return self._folder.manifest

    def columns(self, layers: Sequence[int]) -> list[int]:
        """Teacher layers, counted from 1 -> columns of a record's arrays. Raises CacheError where a layer is absent."""
        absent = sorted(set(layers) - set(self.layers))
        if absent:
            wanted = f"teacher.layers={sorted({*layers} - {self.layers[-1]})}"
            raise CacheError(
                f"{self.path}: asked for teacher layers {list(layers)}, cached are {list(self.layers)}: {absent} "
                "missing. Ask for cached ones (interact.teacher_layers), or have stage 1 verbalize others, in another "
                f"folder: {train_command(1, self.recipe, '--set', 'run=FOLDER', wanted)}"
            )
        return [self.layers.index(layer) for layer in layers]

    def read(self, index: int) -> CacheRecord:
        """The record of sample `index` of the data folder.

        Raises SampleError where the sample was skipped when the cache was made, and CacheError where the record is
        damaged.
        """
        key = self._folder.keys[index]
        try:
            members = self._folder.read_members(index)
            layers = len(self.layers)
            tokens, streams = unpack_record(members[RECORD], self.codec.token_bytes(layers), self._made_for)
            places = unpack_places(members[RECORD], self._made_for) if self.identity.mapped else None
            if places is not None and len(places) != len(tokens) + 1:
                raise ValueError(f"it has {len(tokens)} tokens and {len(places) - 1} places")
            return CacheRecord(key, tokens, self.codec.unpack(streams, len(tokens), layers), places)
        except (DataError, ValueError, KeyError) as error:
            raise CacheError(
                f"{self.path}: record '{key}' is damaged: {error}. Put it right: {self._repair()}"
            ) from None

    def check_tokens(self, record: CacheRecord, expected: np.ndarray | Tensor | Sequence[int]) -> None:
        """Raise SampleError unless the record was made for exactly these response token ids [T].

        Opening the cache has checked that tokenizer, chat template and max_length are the same. One cause remains: the
        sample was cut at max_length for one model and not for the other.
        """
        wanted, found = np.asarray(expected), record.tokens
        places = np.arange(len(found) + 1) if record.places is None else record.places
        if len(wanted) == places[-1] and np.array_equal(wanted[places[:-1]], found):
            return
        both = places[:-1][places[:-1] < len(wanted)]
        differing = np.flatnonzero(wanted[both] != found[: len(both)])
        if len(differing):
            place = both[differing[0]]
            where = f"at response token {place} expected id {wanted[place]}, found {found[differing[0]]}"
        else:
            where = f"expected {len(wanted)} tokens, found {places[-1]}"
        raise SampleError(
            f"the teacher cache has other response tokens: {where}. Most likely the sample was cut at data.max_length "
            "for one of the two models. Show the record: "
            f"python -m pipeline cache-info {shlex.quote(str(self.path))} --sample {record.key}"
        )

    def signal(
        self,
        records: Sequence[CacheRecord],
        layers: Sequence[int],
        device: torch.device | str = "cpu",
        unembedding: Unembedding | None = None,
    ) -> Signal:
        """The signal of the given teacher layers, in this order, over the tokens of all records, concatenated.

        unembedding: the result of `self.unembedding(device)`, for a codec that needs the head.
        """
        columns = self.columns(layers)
        chosen = [{name: array[:, columns] for name, array in record.arrays.items()} for record in records]
        return self.decode(chosen, len(columns), device, unembedding)

    def decode(
        self,
        records: Sequence[Mapping[str, np.ndarray]],
        layers: int,
        device: torch.device | str = "cpu",
        unembedding: Unembedding | None = None,
    ) -> Signal:
        """As `signal`, from records' arrays that hold only the wanted layers. No records give a signal of no token."""
        if not records:
            signal = self.codec.empty(layers, unembedding, device)
        else:
            signal = self.codec.decode(join_arrays(list(records)), unembedding, device)
        if self.mapping is None:
            return signal
        assert not isinstance(signal, HiddenSignal), "a recipe with vocabulary: mapped and hidden is refused"
        return self.mapping.to_student(signal)

    def unembedding(self, device: torch.device | str = "cpu") -> Unembedding:
        """The teacher's stored language head. Raises CacheError where the file is missing or has changed."""
        return read_head(self.path, self.manifest.get("head_sha256"), device, self.recipe)

    def _check_complete(self, data: ShardFolder) -> None:
        shards = data.manifest["shards"]
        sidecars = self._finished_sidecars()
        missing = missing_shards(self.path, self.identity, shards, sidecars)
        foreign = [name for name, why in missing.items() if why.startswith("made from other data")]
        if foreign:
            made_from = [{"name": name, "sha256": shard.get("data_sha256")} for name, shard in sidecars.items()]
            found = data_fingerprint({"shards": made_from})
            mismatch = Mismatch("data", data_fingerprint(data.manifest), found)
            raise CacheError(
                mismatch_message(self.path, [mismatch], self.recipe, f"{foreign[0]}: {missing[foreign[0]]}")
            )
        if missing:
            raise CacheError(_incomplete(self.path, shards, missing, self.recipe))
        if list(sidecars) != [shard["name"] for shard in shards]:
            extra = sorted(set(sidecars) - {shard["name"] for shard in shards})
            raise CacheError(
                f"{self.path}: expected the {len(shards)} shards of {data.path}, found {len(sidecars)}"
                f"{f' ({extra[0]} is not in the data)' if extra else ''}. Put it right: {self._repair()}"
            )

    def _finished_sidecars(self) -> dict[str, dict[str, Any]]:
        """{shard name: sidecar} from the manifest.

        If there is none yet, from the sidecar files: the error message can then report the progress.
        """
        try:
            manifest = parse_json(read_bytes(self.path / MANIFEST))
            return {shard["name"]: shard for shard in manifest["shards"]}
        except FileNotFoundError:
            return read_sidecars(self.path, sorted(file.name for file in listed(self.path, "*.tar")))
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{self.path / MANIFEST} is damaged ({error!r}). Put it right: {self._repair()}") from None

    def _repair(self) -> str:
        return cache_command(self.recipe, "--only-missing")


def mismatches(identity: CacheIdentity, expected: Mapping[str, str], codec: Mapping[str, Any] | None) -> list[Mismatch]:
    """Where a cache's fingerprints and codec differ from the expected ones. `codec` None: it is not compared."""
    # A cache that says nothing of its vocabulary is of a shared one; one that says nothing of pixels had no limits.
    differing = compare(expected, {VOCABULARY: SHARED, PIXELS: ANY, **identity.fingerprints})
    if codec is not None and dict(codec) != dict(identity.codec):
        expected_json, found_json = (json.dumps(dict(one), sort_keys=True) for one in (codec, identity.codec))
        differing.append(Mismatch("codec", expected_json, found_json))
    return differing


def _incomplete(path: Path, shards: Sequence[Mapping[str, Any]], missing: Mapping[str, str], recipe: Path | str) -> str:
    done = [shard for shard in shards if shard["name"] not in missing]
    first = next(shard for shard in shards if shard["name"] in missing)
    keys, of_keys = (sum(len(shard["keys"]) for shard in some) for some in (done, shards))
    return (
        f"{path} has {len(done)} of {len(shards)} shards, {keys:,} of {of_keys:,} keys; first missing "
        f"'{first['keys'][0]}' in {first['name']} ({missing[first['name']]}). "
        f"Run: {cache_command(recipe, '--only-missing')}"
    )
