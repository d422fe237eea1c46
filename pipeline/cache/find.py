"""A run's teacher caches side by side: each making has a folder of its own, and none is ever mixed with another.

RUN/cache/sampled-3f2a9c1b/      one cache: its codec, and a hash of what it is made of (folder.py: what lies in it)
RUN/cache/sampled-3f2a9c1b.old/  one that was moved aside: not looked at
RUN/cache/done.json              which was finished last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_prep.shards import ShardFolder
from pipeline.cache.fingerprint import data_fingerprint, text_fingerprint
from pipeline.cache.layout import CacheIdentity, command_to_move_aside, read_identity, read_sidecars
from pipeline.cache.paths import cache_folders
from pipeline.cache.reader import TeacherCache, mismatches
from pipeline.commands import cache_command
from pipeline.errors import CacheError


def folder_for(root: Path, identity: CacheIdentity, data: ShardFolder) -> Path:
    """Where the cache of this identity for this data lies, or is to lie.

    Data that has grown by shards goes on in the folder where it began; a shard that has changed begins another one,
    and so does data that lacks a shard of before.
    """
    for path in cache_folders(root):
        if _is(path, identity) and not _contradicts(path, identity, data):
            return path
    made_from = identity.digest + data_fingerprint(data.manifest)
    while True:
        path = root / f"{identity.codec['name']}-{text_fingerprint(made_from)[:8]}"
        if not _is(path, identity):
            return path
        made_from += path.name  # the name of data that grew and was then cut back: it holds the grown data's shards


def open_cache(
    root: Path,
    data: ShardFolder,
    expected: Mapping[str, str],
    codec: Mapping[str, Any],
    layers: Sequence[int],
    recipe: Path | str,
) -> TeacherCache:
    """The one cache under `root` that fits, opened. Raises CacheError: none there, none fits (says why), or several.

    Of several that do not fit, the one speaks that fits best, and of those the one begun last.
    """
    fitting, refusals = [], []
    for path in cache_folders(root):
        try:
            fitting.append(TeacherCache(path, data, expected, layers, recipe, codec))
        except CacheError as refusal:
            refusals.append((_fit(path, data, expected, codec, layers), refusal))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(str(cache.path) for cache in fitting)
        raise CacheError(
            f"expected one cache that fits, found {len(fitting)}: {names}; they differ in what this run does not know "
            "(such as the teacher's weights, whose folder is gone). Move aside those that are not meant, such as the "
            f"first: {command_to_move_aside(fitting[0].path)}"
        )
    if not refusals:
        raise CacheError(f"no teacher cache in {root}; make it: {cache_command(recipe)}")
    others = f"\n({len(refusals) - 1} other cache(s) in {root} do not fit either)" if len(refusals) > 1 else ""
    raise CacheError(f"{max(reversed(refusals), key=itemgetter(0))[1]}{others}")


def _is(path: Path, identity: CacheIdentity) -> bool:
    try:
        return not identity.differences(read_identity(path))
    except CacheError:  # of another version, or damaged: not ours
        return False


def _fit(
    path: Path, data: ShardFolder, expected: Mapping[str, str], codec: Mapping[str, Any], layers: Sequence[int]
) -> int:
    """How near a refused cache is to what is wanted: 0 made from something else, 1 only from other data, 2 the one."""
    try:
        identity = read_identity(path)
    except CacheError:
        return 0
    if mismatches(identity, expected, codec) or not set(layers) <= set(identity.layers):
        return 0
    return 1 if _contradicts(path, identity, data) else 2


def _contradicts(path: Path, identity: CacheIdentity, data: ShardFolder) -> bool:
    """Whether a shard there was made from another data shard than the one of its name, or from one that is gone.

    A shard of another cache says nothing of what this one was made from: it is made again, as one that is missing.
    """
    made_from = {shard["name"]: shard["sha256"] for shard in data.manifest["shards"]}
    sidecars = read_sidecars(path, sorted(file.name for file in path.glob("*.tar")))
    made_for = identity.made_for(path)
    own = {name: sidecar for name, sidecar in sidecars.items() if sidecar["made_for"] == made_for}
    return any(made_from.get(name) != sidecar["data_sha256"] for name, sidecar in own.items())
