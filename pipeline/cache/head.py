"""The teacher's language head, stored in a cache whose codec needs it for decoding: stage 2 has no teacher.

Its hash is computed from the bytes in memory, before they are written. So any later change of the file is detected.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data_prep.schema import parse_json
from data_prep.shards import write_file
from data_prep.storage import is_file, local_copy, read_bytes
from pipeline.cache.hashes import file_sha256
from pipeline.commands import cache_command
from pipeline.errors import CacheError
from pipeline.signal import Unembedding

HEAD = "head.safetensors"
SIDECAR = "head.json"


def save_head(path: Path, unembedding: Unembedding) -> None:
    """Write head.safetensors, cut to the common vocabulary, into a cache folder, and then its hash in head.json."""
    tensors = {"weight": unembedding.weight[: unembedding.vocab].detach().cpu().contiguous()}
    if unembedding.bias is not None:
        tensors["bias"] = unembedding.bias[: unembedding.vocab].detach().cpu().contiguous()
    meta = {"vocab": str(unembedding.vocab), "scale": repr(unembedding.scale)}
    if unembedding.softcap is not None:
        meta["softcap"] = repr(unembedding.softcap)
    content = _with_sorted_header(save(tensors, meta))
    write_file(path / HEAD, content)
    write_file(path / SIDECAR, json.dumps({"sha256": hashlib.sha256(content).hexdigest()}).encode())


def head_sha256(path: Path) -> str | None:
    """The recorded SHA-256 of a cache's head; None where its sidecar head.json is missing or damaged."""
    try:
        return parse_json(read_bytes(path / SIDECAR))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_head(path: Path) -> bool:
    """Whether a cache folder has its head and the file matches its recorded hash."""
    if not is_file(path / HEAD):
        return False
    with local_copy(path / HEAD) as file:
        return file_sha256(file) == head_sha256(path)


def check_head(path: Path, recipe: Path | str = "R") -> None:
    """Raise CacheError where the cache has no head file. Its content is not checked here."""
    if not is_file(path / HEAD):
        raise CacheError(f"{path}: no {HEAD}, which its codec decodes through. {_repair(recipe)}")


def read_head(path: Path, sha256: str | None, device: torch.device | str, recipe: Path | str = "R") -> Unembedding:
    """Load a cache's head. Raises CacheError where the file is missing, damaged or does not match a given `sha256`."""
    check_head(path, recipe)
    with local_copy(path / HEAD) as copy:
        return _load(copy, path / HEAD, sha256, device, recipe)


def _load(copy: Path, file: Path, sha256: str | None, device: torch.device | str, recipe: Path | str) -> Unembedding:
    """Read a head from its local copy; messages name the file that it is a copy of."""
    found = file_sha256(copy)
    if sha256 is not None and found != sha256:
        raise CacheError(f"{file} is damaged: expected SHA-256 {sha256}, found {found}. {_repair(recipe)}")
    try:
        with safe_open(copy, framework="pt", device=str(device)) as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # safe_open is not a dict
            meta = stored.metadata()
        softcap = float(meta["softcap"]) if "softcap" in meta else None
        return Unembedding(
            tensors["weight"], int(meta["vocab"]), tensors.get("bias"), float(meta["scale"]), softcap
        )  # fmt: skip
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{file} is damaged: {error!r}. {_repair(recipe)}") from None


def _with_sorted_header(content: bytes) -> bytes:
    """A safetensors file with its header keys sorted. Their order varies otherwise, and jobs must write equal bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    return b"".join((content[:8], header.ljust(end - 8), memoryview(content)[end:]))


def _repair(recipe: Path | str) -> str:
    return f"Put it right: {cache_command(recipe, '--only-missing')}"
