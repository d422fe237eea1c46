"""What lies in a teacher cache's folder, whose it is, and what it still lacks (docs/cache_format.md).

cache.json         what the cache is made of: written first; every job that fills it must agree
order.int32        the vocabulary by the teacher's use, where the codec needs it
head.safetensors   the teacher's language head, where the codec needs it
head.json          its sidecar: its hash when it was written
000000.tar         mirrors data shard 000000.tar: same name, same keys, same order
000000.json        its sidecar, written after it: "this shard is done"
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

from pipeline.cache.fingerprint import Mismatch, compare, file_sha256, text_fingerprint
from pipeline.cache.order import order_sha256, read_order
from pipeline.cache.paths import ASIDE, IDENTITY
from pipeline.codec.registry import CODECS, Codec, make_codec
from pipeline.commands import cache_command
from pipeline.errors import CacheError

FORMAT = "vlsi-cache"
VERSION = 2
RECORD = "mp"


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache is made of; two that differ never share a folder."""

    codec: Mapping[str, Any]
    """{"name": "sampled", "points": 64, "seed": 0}."""
    layers: tuple[int, ...]
    """The J teacher layers, counted from 1: the target layers, then the last layer."""
    vocab: int
    """V, the common vocabulary."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of teacher, verbalizers, tokenizer, processor and chat template; the data's are kept shard by shard."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in cache.json and manifest.json."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "codec": dict(self.codec),
            "layers": list(self.layers),
            "vocab": self.vocab,
            "fingerprints": dict(self.fingerprints),
        }

    @property
    def digest(self) -> str:
        """A hash of all of it, which names the cache's folder."""
        return text_fingerprint(json.dumps(self.to_json(), sort_keys=True))

    def made_for(self, path: Path) -> str:
        """The hash that each sidecar carries: of all of it, and of the vocabulary's order in the cache's folder."""
        return text_fingerprint(f"{self.digest} {order_sha256(path)}")

    def differences(self, other: CacheIdentity) -> list[Mismatch]:
        """What `other` has differently from this one, the expected."""
        expected, found = _flat(self), _flat(other)
        return compare(dict.fromkeys(found, "none recorded") | expected, found)


def read_identity(path: Path, recipe: Path | str = "R") -> CacheIdentity:
    """Read a cache folder's cache.json. Raises CacheError: none there, damaged, or of another version."""
    file = path / IDENTITY
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise CacheError(
                f"{file}: expected cache format version {VERSION}, found {values['version']}. Read it with the "
                f"package version that wrote it, or make it again: {command_to_remake(path, recipe)}"
            )
        return CacheIdentity(values["codec"], tuple(values["layers"]), values["vocab"], values["fingerprints"])
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(f"no teacher cache at {path}; make it: {cache_command(recipe)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{file} is damaged ({error!r}); make it again: {command_to_remake(path, recipe)}") from None


def codec_params(recipe: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A recipe's cache.codec to a codec's name and parameters, as a cache's identity holds them."""
    values = {**recipe, "seed": seed}
    return {"name": recipe["name"], **{key: values[key] for key in CODECS[recipe["name"]].PARAMS}}


def cache_codec(path: Path, identity: CacheIdentity, recipe: Path | str = "R") -> Codec:
    """A cache's codec, with the vocabulary's order where it needs one. Raises CacheError where that is not there."""
    order = None
    if make_codec(**identity.codec).needs_order:
        order = read_order(path, identity.vocab, f"Put it right: {cache_command(recipe, '--only-missing')}")
    return make_codec(**identity.codec, order=order)


def sidecar_crc32(sidecar: Mapping[str, Any]) -> int:
    """The checksum of all that a sidecar says, but for itself."""
    said = {name: value for name, value in sidecar.items() if name != "crc32"}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


def read_sidecars(path: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{shard name: sidecar} of those shards that have one as it was written."""
    found = {}
    for name in names:
        try:
            sidecar = json.loads((path / name).with_suffix(".json").read_text(encoding="utf-8"))
            if sidecar["crc32"] == sidecar_crc32(sidecar):
                found[name] = sidecar
        except (OSError, ValueError, KeyError, TypeError):  # not there, or no sidecar any more: the shard is made again
            continue
    return found


def missing_shards(
    path: Path,
    identity: CacheIdentity,
    data_shards: Sequence[Mapping[str, Any]],
    sidecars: Mapping[str, Mapping[str, Any]] | None = None,
    verify: bool = False,
) -> dict[str, str]:
    """{shard name: why} of the data manifest's shards that the cache lacks or has not as it should, in data order.

    Looks at sidecars and file sizes; with `verify` also reads and hashes every cache shard.
    """
    sidecars = read_sidecars(path, (shard["name"] for shard in data_shards)) if sidecars is None else sidecars

    made_for = identity.made_for(path)

    def problem(shard: Mapping[str, Any]) -> str | None:
        return _problem(path / shard["name"], made_for, shard, sidecars.get(shard["name"]), verify)

    with ThreadPoolExecutor(8) as pool:
        problems = pool.map(problem, data_shards)
    return {shard["name"]: why for shard, why in zip(data_shards, problems, strict=True) if why}


def command_to_remake(path: Path, recipe: Path | str) -> str:
    """The command that makes a cache again where the old one is no good: moved aside, not removed."""
    return f"{command_to_move_aside(path)} && {cache_command(recipe)}"


def command_to_move_aside(path: Path) -> str:
    """The command after which a folder is no cache of its run, and nothing is lost."""
    return f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}{ASIDE}')}"


def mismatch_message(path: Path, mismatches: Sequence[Mismatch], recipe: Path | str, detail: str = "") -> str:
    """The refusal of a cache that was made from something else."""
    lines = [f"  {mismatch}" for mismatch in mismatches] + ([f"  {detail}"] if detail else [])
    names = ", ".join(mismatch.name for mismatch in mismatches)
    return (
        f"{path} was made from something else ({names}):\n"
        + "\n".join(lines)
        + f"\nBring back what it was made from, or make a new one beside it: {cache_command(recipe)}"
    )


def _problem(
    file: Path, made_for: str, data: Mapping[str, Any], sidecar: Mapping[str, Any] | None, verify: bool
) -> str | None:
    """Why a cache shard has to be made (again), or None."""
    try:
        if sidecar is None:
            return "not made yet"
        if sidecar["made_for"] != made_for:
            return "made for another cache"
        if sidecar["data_sha256"] != data["sha256"]:
            return f"made from other data: expected SHA-256 {data['sha256']}, found {sidecar['data_sha256']}"
        if sidecar["keys"] != data["keys"]:
            return "its keys are not the data's"
        if not file.is_file():
            return "the file is gone"
        if (size := file.stat().st_size) != sidecar["bytes"]:
            return f"cut off or changed: expected {sidecar['bytes']:,} bytes, found {size:,}"
        if verify and (found := file_sha256(file)) != sidecar["sha256"]:
            return f"changed: expected SHA-256 {sidecar['sha256']}, found {found}"
    except (KeyError, TypeError) as error:
        return f"its sidecar is damaged ({error!r})"
    return None


def _flat(identity: CacheIdentity) -> dict[str, str]:
    codec = json.dumps(dict(identity.codec), sort_keys=True)
    own = {"codec": codec, "layers": str(list(identity.layers)), "vocab": str(identity.vocab)}
    return own | dict(identity.fingerprints)
