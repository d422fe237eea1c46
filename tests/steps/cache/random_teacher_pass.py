"""A teacher pass without a teacher: samples of known length, random hidden states, to run parts of the cache step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from data_prep.shards import ShardFolder
from pipeline.cache.layout import CacheIdentity
from pipeline.cache.writer import CacheFolder
from pipeline.codec.registry import Codec
from pipeline.runtime.data.batches import LoadedBatch, Rejected, SampleIndex
from pipeline.signal import Unembedding
from pipeline.steps.cache.teacher_pass import TeacherOutput, encode_batch
from pipeline.steps.cache.writing import ShardBatch
from pipeline.vlm.processing import Batch

LAYERS, VOCAB, WIDTH, TOKENS = (2, 4), 20, 8, 3
HEAD = Unembedding(torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)), VOCAB)


def cache_of(path: Path, data: ShardFolder) -> CacheFolder:
    """An empty cache of the top-k codec, which needs neither an order nor a head."""
    return CacheFolder(path, CacheIdentity({"name": "topk", "k": 4}, LAYERS, VOCAB), data)


def loaded(keys: list[str], rejected: tuple[Rejected, ...] = ()) -> LoadedBatch:
    """A batch of samples of TOKENS response tokens each."""
    labels = VOCAB - 1 - torch.arange(TOKENS * len(keys)) % VOCAB
    return LoadedBatch({"teacher": Batch({}, labels, labels, tuple(keys), (TOKENS,) * len(keys))}, [], list(rejected))


def encode_response(one: LoadedBatch, codec: Codec) -> TeacherOutput:
    """Random distributions for a batch, of which none is measured."""
    count = one.tokens()
    hidden = torch.randn(count, len(LAYERS), WIDTH, generator=torch.Generator().manual_seed(count))
    nothing = torch.zeros(0, dtype=torch.long)
    return encode_batch(codec, torch.zeros(count, len(LAYERS)), nothing, 64, hidden, HEAD)


def shard_batches(data: ShardFolder, shard: int, of: int = 2) -> list[ShardBatch]:
    """A shard as batches of `of` samples."""
    entry = data.shards[shard]
    keys = data.keys[entry.first : entry.first + entry.samples]
    batches = [keys[start : start + of] for start in range(0, len(keys), of)]
    return [ShardBatch(entry.name, loaded(batch), batch is batches[-1]) for batch in batches]


class TeacherPass(SimpleNamespace):
    """The part of a teacher pass that the size estimate uses; samples with `rejected` keys cannot be used."""

    def __init__(self, data: ShardFolder, rejected: tuple[str, ...] = ()):
        super().__init__(dataset=SimpleNamespace(folder=data), encode_response=encode_response, rejected=rejected)

    def batches(self, windows: list[list[SampleIndex]]):
        for window in windows:
            keys = [self.dataset.folder.keys[index.sample] for index in window]
            bad = tuple(Rejected(key, "000000.tar", "broken") for key in keys if key in self.rejected)
            yield [loaded([key for key in keys if key not in self.rejected], bad)]

    def token_usage(self, one: LoadedBatch):
        return torch.bincount(one.batches["teacher"].labels, minlength=VOCAB).numpy()
