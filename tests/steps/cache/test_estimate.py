"""What a cache job says before it begins: how large the cache will be, and that there is no room for it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import yaml
from random_teacher_pass import LAYERS, TOKENS, VOCAB, TeacherPass, cache_of, encode_response, shard_batches
from running import tiny_recipe
from tiny import write_data

from data_prep.shards import ShardFolder
from pipeline.cache.layout import CacheIdentity
from pipeline.cache.writer import CacheFolder
from pipeline.errors import CacheError
from pipeline.recipe.resolve import load_recipe, own_caches, refuse_changes
from pipeline.steps.cache.estimate import (
    SAMPLES,
    SizeEstimate,
    check_disk_space,
    evenly_spaced,
    find_vocabulary_order,
    on_disk,
    rehearse,
)
from pipeline.steps.cache.writing import WriterThread

CODECS = [
    {"name": "sampled", "points": 64, "seed": 0},
    {"name": "sampled", "points": 16, "seed": 0},
    {"name": "topk", "k": 64},
    {"name": "hidden", "dtype": "float32"},
]


@pytest.fixture
def data(tmp_path):
    return ShardFolder(write_data(tmp_path / "train", 8))


def refusal(cache: CacheFolder) -> str:
    with pytest.raises(CacheError) as refused:
        check_disk_space(
            cache, SizeEstimate(token_layers=4e15, bytes=2e17), SizeEstimate(token_layers=4e17, bytes=2e19)
        )
    return str(refused.value)


def test_jobs_that_together_cannot_fit_are_refused_with_both_numbers(tmp_path, data):
    cache = CacheFolder(tmp_path / "run" / "cache" / "sampled-1", CacheIdentity(CODECS[0], (2, 4), 20), data)
    small = SizeEstimate(token_layers=10.0, bytes=450.0)
    check_disk_space(cache, small, small)
    said = refusal(cache)
    assert "lacks would take 20,000,000.0 TB (400,000,000,000,000,000 token-layers of 50 bytes)" in said
    assert "this job's part of it 200,000.0 TB, but " in said and "are free there" in said
    assert (
        f"mv {tmp_path / 'run' / 'cache'} FOLDER" in said
        and "--set cache.folder=FOLDER" in said
        and "--set cache.codec.points=32" in said
    )
    with pytest.raises(CacheError, match="are free there"):
        check_disk_space(cache, small, small * 10**18)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: "-".join(map(str, codec.values())))
def test_what_a_refusal_advises_is_taken_by_a_run_after_stage_1(tmp_path, tiny_models, data, codec):
    values = {key: value for key, value in codec.items() if key != "seed"}
    recipe = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", data.path, cache={"codec": values})
    first = load_recipe(recipe)
    first.recipe.run.mkdir()
    (first.recipe.run / "recipe.yaml").write_text(first.to_yaml())
    said = refusal(CacheFolder(first.recipe.run / "cache" / "some-1", CacheIdentity(codec, (2, 4), 20), data))
    (first.recipe.run / "cache").rename(tmp_path / "moved")
    advised = re.findall(r"--set (\S+?)[;)]", said.replace("FOLDER", str(tmp_path / "moved")))
    assert len(advised) == (1 if codec.get("points") == 16 else 2)
    taken = load_recipe(recipe, advised)
    refuse_changes(taken, ["verbalize"])
    assert (taken.recipe.cache.codec != first.recipe.cache.codec) == (len(advised) == 2)
    assert own_caches(taken.recipe) == tmp_path / "moved"


@pytest.mark.parametrize("samples", [1, 5, 64, 65, 100])
def test_samples_read_beforehand_are_spread_over_the_data(tmp_path, samples):
    indices = [index.sample for index in evenly_spaced(ShardFolder(write_data(tmp_path / "train", samples, shards=1)))]
    assert len(set(indices)) == len(indices) == min(SAMPLES, samples) and indices[0] == 0
    assert indices[-1] >= samples - 1 - samples // len(indices) and max(indices) < samples


def test_a_cache_takes_what_was_projected_and_what_is_counted_while_it_grows(tmp_path, data):
    cache = cache_of(tmp_path / "cache", data)
    estimate = rehearse(TeacherPass(data), cache)[0] * len(data)
    assert estimate.token_layers == len(data) * TOKENS * len(LAYERS)
    with WriterThread(cache) as writing:
        written = [
            one
            for shard in (0, 1)
            for shard_batch in shard_batches(data, shard)
            for one in writing.put(shard_batch, encode_response(shard_batch.loaded, cache.codec()))
        ]
        written += writing.rest()
    counted = sum(one.bytes for one in written)
    assert estimate.bytes == pytest.approx(counted, rel=0.01)
    tars = sum(one["end"] for one in map(dict, (cache_entry(cache, name) for name in ("000000", "000001"))))
    assert counted == tars + 200 * len(data), "all but the sidecars, to the byte"


def cache_entry(cache: CacheFolder, name: str) -> dict:
    return yaml.safe_load((cache.path / f"{name}.json").read_text())


def test_samples_that_cannot_be_used_make_a_cache_smaller(tmp_path, data):
    cache = cache_of(tmp_path / "cache", data)
    whole, half = (
        rehearse(TeacherPass(data), cache)[0],
        rehearse(TeacherPass(data, tuple(data.keys[::2])), cache)[0],
    )
    assert half.token_layers == whole.token_layers / 2 and half.bytes == pytest.approx(whole.bytes / 2, rel=0.1)


def test_the_order_is_by_use(data):
    order = find_vocabulary_order(TeacherPass(data))
    assert sorted(order) == list(range(VOCAB)) and order.dtype == np.int32
    twice = VOCAB - TOKENS * len(data) % VOCAB  # the last ids are said once more than the others
    assert order.tolist() == [*range(twice, VOCAB), *range(twice)]


def test_a_record_takes_whole_blocks_of_a_tar():
    assert [on_disk(size) - 200 for size in (1, 512, 513)] == [1024, 1024, 1536]
