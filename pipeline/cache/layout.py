"""A teacher cache's folder: its files, its identity and its missing shards (docs/cache_format.md).

cache.json         the cache's identity. Written first; every job that fills the cache must have the same identity
order.int32        the vocabulary order, where the codec needs it
mapping.int32      the teacher's ids as the student's, where their tokenizers differ
head.safetensors   the teacher's language head, where the codec needs it
head.json          the head's sidecar: its SHA-256 at the time of writing
000000.tar         mirrors data shard 000000.tar: same name, same keys, same order
000000.json        the shard's sidecar. Written after it: "this shard is done"
manifest.json      written last, from all sidecars
"""

from __future__ import annotations

import json
import shlex
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.schema import parse_json
from data_prep.storage import is_url, local_copy, read_bytes, size_of
from pipeline.cache.fingerprint import STUDENT_FINGERPRINTS, Mismatch, compare, text_fingerprint
from pipeline.cache.hashes import file_sha256
from pipeline.cache.mapping import is_mapped
from pipeline.cache.order import order_sha256, read_order
from pipeline.cache.paths import ASIDE, IDENTITY
from pipeline.codec.registry import CODECS, Codec, make_codec
from pipeline.commands import cache_command
from pipeline.errors import CacheError

FORMAT = "vlsi-cache"
VERSION = 2
RECORD = "mp"
MOST_IDS = 2**24
"""Ids of a vocabulary, at most: more is damage. The largest models have 262,144."""


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache is made of. Caches of different identities never share a folder."""

    codec: Mapping[str, Any]
    """Name and parameters, such as {"name": "sampled", "points": 64, "seed": 0}."""
    layers: tuple[int, ...]
    """The J teacher layers, counted from 1: the target layers, then the last layer."""
    vocab: int
    """V, the size of the common vocabulary; of a mapped one the student's ids and the bucket."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of the teacher's files, verbalizers, chat template and sample limits; of a mapped vocabulary also the map and the
    student's tokenizer and template. The data's are kept for each shard."""

    def to_json(self) -> dict[str, Any]:
        """The fields of cache.json, which manifest.json also has."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "codec": dict(self.codec),
            "layers": list(self.layers),
            "vocab": self.vocab,
            "fingerprints": dict(self.fingerprints),
        }

    @property
    def mapped(self) -> bool:
        """Whether the distributions are over the student's ids and a bucket."""
        return is_mapped(self.fingerprints)

    @property
    def student_ids(self) -> int:
        """Number of ids that the student's distributions are over: those of a mapped vocabulary without the bucket."""
        return self.vocab - self.mapped

    @property
    def digest(self) -> str:
        """SHA-256 of all fields. The name of the cache's folder comes from it."""
        return text_fingerprint(json.dumps(self.to_json(), sort_keys=True))

    def made_for(self, path: Path) -> str:
        """SHA-256 of all fields and of the folder's vocabulary order. Each sidecar and record is bound to it."""
        return text_fingerprint(f"{self.digest} {order_sha256(path)}")

    def differences(self, other: CacheIdentity) -> list[Mismatch]:
        """The fields where `other` differs from this identity, which is the expected one."""
        expected, found = _flat(self), _flat(other)
        return compare(dict.fromkeys(found, "none recorded") | expected, found)


def read_identity(path: Path, recipe: Path | str = "R") -> CacheIdentity:
    """Read a folder's cache.json. Raises CacheError where it is missing, damaged or of another format version."""
    file = path / IDENTITY
    try:
        values = parse_json(read_bytes(file))
        if values["version"] != VERSION:
            raise CacheError(
                f"{file}: expected cache format version {VERSION}, found {values['version']}. Read it with the "
                f"package version that wrote it, or make it again: {command_to_remake(path, recipe)}"
            )
        return _identity_of(values)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(f"no teacher cache at {path}; make it: {cache_command(recipe)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{file} is damaged ({error!r}); make it again: {command_to_remake(path, recipe)}") from None


def _identity_of(values: Mapping[str, Any]) -> CacheIdentity:
    """Raises ValueError, KeyError or TypeError where a field is missing or is not what it should be."""
    codec, layers, vocab, prints = (values[name] for name in ("codec", "layers", "vocab", "fingerprints"))
    if make_codec(**codec).params.keys() | {"name"} != codec.keys():
        raise ValueError(f"a codec's parameters are {sorted(codec)}")
    if not (isinstance(vocab, int) and 0 < vocab <= MOST_IDS):
        raise ValueError(f"a vocabulary has {vocab!r} ids")
    if not (isinstance(layers, list) and layers and all(isinstance(layer, int) for layer in layers)):
        raise ValueError(f"layers are {layers!r}")
    if not (isinstance(prints, dict) and all(isinstance(value, str) for value in prints.values())):
        raise ValueError("fingerprints are no texts")
    return CacheIdentity(codec, tuple(layers), vocab, prints)


