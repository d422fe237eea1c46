"""Size on disk and speed of a codec, through the project's own cache files or another system's packed records.

T response tokens, J teacher layers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from bench.cache.layer_outputs import LayerOutputs
from bench.timing import interleaved
from data_prep.shards import FORMAT, ShardFolder, shard_name, write_manifest, write_shard
from pipeline.cache.layout import CacheIdentity
from pipeline.cache.reader import TeacherCache
from pipeline.cache.writer import CacheFolder
from pipeline.codec.packing import join_arrays, pack_record, to_numpy, unpack_record
from pipeline.codec.random import uniform
from pipeline.codec.registry import CODECS, Codec
from pipeline.signal import Signal, Unembedding

RATE_TOKENS = 64
ROUNDS = 5
MOST_TOKEN_BYTES = 2**20
"""More than a token takes in any of the compared codecs."""


@dataclass(frozen=True)
class Coded:
    """The evaluation tokens coded by one codec."""

    codec: Codec
    signal: Signal
    """The signal decoded from the packed bytes."""
    bytes_per_token_layer: float
    in_container: bool
    """Whether the bytes include a cache folder's files (tar, sidecars, manifest), or packed records only."""
    fixed_bytes: int
    """Additional bytes, once per cache of any size: the vocabulary order, the head."""
    ids_per_token_layer: float | None
    """Number of stored ids (distinct ids of a sample); None if no ids are stored."""


def encoded(codec: Codec, hidden: Tensor, head: Unembedding, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays encoded from hidden [T, J, d], with separate random numbers for each seed, layer and token."""
    tokens, layers, _ = hidden.shape
    u = torch.from_numpy(uniform(seed, "draw", "bench", range(layers), tokens))
    return {name: to_numpy(tensor) for name, tensor in codec.encode(hidden, head, u, chunk=256).items()}


def read_back(codec: Codec, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays after packing and unpacking."""
    tokens, layers = next(iter(arrays.values())).shape[:2]
    return join_arrays([codec.unpack(codec.pack(arrays), tokens, layers)])


def code(outputs: LayerOutputs, codec: Codec) -> Coded:
    """Encode the evaluation tokens, write them, and read them back."""
    arrays = encoded(codec, outputs.teacher, outputs.unembedding)
    records = list(_records(outputs, arrays))
    ours = type(codec) is CODECS.get(codec.name)
    signal, size, fixed = (_through_cache if ours else _through_records)(outputs, codec, records)
    ids = None if not hasattr(signal, "probs") else float((signal.probs > 0).sum() / signal.tail.numel())
    return Coded(codec, signal, size / outputs.teacher[..., 0].numel(), ours, fixed, ids)


def rates(outputs: LayerOutputs, codecs: Mapping[str, Codec]) -> dict[str, dict[str, float]]:
    """Token-layers per second of encoding (with the head's product and packing) and of decoding to tensors.

    Medians of runs in turn, one thread, float32. "head_product" is the head's product alone, which every codec needs.
    """
    hidden, labels, head = (
        outputs.teacher[:RATE_TOKENS],
        outputs.labels[:RATE_TOKENS].numpy(),
        outputs.unembedding,
    )
    layers = hidden.shape[1]

    def encode(codec: Codec) -> bytes:
        return pack_record(labels, codec.pack(encoded(codec, hidden, head)))

    def decode(codec: Codec, record: bytes) -> Signal:
        tokens, streams = unpack_record(record, MOST_TOKEN_BYTES)
        return codec.decode(join_arrays([codec.unpack(streams, len(tokens), layers)]), head)

    forms: dict[tuple[str, str], Callable[[], object]] = {
        ("head_product", "encode"): lambda: [head.logits(rows) for rows in hidden.flatten(0, 1).split(RATE_TOKENS)]
    }
    for name, codec in codecs.items():
        forms[name, "encode"] = partial(encode, codec)
        forms[name, "decode"] = partial(decode, codec, encode(codec))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = interleaved(forms, ROUNDS)
    torch.set_num_threads(threads)
    found: dict[str, dict[str, float]] = {}
    for (name, direction), spent in seconds.items():
        found.setdefault(name, {})[f"{direction}_per_s"] = hidden[..., 0].numel() / median(spent)
    return found


def _records(
    outputs: LayerOutputs, arrays: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray, dict[str, np.ndarray]]]:
    """(key, tokens, arrays) of each evaluation answer."""
    start = 0
    for number, length in enumerate(outputs.lengths.tolist()):
        rows = slice(start, start + length)
        yield f"{number:09d}", outputs.labels[rows].numpy(), {name: array[rows] for name, array in arrays.items()}
        start += length


def _through_cache(
    outputs: LayerOutputs, codec: Codec, records: Sequence[tuple[str, np.ndarray, dict[str, np.ndarray]]]
) -> tuple[Signal, int, int]:
    """(signal, bytes of shards, sidecars and manifests, bytes that a cache of any size has once)."""
    with tempfile.TemporaryDirectory() as folder:
        data = _data(Path(folder) / "data", [key for key, _, _ in records])
        layers = (*outputs.setting.teacher_layers, outputs.setting.teacher_layers[-1] + 1)
        identity = CacheIdentity({"name": codec.name, **codec.params}, layers, len(outputs.order))
        path = Path(folder) / "cache"
        path.mkdir()
        cache_folder = CacheFolder(path, identity, data)
        if "order" in cache_folder.missing_files:
            cache_folder.save_order(outputs.order.numpy())
        if "head" in cache_folder.missing_files:
            cache_folder.save_head(outputs.unembedding)
        with cache_folder.writer(shard_name(0)) as writer:
            for key, tokens, arrays in records:
                writer.add(key, tokens, arrays)
            writer.commit()
        cache_folder.finish()
        cache = TeacherCache(path, data)
        head = cache.unembedding() if codec.needs_head else None
        signal = cache.signal([cache.read(index) for index in range(len(cache))], layers, unembedding=head)
        sizes = {file.suffix: 0 for file in path.iterdir()}
        for file in path.iterdir():
            sizes[file.suffix] += file.stat().st_size
        growing_bytes = sizes.pop(".tar") + sizes.pop(".json")
        return signal, growing_bytes, sum(sizes.values())


def _through_records(
    outputs: LayerOutputs, codec: Codec, records: Sequence[tuple[str, np.ndarray, dict[str, np.ndarray]]]
) -> tuple[Signal, int, int]:
    """The same for another system's packed records: each stream through zstd, without a container."""
    packed = [pack_record(tokens, codec.pack(arrays)) for _, tokens, arrays in records]
    layers = outputs.teacher.shape[1]
    records_of = [unpack_record(record, MOST_TOKEN_BYTES) for record in packed]
    unpacked = [codec.unpack(streams, len(tokens), layers) for tokens, streams in records_of]
    return codec.decode(join_arrays(unpacked)), sum(map(len, packed)), 0


def _data(path: Path, keys: Sequence[str]) -> ShardFolder:
    """A data folder for the cache to mirror; its samples have no content."""
    path.mkdir()
    entry = write_shard(path / shard_name(0), ((key, {"json": json.dumps({"key": key}).encode()}) for key in keys))
    write_manifest(path, [entry], format=FORMAT, version=1)
    return ShardFolder(path)
