"""A listener without a teacher: samples of known length, whose words are random numbers, to cache steps by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from data_prep.shards import ShardFolder
from pipeline.cache.layout import CacheIdentity
from pipeline.cache.writer import CacheFolder
from pipeline.codec.registry import Codec
from pipeline.runtime.batches import Loaded, Place, Rejected
from pipeline.signal import Unembedding
from pipeline.steps.cache.teacher_pass import Heard, _code
from pipeline.steps.cache.writing import Part
from pipeline.vlm.processing import Batch

LAYERS, VOCAB, WIDTH, TOKENS = (2, 4), 20, 8, 3
HEAD = Unembedding(torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)), VOCAB)


def cache_of(path: Path, data: ShardFolder) -> CacheFolder:
    """An empty cache of the top-k codec, which needs neither an order nor a head."""
    return CacheFolder(path, CacheIdentity({"name": "topk", "k": 4}, LAYERS, VOCAB), data)


def loaded(keys: list[str], rejected: tuple[Rejected, ...] = ()) -> Loaded:
    """A batch of samples of TOKENS response tokens each."""
    labels = VOCAB - 1 - torch.arange(TOKENS * len(keys)) % VOCAB
    return Loaded({"teacher": Batch({}, labels, labels, tuple(keys), (TOKENS,) * len(keys))}, [], list(rejected))


def hear(one: Loaded, codec: Codec) -> Heard:
    """Random words about a batch, of which none is measured."""
    count = one.tokens()
    hidden = torch.randn(count, len(LAYERS), WIDTH, generator=torch.Generator().manual_seed(count))
    nothing = torch.zeros(0, dtype=torch.long)
    return _code(codec, torch.zeros(count, len(LAYERS)), nothing, 64, hidden, HEAD)


def parts(data: ShardFolder, shard: int, of: int = 2) -> list[Part]:
    """A shard as batches of `of` samples."""
    entry = data.shards[shard]
    keys = data.keys[entry.first : entry.first + entry.samples]
    batches = [keys[start : start + of] for start in range(0, len(keys), of)]
    return [Part(entry.name, loaded(batch), batch is batches[-1]) for batch in batches]


class Listener(SimpleNamespace):
    """As much of a listener as rehearsing asks for; `rejected` keys cannot be used."""

    def __init__(self, data: ShardFolder, rejected: tuple[str, ...] = ()):
        super().__init__(chats=SimpleNamespace(folder=data), hear=hear, rejected=rejected)

    def batches(self, windows: list[list[Place]]):
        for window in windows:
            keys = [self.chats.folder.keys[place.sample] for place in window]
            bad = tuple(Rejected(key, "000000.tar", "broken") for key in keys if key in self.rejected)
            yield [loaded([key for key in keys if key not in self.rejected], bad)]

    def use(self, one: Loaded):
        return torch.bincount(one.batches["teacher"].labels, minlength=VOCAB).numpy()
