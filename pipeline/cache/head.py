"""The teacher's language head, stored with a cache whose codec decodes through it: stage 2 has no teacher.

Its hash is taken of what is written, before the disk has it: whatever becomes of the file is then seen.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data_prep.shards import write_file
from pipeline.cache.fingerprint import file_sha256
from pipeline.commands import cache_command
from pipeline.errors import CacheError
from pipeline.signal import Unembedding

HEAD = "head.safetensors"
SIDECAR = "head.json"


def save_head(path: Path, unembedding: Unembedding) -> None:
    """Write a cache folder's head.safetensors, cut to the common vocabulary, and then its hash."""
    tensors = {"weight": unembedding.weight[: unembedding.vocab].detach().cpu().contiguous()}
    if unembedding.bias is not None:
        tensors["bias"] = unembedding.bias[: unembedding.vocab].detach().cpu().contiguous()
    meta = {"vocab": str(unembedding.vocab), "scale": repr(unembedding.scale)}
    if unembedding.softcap is not None:
        meta["softcap"] = repr(unembedding.softcap)
    content = _in_order(save(tensors, meta))
    write_file(path / HEAD, content)
    write_file(path / SIDECAR, json.dumps({"sha256": hashlib.sha256(content).hexdigest()}).encode())


def head_sha256(path: Path) -> str | None:
    """The hash of a cache's head as it was written; None where its sidecar is gone or damaged."""
    try:
        return json.loads((path / SIDECAR).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_head(path: Path) -> bool:
    """Whether a cache folder has its head, byte for byte as it was written."""
    return (path / HEAD).is_file() and file_sha256(path / HEAD) == head_sha256(path)


def check_head(path: Path, recipe: Path | str = "R") -> None:
    """Raise CacheError where the cache has no head."""
    if not (path / HEAD).is_file():
        raise CacheError(f"{path}: no {HEAD}, which its codec decodes through. {_repair(recipe)}")


def read_head(path: Path, sha256: str | None, device: torch.device | str, recipe: Path | str = "R") -> Unembedding:
    """A cache's head.safetensors. Raises CacheError where it is gone or its hash is another."""
    file = path / HEAD
    check_head(path, recipe)
    found = file_sha256(file)
    if sha256 is not None and found != sha256:
        raise CacheError(f"{file} is damaged: expected SHA-256 {sha256}, found {found}. {_repair(recipe)}")
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # not a dict
            meta = stored.metadata()
        softcap = float(meta["softcap"]) if "softcap" in meta else None
        return Unembedding(
            tensors["weight"], int(meta["vocab"]), tensors.get("bias"), float(meta["scale"]), softcap
        )  # fmt: skip
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{file} is damaged: {error!r}. {_repair(recipe)}") from None


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its header sorted, which comes in an order of chance: jobs write the same bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    return b"".join((content[:8], header.ljust(end - 8), memoryview(content)[end:]))


def _repair(recipe: Path | str) -> str:
    return f"Put it right: {cache_command(recipe, '--only-missing')}"
