"""Caches of a teacher of random numbers: data to cache, what is said about it, and folders filled with it."""

import json

import numpy as np
import torch
from random_teacher import order_of

from data_prep.shards import ShardFolder, write_manifest, write_shard
from pipeline.cache.layout import CacheIdentity, sidecar_crc32
from pipeline.cache.writer import CacheFolder
from pipeline.codec.packing import to_numpy
from pipeline.codec.random import uniform
from pipeline.codec.registry import make_codec
from pipeline.signal import Unembedding

LAYERS, D, V = (2, 4, 6), 8, 20
MADE_BY = {"weights": "aa", "verbalizers": "bb", "tokenizer": "cc", "chat_template": "dd"}
HEAD = Unembedding(torch.randn(V + 2, D, generator=torch.Generator().manual_seed(0)), V, scale=0.5, softcap=30.0)
AGAIN = "deepspeed launch/cache.py --recipe 'my run.yaml'"
"""The command that a refusal gives where the recipe is `my run.yaml`."""


def write_data(path, shards=3, each=4, salt=(), first=0):
    """A data folder of k000, k001, ...; those shards whose numbers are in `salt` have other content."""
    entries = []
    for shard in range(first, first + shards):
        keys = [f"k{shard * each + i:03d}" for i in range(each)]
        said = "other" if shard in salt else ""
        samples = [(key, {"json": json.dumps({"id": key + said}).encode()}) for key in keys]
        entries.append(write_shard(path / f"{shard:06d}.tar", samples))
    write_manifest(path, entries, format="vlsi-shards", version=1, split="train")
    return ShardFolder(path)


def identity(codec="topk", layers=LAYERS, made_by=MADE_BY, **params):
    made = make_codec(codec, **params)
    return CacheIdentity({"name": made.name, **made.params}, layers, V, made_by)


def words(key, layers=LAYERS):
    """A sample's response tokens [T] and hidden states [T, J, D], made from its key."""
    number = int(key[1:])
    generator = torch.Generator().manual_seed(number)
    tokens = np.arange(number % 3 + 1) + number
    return tokens, torch.randn(len(tokens), len(layers), D, generator=generator)


def say(codec, key, hidden, layers=LAYERS):
    """The codec's arrays of one record."""
    u = torch.from_numpy(uniform(codec.params.get("seed", 0), "draw", key, layers, len(hidden)))
    return {name: to_numpy(array) for name, array in codec.encode(hidden, HEAD, u).items()}


def fill(folder, data, names=None, skip=(), words=words):
    """Make the missing shards, or some; returns whether the cache is complete."""
    if "head" in folder.missing_files:
        folder.save_head(HEAD)
    if "order" in folder.missing_files:
        folder.save_order(order_of(V))
    codec, layers = folder.codec(), folder.identity.layers
    keys = {shard["name"]: shard["keys"] for shard in data.manifest["shards"]}
    for name in folder.missing() if names is None else names:
        with folder.writer(name) as writer:
            for key in reversed(keys[name]):
                tokens, hidden = words(key, layers)
                if key in skip:
                    writer.skip(key, "image is broken")
                else:
                    writer.add(key, tokens, say(codec, key, hidden, layers))
            writer.commit()
    return folder.finish()


def resay(sidecar, **change):
    """Let a sidecar say something else, its checksum in agreement."""
    said = {**json.loads(sidecar.read_text()), **change}
    sidecar.write_text(json.dumps({**said, "crc32": sidecar_crc32(said)}))


def full(path, data, **options):
    """A finished cache's folder."""
    assert fill(CacheFolder(path, identity(**options), data), data)
    return path
