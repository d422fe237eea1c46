"""Caches of a random teacher: a data folder, its cached distributions, and functions that write the cache."""

import json

import numpy as np
import torch
from random_teacher import random_order

from data_prep.shards import ShardFolder, write_manifest, write_shard
from pipeline.cache.layout import CacheIdentity, sidecar_crc32
from pipeline.cache.writer import CacheFolder
from pipeline.codec.packing import to_numpy
from pipeline.codec.random import uniform
from pipeline.codec.registry import make_codec
from pipeline.signal import Unembedding

LAYERS, D, V = (2, 4, 6), 8, 20
FINGERPRINTS = {"weights": "aa", "verbalizers": "bb", "tokenizer": "cc", "chat_template": "dd"}
HEAD = Unembedding(torch.randn(V + 2, D, generator=torch.Generator().manual_seed(0)), V, scale=0.5, softcap=30.0)
CACHE_COMMAND = "deepspeed launch/cache.py --recipe 'my run.yaml'"
"""The command in the error messages where the recipe is `my run.yaml`."""


def write_data(path, shards=3, each=4, changed=(), first=0):
    """A data folder with samples k000, k001, ... Shards whose numbers are in `changed` have other content."""
    entries = []
    for shard in range(first, first + shards):
        keys = [f"k{shard * each + i:03d}" for i in range(each)]
        suffix = "other" if shard in changed else ""
        samples = [(key, {"json": json.dumps({"id": key + suffix}).encode()}) for key in keys]
        entries.append(write_shard(path / f"{shard:06d}.tar", samples))
    write_manifest(path, entries, format="vlsi-shards", version=1, split="train")
    return ShardFolder(path)


def identity(codec="topk", layers=LAYERS, fingerprints=FINGERPRINTS, **params):
    """A cache identity; `params` are the codec's."""
    made = make_codec(codec, **params)
    return CacheIdentity({"name": made.name, **made.params}, layers, V, fingerprints)


def teacher_outputs(key, layers=LAYERS):
    """A sample's response token ids [T] and hidden states [T, J, D], a function of its key."""
    number = int(key[1:])
    generator = torch.Generator().manual_seed(number)
    tokens = np.arange(number % 3 + 1) + number
    return tokens, torch.randn(len(tokens), len(layers), D, generator=generator)


def encode_record(codec, key, hidden, layers=LAYERS):
    """The codec's arrays of one sample's hidden states [T, J, D]."""
    u = torch.from_numpy(uniform(codec.params.get("seed", 0), "draw", key, layers, len(hidden)))
    return {name: to_numpy(array) for name, array in codec.encode(hidden, HEAD, u).items()}


def fill(folder, data, names=None, skip=(), outputs=teacher_outputs):
    """Write the missing shards, or those in `names`; return whether the cache is complete."""
    if "head" in folder.missing_files:
        folder.save_head(HEAD)
    if "order" in folder.missing_files:
        folder.save_order(random_order(V))
    codec, layers = folder.codec(), folder.identity.layers
    keys = {shard["name"]: shard["keys"] for shard in data.manifest["shards"]}
    for name in folder.missing() if names is None else names:
        with folder.writer(name) as writer:
            for key in reversed(keys[name]):
                tokens, hidden = outputs(key, layers)
                if key in skip:
                    writer.skip(key, "image is broken")
                else:
                    writer.add(key, tokens, encode_record(codec, key, hidden, layers))
            writer.commit()
    return folder.finish()


def rewrite_sidecar(sidecar, **changes):
    """Change fields of a sidecar, with a checksum that fits."""
    content = {**json.loads(sidecar.read_text()), **changes}
    sidecar.write_text(json.dumps({**content, "crc32": sidecar_crc32(content)}))


def finished_cache(path, data, **options):
    """Write a complete cache at `path`; return `path`."""
    assert fill(CacheFolder(path, identity(**options), data), data)
    return path
