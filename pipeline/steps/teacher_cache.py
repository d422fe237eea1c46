"""The teacher cache that a run uses: its own, or that of another run. No step, but what two of them need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.shards import MANIFEST, ShardFolder
from pipeline.cache.find import codec_and_layers, open_cache, recipe_fingerprints
from pipeline.cache.fingerprint import student_fingerprints, teacher_fingerprints
from pipeline.cache.hashes import HashStore
from pipeline.cache.head import HEAD
from pipeline.cache.mapping import MAPPED, MAPPING
from pipeline.cache.order import ORDER
from pipeline.cache.paths import IDENTITY
from pipeline.cache.reader import TeacherCache
from pipeline.commands import train_command
from pipeline.errors import CacheError
from pipeline.recipe.checks import target_layers
from pipeline.recipe.resolve import caches_of, own_caches
from pipeline.recipe.schema import Recipe
from pipeline.runtime.folder import done
from pipeline.runtime.loop import Job
from pipeline.runtime.shared_files import as_first_rank_sees, wait_for_files
from pipeline.vlm.chat_template import ChatTemplate
from pipeline.vlm.processing import load_processor
from pipeline.vocabulary_map import VocabularyMap


def open_teacher_cache(
    job: Job, step: str, data: ShardFolder, asked: Sequence[int] | None = None
) -> tuple[TeacherCache, tuple[int, ...]]:
    """(the cache that rank 0 chooses, the layers to be used of it: `asked` or all targets, then the last).

    All ranks must call. Raises CacheError, on all of them, if anything that it was made from has changed, or is another
    than the recipe's.
    """
    recipe = job.recipe
    run = recipe.teacher_stage_1
    verbalize = as_first_rank_sees(job.ranks, f"{step}: looking for verbalizers", lambda: done(run / "verbalize"))
    if verbalize is None:
        raise CacheError(f"no verbalizers in {run / 'verbalize'}; run: {train_command(1, run / 'recipe.yaml')}")
    what = f"{step}: hashing what the cache was made from"
    expected = as_first_rank_sees(job.ranks, what, lambda: _expected(recipe))
    codec, layers = codec_and_layers(recipe, verbalize, asked)
    wanted = (data, expected, codec, layers, run / "recipe.yaml")
    root = (
        own_caches(recipe)
        if run == recipe.run
        else as_first_rank_sees(job.ranks, f"{step}: {run}", lambda: caches_of(run))
    )
    what = f"{step}: choosing a cache in {root}"
    path = as_first_rank_sees(job.ranks, what, lambda: open_cache(root, *wanted).path)
    wait_for_files(job.ranks, [path / name for name in (IDENTITY, MANIFEST, ORDER, HEAD, MAPPING)])
    return TeacherCache(path, data, expected, layers, run / "recipe.yaml", codec), layers


def check_for_another_student(
    job: Job, step: str, data: ShardFolder, common: int, mapped: VocabularyMap | None = None
) -> int:
    """Check the cache of `cache_from` for this recipe's student; returns the number of ids that it is compared over.

    common: ids that teacher and student have in common, or the student's where the teacher's are `mapped` to them. Of a
    shared vocabulary these are the ids that the cache has too. All ranks must call. Raises CacheError, on all of them,
    where the cache was made from anything else, its target layers are not the recipe's, or its map is another one.
    """
    recipe = job.recipe
    cache, layers = open_teacher_cache(job, step, data)
    targets = target_layers(recipe.teacher)
    if layers[:-1] != targets:
        raise CacheError(
            f"cache_from: {recipe.cache_from} has the teacher layers {list(layers[:-1])}, this recipe {list(targets)}. "
            f"Set teacher.layers: {list(layers[:-1])}, or leave cache_from out"
        )
    if mapped is not None:
        _check_map(cache, mapped)
    elif cache.identity.vocab > common:
        job.say(
            f"{step}: {cache.path} is over {cache.identity.vocab:,} ids, of which this student has the first "
            f"{common:,}: the other {cache.identity.vocab - common:,} get no probability"
        )
    return min(cache.identity.student_ids, common)


def _check_map(cache: TeacherCache, mapped: VocabularyMap) -> None:
    """Raise CacheError where the cache's map is another: one tokenizer, but heads of other numbers of rows."""
    theirs = cache.mapping
    assert theirs is not None, "that it is mapped is one of the fingerprints"
    if theirs.digest != mapped.digest:
        raise CacheError(
            f"cache_from: {cache.path} has another map of the teacher's ids, though the student's tokenizer is the "
            f"same. It has the {theirs.describe()}. This student has the {mapped.describe()}: expected heads with a "
            "row for each token. Leave cache_from out"
        )


def _expected(recipe: Recipe) -> dict[str, str]:
    """Fingerprints that the cache must have.

    The teacher's are included as far as its files are still there; stage 2 does not need them.
    """
    hashes = HashStore(recipe.teacher_stage_1)
    prints = recipe_fingerprints(recipe, hashes)
    if recipe.vocabulary == MAPPED:
        processor = load_processor(recipe.student.path)
        prints |= student_fingerprints(recipe.student.path, str(processor.chat_template))
        prints |= ChatTemplate(processor).fingerprint_of_bos("student_bos")
    folder = recipe.teacher.path
    weights = any(folder.glob("*.safetensors"))
    if weights or (recipe.cache_from is not None and _has_processor(folder)):
        processor = load_processor(folder)
        prints |= teacher_fingerprints(folder, str(processor.chat_template), hashes, weights)
        prints |= ChatTemplate(processor).fingerprint_of_bos()
    return prints


def _has_processor(folder: Path) -> bool:
    """Whether all of a teacher's folder but the weights is there, as far as names tell."""
    return (folder / "config.json").is_file() and (folder / "tokenizer_config.json").is_file()
