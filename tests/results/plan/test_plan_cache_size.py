"""The cache's size on disk: what is exact is exact against caches that were written, the rest is what was measured."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import zstandard
from planning import paper_plan, paper_recipe, paper_samples
from random_cache import LAYERS, D, V, fill, identity, write_data

from data_prep.shards import ShardFolder
from pipeline.cache.layout import FORMAT, VERSION
from pipeline.cache.writer import CacheFolder
from pipeline.recipe.schema import Codec
from pipeline.results.plan.cache_size import SIDECAR, cache_size, raw_bytes, sampled_at_most, sampled_bytes
from pipeline.results.status import size_of

MEASURED = json.loads((Path(__file__).resolve().parents[3] / "bench/results/cache.json").read_text())
CODECS = {"sampled": {"points": 16, "seed": 0}, "topk": {"k": 8}, "hidden": {"dtype": "bfloat16"}}


@pytest.fixture(params=CODECS)
def written(request, tmp_path):
    """(the recipe's codec, a complete cache's folder, the data)."""
    name, params = request.param, CODECS[request.param]
    data = write_data(tmp_path / "data", shards=3, each=20)
    folder = CacheFolder(tmp_path / "cache", identity(name, **params), data)
    assert fill(folder, data)
    return Codec(name=name, **{key: value for key, value in params.items() if key != "seed"}), folder.path, data


def records(path):
    """The bytes of each record, shard by shard."""
    shards = ShardFolder(path, FORMAT, VERSION)
    found, number = [], 0
    for shard in shards.shards:
        found.append([shards.read_members(number + i)["mp"] for i in range(shard.samples)])
        number += shard.samples
    return found


def tar_bytes(records):
    """Bytes of a shard's tar, from the bytes of its records: a header each, all in whole blocks, ended by two."""

    def padded(size, block):
        return -(-size // block) * block

    blocks = sum(tarfile.BLOCKSIZE + padded(record, tarfile.BLOCKSIZE) for record in records)
    return padded(blocks + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def test_the_container_is_within_its_padding_and_the_streams_are_before_compression(written):
    codec, path, data = written
    manifest, shards = json.loads((path / "manifest.json").read_text()), records(path)
    for shard, found in zip(manifest["shards"], shards, strict=True):
        assert tar_bytes([len(record) for record in found]) == shard["bytes"] == (path / shard["name"]).stat().st_size
    samples = replace(paper_samples(paper_recipe()), count=len(data), shards=len(shards))
    planned = cache_size(codec, samples, len(LAYERS), D, V, None).container - len(data) * SIDECAR
    around = sum(shard["bytes"] for shard in manifest["shards"]) - sum(
        len(record) for found in shards for record in found
    )
    assert abs(planned - around) <= len(data) * tarfile.BLOCKSIZE / 2 + len(shards) * tarfile.RECORDSIZE / 2
    raw = raw_bytes(codec, D, V)
    if raw is None:
        assert codec.name == "sampled"  # its streams depend on the distributions
        return
    streams = [msgpack.unpackb(msgpack.unpackb(record)[1]) for found in shards for record in found]
    frames = [frame for record in streams for name, frame in record.items() if not name.startswith("tokens")]
    assert sum(len(zstandard.decompress(frame)) for frame in frames) == raw * manifest["tokens"] * len(LAYERS)


def test_the_bytes_that_cache_info_shows_give_the_folders_size(written):
    """cache-info counts all files, so the same data take the same bytes: to the last one."""
    codec, path, data = written
    manifest, size = json.loads((path / "manifest.json").read_text()), size_of(path)
    recipe = paper_recipe()
    samples = replace(paper_samples(recipe), count=len(data), response=manifest["tokens"] / len(data))
    planned = cache_size(codec, samples, len(LAYERS), D, V, size / (manifest["tokens"] * len(LAYERS)))
    assert round(planned.token_layers) == manifest["tokens"] * len(LAYERS)
    assert round(planned.bytes) == size


def test_the_papers_pair_takes_what_the_readme_says_a_token_layer_takes():
    """2.9M samples x 150 response tokens x 21 layers x 48.2 bytes, and a tar header, padding and sidecar a sample."""
    size = paper_plan().cache()
    assert size.token_layers == 2_900_000 * 150 * 21
    assert size.distributions == pytest.approx(2_900_000 * 150 * 21 * 48.2, rel=1e-3)
    assert 0 < size.container < 0.01 * size.distributions and size.fixed == 4 * 152_064


@pytest.mark.parametrize(("name", "points"), [("sampled32", 32), ("default", 64), ("sampled256", 256)])
def test_the_estimate_of_sampled_distributions_is_what_was_measured_and_projected(name, points):
    """At the 49,152 ids of bench/results/cache.json, and projected to 152,064 by the bits of longer gaps."""
    measured = MEASURED[name]
    assert sampled_bytes(points, 49_152) == pytest.approx(measured["bytes_per_token_layer"], rel=0.03)
    assert sampled_bytes(points, 152_064) == pytest.approx(measured["projected_bytes_at_152k"], rel=0.03)
    size = paper_plan(f"cache.codec.points={points}").cache()
    assert size.distributions / size.token_layers == pytest.approx(sampled_bytes(points, 152_064))
    assert size.distributions < sampled_at_most(points, 152_064) * size.token_layers


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("points", [16, 64, 256])
def test_a_written_sampled_cache_takes_at_most_what_is_planned_without_its_size(points, sharpness, tmp_path):
    """Of 20 ids no text was measured: the plan is an upper estimate, and the bound before compression is exact."""

    def outputs(key, layers=LAYERS):
        draws = torch.Generator().manual_seed(int(key[1:]))
        return np.arange(150) % V, sharpness * torch.randn(150, len(layers), D, generator=draws)

    data = write_data(tmp_path / "data", shards=3, each=4)
    folder = CacheFolder(tmp_path / "cache", identity("sampled", points=points, seed=0), data)
    assert fill(folder, data, outputs=outputs)
    samples = replace(paper_samples(paper_recipe()), count=len(data), shards=3, response=150)
    planned = cache_size(Codec(points=points), samples, len(LAYERS), D, V, None)
    assert planned.token_layers == 12 * 150 * len(LAYERS)
    identities = 2 * 1024  # a cache's own files, which count in a cache of 12 samples
    assert planned.container < size_of(folder.path) <= planned.bytes + identities
    streams = [msgpack.unpackb(msgpack.unpackb(record)[1]) for found in records(folder.path) for record in found]
    frames = [frame for record in streams for name, frame in record.items() if not name.startswith("tokens")]
    each_last_byte = 20 * len(streams)
    most = sampled_at_most(points, V) * planned.token_layers + each_last_byte
    assert sum(len(zstandard.decompress(frame)) for frame in frames) <= most
