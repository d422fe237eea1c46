"""Find and inspect teacher caches on disk, complete or not, from their sidecars and manifest."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.schema import DataError
from data_prep.shards import MANIFEST, read_manifest
from data_prep.storage import is_file, is_url, listed
from pipeline.cache.layout import (
    FORMAT,
    RECORD,
    VERSION,
    CacheIdentity,
    missing_shards,
    read_identity,
    read_sidecars,
)
from pipeline.cache.paths import IDENTITY, cache_folders
from pipeline.commands import cache_command
from pipeline.errors import CacheError, RecipeError
from pipeline.recipe.resolve import caches_of, load_recipe

SIDECAR = {"keys", "offsets", "end", "bytes", "sha256", "made_for", "data_sha256", "tokens", "skipped"}
"""Fields that every sidecar has."""

Shard = Mapping[str, Any]


@dataclass(frozen=True)
class CacheOnDisk:
    """The state of one cache folder, read from its small files and the sizes of the large ones."""

    path: Path
    identity: CacheIdentity
    made_for: str
    """Value that its sidecars and records must carry: the hash of the identity and of the vocabulary order."""
    sidecars: Mapping[str, Shard]
    """{shard: sidecar} of all shards that were made, intact or not.

    If a sidecar is missing, the shard's manifest entry is used in its place.
    """
    expected: Mapping[str, Shard]
    """{shard: name, sha256 and keys of the data shard that it mirrors}, as far as known; includes all of `sidecars`."""
    missing: Mapping[str, str]
    """{shard: reason} of the expected shards that have to be made, or made again."""
    manifest: Mapping[str, Any] | None
    """The manifest; None until the cache has been complete once."""
    planned: int | None
    """Number of shards of the complete cache; None if neither the manifest nor the run's data tells it."""
    recipe: Path | None
    """recipe.yaml of the run that the cache belongs to; None if none is known."""

    @property
    def complete(self) -> bool:
        """Whether stage 2 would find every shard, each with the expected size."""
        return self.manifest is not None and not self.missing and len(self.manifest["shards"]) == self.planned

    @property
    def intact(self) -> list[Shard]:
        """Sidecars of the shards without a known problem."""
        return [sidecar for name, sidecar in self.sidecars.items() if name not in self.missing]

    @property
    def state(self) -> str:
        """The state as text, for tables."""
        if self.complete:
            return "complete"
        if self.planned is None:
            return f"{len(self.intact)} shards, not complete"
        return f"{len(self.intact)} of {self.planned} shards" + (
            "" if self.missing else f", no {MANIFEST} for them yet"
        )

    def with_one_shard(self, name: str) -> CacheOnDisk:
        """The same cache reduced to one shard, so that little is pickled for another process."""
        sidecars, expected = {name: self.sidecars[name]}, {name: self.expected[name]}
        return replace(self, sidecars=sidecars, expected=expected, missing={}, manifest=None)

    def command(self) -> str:
        """The command that makes missing and changed shards."""
        return cache_command(self.recipe or "R", "--only-missing")


def find_caches(path: Path) -> list[Path]:
    """Folders of the caches at a path: the path itself, the caches that a run uses, or the caches directly in the path.

    Raises CacheError if there is none.
    """
    if is_file(path / IDENTITY):
        return [path]
    for root in _roots(path):
        if found := sorted(cache_folders(root)):
            return found
    own = path / "recipe.yaml"
    if is_url(path):
        raise CacheError(
            f"no teacher cache at {path}: expected a cache's folder (with {IDENTITY} in it), or one of caches"
        )
    kind = "a folder without any" if path.is_dir() else "a file" if path.exists() else "no such folder"
    raise CacheError(
        f"no teacher cache at {path}: expected a cache's folder (with {IDENTITY} in it), a run's cache/ or a run's "
        f"folder; found {kind}. Make one: {cache_command(own if own.is_file() else 'R')}"
    )


