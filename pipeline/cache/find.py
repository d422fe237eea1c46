"""Find a run's teacher caches. Each cache identity has a folder of its own, so caches are never mixed.

They lie in RUN/cache, or where cache.folder says: a folder or a URL.

RUN/cache/sampled-3f2a9c1b/      one cache, named by its codec and a hash of its identity (layout.py: its contents)
RUN/cache/sampled-3f2a9c1b.old/  a cache that was moved aside: ignored
RUN/cache/done.json              which cache was finished last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_prep.schema import DataError
from data_prep.shards import ShardFolder, data_fingerprint
from data_prep.storage import listed
from pipeline.cache.fingerprint import ANY, PIXELS, files_fingerprint, sample_fingerprints, text_fingerprint
from pipeline.cache.hashes import HashStore
from pipeline.cache.layout import CacheIdentity, codec_params, command_to_move_aside, read_identity, read_sidecars
from pipeline.cache.mapping import VOCABULARY
from pipeline.cache.paths import cache_folders
from pipeline.cache.reader import TeacherCache, mismatches
from pipeline.commands import cache_command
from pipeline.errors import CacheError
from pipeline.recipe.schema import Recipe


def folder_for(root: Path, identity: CacheIdentity, data: ShardFolder) -> Path:
    """The folder of the cache with this identity for this data, whether it exists already or not.

    If the data has only gained shards, its cache continues in the same folder. If a data shard has changed or was
    removed, the data gets a new folder.
    """
    for path in cache_folders(root):
        if _has_identity(path, identity) and not _conflicts_with_data(path, identity, data):
            return path
    made_from = identity.digest + data_fingerprint(data.manifest)
    while True:
        path = root / f"{identity.codec['name']}-{text_fingerprint(made_from)[:8]}"
        if not _has_identity(path, identity):
            return path
        # Taken: this data gained shards, which that folder holds, and then lost them again. Try another name.
        made_from += path.name


def open_cache(
    root: Path,
    data: ShardFolder,
    expected: Mapping[str, str],
    codec: Mapping[str, Any],
    layers: Sequence[int],
    recipe: Path | str,
) -> TeacherCache:
    """Open the one cache under `root` that fits the data, fingerprints, codec and layers.

    Raises CacheError where there is no cache, where none fits, and where several do. Where none fits, the message says
    why for the cache that comes closest; of equally close ones, for the one that was started last.
    """
    fitting, rejected = [], []
    for path in cache_folders(root):
        try:
            fitting.append(TeacherCache(path, data, expected, layers, recipe, codec))
        except CacheError as error:
            rejected.append((_closeness(path, data, expected, codec, layers), error))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(str(cache.path) for cache in fitting)
        raise CacheError(
            f"expected one cache that fits, found {len(fitting)}: {names}; they differ in something that this run "
            "cannot check (such as the teacher's weights, whose folder is gone). Move aside those that you do not "
            f"want, such as the first: {command_to_move_aside(fitting[0].path)}"
        )
    if not rejected:
        raise CacheError(f"no teacher cache in {root}; make it: {cache_command(recipe)}")
    others = f"\n({len(rejected) - 1} other cache(s) in {root} do not fit either)" if len(rejected) > 1 else ""
    raise CacheError(f"{max(reversed(rejected), key=itemgetter(0))[1]}{others}")


def recipe_fingerprints(recipe: Recipe, hashes: HashStore) -> dict[str, str]:
    """Fingerprints that a recipe's cache must have, but for those of the models' folders. OSError: no verbalizers."""
    data = recipe.data
    return {
        VOCABULARY: recipe.vocabulary,
        PIXELS: ANY,  # expected too: a cache of scaled pictures is none of whole ones
        "verbalizers": files_fingerprint([recipe.teacher_stage_1 / "verbalize" / "teacher.safetensors"], hashes),
        **sample_fingerprints(data.max_length, data.min_pixels, data.max_pixels),
    }


def codec_and_layers(
    recipe: Recipe, verbalize: Mapping[str, Any], asked: Sequence[int] | None
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """(the codec, the layers that a cache must have: `asked` or all that have verbalizers, then the last).

    verbalize: the step's summary.
    """
    layers = (*(asked or verbalize["teacher"]["layers"]), verbalize["teacher"]["depth"])
    return codec_params(recipe.cache.codec.model_dump(), recipe.seed), layers


def may_serve(path: Path, recipe: Recipe, verbalize: Mapping[str, Any]) -> bool:
    """Whether interact would take a cache, by its cache.json. The models are not compared: to hash them takes long."""
    try:
        identity, expected = read_identity(path), recipe_fingerprints(recipe, HashStore(recipe.teacher_stage_1))
    except (CacheError, DataError, OSError):  # gone or damaged, or its store does not answer
        return False
    return _is_asked_for(identity, expected, *codec_and_layers(recipe, verbalize, recipe.interact.teacher_layers))


def _is_asked_for(
    identity: CacheIdentity, expected: Mapping[str, str], codec: Mapping[str, Any], layers: Sequence[int]
) -> bool:
    return not mismatches(identity, expected, codec) and set(layers) <= set(identity.layers)


def _has_identity(path: Path, identity: CacheIdentity) -> bool:
    try:
        return not identity.differences(read_identity(path))
    except CacheError:  # another version, or damaged
        return False


def _closeness(
    path: Path, data: ShardFolder, expected: Mapping[str, str], codec: Mapping[str, Any], layers: Sequence[int]
) -> int:
    """How close a rejected cache is: 0 another identity, 1 the right identity and other data, 2 both are right."""
    try:
        identity = read_identity(path)
    except CacheError:
        return 0
    if not _is_asked_for(identity, expected, codec, layers):
        return 0
    return 1 if _conflicts_with_data(path, identity, data) else 2


def _conflicts_with_data(path: Path, identity: CacheIdentity, data: ShardFolder) -> bool:
    """Whether a cache shard was made from a data shard that has changed or is gone.

    Shards that belong to another cache are ignored here. They are rebuilt, like missing ones.
    """
    made_from = {shard["name"]: shard["sha256"] for shard in data.manifest["shards"]}
    sidecars = read_sidecars(path, sorted(file.name for file in listed(path, "*.tar")))
    made_for = identity.made_for(path)
    own = {name: sidecar for name, sidecar in sidecars.items() if sidecar["made_for"] == made_for}
    return any(made_from.get(name) != sidecar["data_sha256"] for name, sidecar in own.items())