def codec_params(recipe: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A recipe's cache.codec -> the codec's name and parameters, as in CacheIdentity.codec."""
    values = {**recipe, "seed": seed}
    return {"name": recipe["name"], **{key: values[key] for key in CODECS[recipe["name"]].PARAMS}}


def cache_codec(path: Path, identity: CacheIdentity, recipe: Path | str = "R") -> Codec:
    """A cache's codec, with the vocabulary order where it needs one. Raises CacheError where the order is missing."""
    order = None
    if make_codec(**identity.codec).needs_order:
        order = read_order(path, identity.vocab, f"Put it right: {cache_command(recipe, '--only-missing')}")
    return make_codec(**identity.codec, order=order)


def sidecar_crc32(sidecar: Mapping[str, Any]) -> int:
    """The CRC-32 of all fields of a sidecar except the checksum itself."""
    fields = {name: value for name, value in sidecar.items() if name != "crc32"}
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def read_sidecars(path: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{shard name: sidecar} of the shards that have a sidecar with the right checksum."""
    found = {}
    for name in names:
        try:
            sidecar = parse_json(read_bytes((path / name).with_suffix(".json")))
            if sidecar["crc32"] == sidecar_crc32(sidecar):
                found[name] = sidecar
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: the shard is made again
            continue
    return found


def missing_shards(
    path: Path,
    identity: CacheIdentity,
    data_shards: Sequence[Mapping[str, Any]],
    sidecars: Mapping[str, Mapping[str, Any]] | None = None,
    verify: bool = False,
) -> dict[str, str]:
    """{shard name: reason} of the data shards whose cache shard is missing or wrong, in data order.

    Checks sidecars and file sizes. With `verify` it also reads and hashes every cache shard. `sidecars`: those already
    read; by default they are read here.
    """
    sidecars = read_sidecars(path, (shard["name"] for shard in data_shards)) if sidecars is None else sidecars

    made_for = identity.made_for(path)

    def problem(shard: Mapping[str, Any]) -> str | None:
        return _problem(path / shard["name"], made_for, shard, sidecars.get(shard["name"]), verify)

    with ThreadPoolExecutor(8) as pool:
        problems = pool.map(problem, data_shards)
    return {shard["name"]: why for shard, why in zip(data_shards, problems, strict=True) if why}


def command_to_remake(path: Path, recipe: Path | str) -> str:
    """The command that moves an unusable cache aside (it removes nothing) and builds a new one."""
    return f"{command_to_move_aside(path)} && {cache_command(recipe)}"


def command_to_move_aside(path: Path) -> str:
    """The command that renames a cache folder so that its run ignores it. Nothing is deleted."""
    if is_url(path):
        return _store_command(path, f"[fs.mv(file, path + {ASIDE!r} + file[len(path):]) for file in fs.find(path)]")
    return f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}{ASIDE}')}"


def command_to_remove(files: Sequence[Path]) -> str:
    """The command that removes files of a cache."""
    if any(map(is_url, files)):
        return " && ".join(_store_command(file, "fs.rm(path)") for file in files)
    return f"rm {' '.join(shlex.quote(str(file)) for file in files)}"


def mismatch_message(path: Path, mismatches: Sequence[Mismatch], recipe: Path | str, detail: str = "") -> str:
    """The error message for a cache whose fingerprints are not the expected ones."""
    lines = [f"  {mismatch}" for mismatch in mismatches] + ([f"  {detail}"] if detail else [])
    names = [mismatch.name for mismatch in mismatches]
    if set(STUDENT_FINGERPRINTS) & set(names):
        lines.append(
            "  vocabulary: mapped: a cache is for one tokenizer and chat template of students; where it is another "
            "run's (cache_from), leave cache_from out"
        )
    return (
        f"{path} was made from something else ({', '.join(names)}):\n"
        + "\n".join(lines)
        + f"\nBring back what it was made from, or make a new one beside it: {cache_command(recipe)}"
    )


def _problem(
    file: Path, made_for: str, data: Mapping[str, Any], sidecar: Mapping[str, Any] | None, verify: bool
) -> str | None:
    """Why a cache shard must be made or made again; None if it is fine."""
    try:
        if sidecar is None:
            return "not made yet"
        if sidecar["made_for"] != made_for:
            return "made for another cache"
        if sidecar["data_sha256"] != data["sha256"]:
            return f"made from other data: expected SHA-256 {data['sha256']}, found {sidecar['data_sha256']}"
        if sidecar["keys"] != data["keys"]:
            return "its keys are not the data's"
        if (size := size_of(file)) is None:
            return "the file is gone"
        if size != sidecar["bytes"]:
            return f"cut off or changed: expected {sidecar['bytes']:,} bytes, found {size:,}"
        if verify and (found := _sha256_of(file)) != sidecar["sha256"]:
            return f"changed: expected SHA-256 {sidecar['sha256']}, found {found}"
    except (KeyError, TypeError) as error:
        return f"its sidecar is damaged ({error!r})"
    return None


def _store_command(path: Path, call: str) -> str:
    code = f"from fsspec.core import url_to_fs; fs, path = url_to_fs({str(path)!r}); {call}"
    return f"python -c {shlex.quote(code)}"


def _sha256_of(file: Path) -> str:
    with local_copy(file) as copy:
        return file_sha256(copy)


def _flat(identity: CacheIdentity) -> dict[str, str]:
    codec = json.dumps(dict(identity.codec), sort_keys=True)
    own = {"codec": codec, "layers": str(list(identity.layers)), "vocab": str(identity.vocab)}
    return own | dict(identity.fingerprints)