def _roots(path: Path) -> Iterator[Path]:
    """Folders that may have caches in them; another run's last, where the recipe of a run leaves the cache to it."""
    yield path / "cache" if is_url(path) else caches_of(path)
    yield path
    if (owner := owner_of(path)) is not None and owner != path:
        yield caches_of(owner)


def owner_of(path: Path) -> Path | None:
    """The run whose caches the run at a path uses, itself or another; None where there is no run."""
    own = path / "recipe.yaml"
    if is_url(path) or not own.is_file():
        return None
    _, owner = load_recipe(own).recipe.left_to_another_run().get("cache", ("", path))
    return owner


def inspect_cache(path: Path, run: Path | None = None) -> CacheOnDisk:
    """Read the state of a cache folder. run: the one that it belongs to; left out, the one that it lies in, if any.

    Raises CacheError: another format version, or cache.json or the manifest is damaged.
    """
    recipe = _recipe_of(path, run)
    identity = read_identity(path, recipe or "R")
    manifest = _manifest(path, recipe)
    listed = {shard["name"]: shard for shard in manifest["shards"]} if manifest else {}
    sidecars = dict(sorted((listed | valid_sidecars(path)).items()))
    mirrored = {name: {"name": name, "sha256": s["data_sha256"], "keys": s["keys"]} for name, s in sidecars.items()}
    data = _data_shards(recipe)
    if any(data.get(name, {}).get("sha256") != shard["sha256"] for name, shard in mirrored.items()):
        data = {}  # the run now uses other data
    planned = len(data) or (len(listed) if listed.keys() == sidecars.keys() and manifest else None)
    expected = data or mirrored
    missing = missing_shards(path, identity, list(expected.values()), sidecars)
    made_for = identity.made_for(path)
    return CacheOnDisk(path, identity, made_for, sidecars, expected, missing, manifest, planned, recipe)


def valid_sidecars(path: Path) -> dict[str, Shard]:
    """{shard: sidecar} of all valid sidecars in a folder; a damaged sidecar counts as missing."""
    names = [file.with_suffix(".tar").name for file in listed(path, "*.json") if file.name not in (IDENTITY, MANIFEST)]
    return {
        name: sidecar
        for name, sidecar in read_sidecars(path, names).items()
        if isinstance(sidecar, dict) and sidecar.keys() >= SIDECAR and len(sidecar["keys"]) == len(sidecar["offsets"])
    }


def read_record(file: BinaryIO, sidecar: Shard, index: int) -> bytes:
    """Bytes of record number `index` of a shard, counted from 0. Raises ValueError if the tar is damaged there."""
    key, bounds = sidecar["keys"][index], [*sidecar["offsets"][index : index + 2], sidecar["end"]]
    file.seek(bounds[0])
    content = file.read(bounds[1] - bounds[0])
    if len(content) < bounds[1] - bounds[0]:
        raise ValueError("the file ends before the record does")
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            member = tar.extractfile(f"{key}.{RECORD}")
            if member is None:
                raise KeyError("it is a link")
            return member.read()
    except (tarfile.TarError, KeyError) as error:
        raise ValueError(f"its place in the tar is damaged: {error}") from None


def _recipe_of(path: Path, run: Path | None) -> Path | None:
    if run is None and is_url(path):
        return None
    found = (run or Path(os.path.normpath(path / ".." / ".."))) / "recipe.yaml"
    return found if found.is_file() else None


def _manifest(path: Path, recipe: Path | None) -> dict[str, Any] | None:
    if not is_file(path / MANIFEST):
        return None
    try:
        return read_manifest(path, FORMAT, VERSION)
    except DataError as error:
        raise CacheError(f"{error}. Put it right: {cache_command(recipe or 'R', '--only-missing')}") from None


def _data_shards(recipe: Path | None) -> dict[str, Shard]:
    """{shard: its entry in the data manifest}; empty if the recipe or the data is not available."""
    try:
        manifest = read_manifest(load_recipe(recipe).recipe.data.train) if recipe else {"shards": []}
    except (DataError, RecipeError):
        return {}
    return {shard["name"]: shard for shard in manifest["shards"]}
