"""Which samples form which global batch, and how a rank loads its part.

The order is a function of (seed, position) alone: neither the number of ranks nor of loader workers changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import Dataset

from data_prep.schema import DataError as ShardError
from data_prep.shards import RawSample, ShardFolder
from pipeline.errors import SampleError, UserError
from pipeline.recipe.schema import Training
from pipeline.runtime.data.bad_samples import Rejected, read_sample
from pipeline.runtime.data.cutting import cut
from pipeline.runtime.ranks import Ranks
from pipeline.vlm.processing import Batch, ChatEncoder, Encoded

MB = 2**20

Item = TypeVar("Item")
Made = TypeVar("Made")


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from (seed, purpose, numbers...), the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def map_unique(make: Callable[[Item], Made], things: Mapping[str, Item]) -> dict[str, Made]:
    """{name:

    make(thing)}; make is called once for an object that stands under several names. Models with one processor share
    work.
    """
    made: dict[int, Made] = {}
    for thing in things.values():
        if id(thing) not in made:
            made[id(thing)] = make(thing)
    return {name: made[id(thing)] for name, thing in things.items()}


def encoded_nbytes(encoded: Mapping[str, Encoded]) -> int:
    """Bytes of a sample in each model's form, what models share once."""
    return sum(one.nbytes() for one in {id(one): one for one in encoded.values()}.values())


class SampleIndex(NamedTuple):
    """A sample's number in the data folder, and the epoch in which it is read.

    Random choices that differ by epoch use both.
    """

    sample: int
    epoch: int = 0


class DataOrder:
    """The endless stream of sample indices: each epoch is one permutation of all samples, drawn from (seed, epoch)."""

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> SampleIndex:
        """The sample at a position of the stream, from 0, and its epoch."""
        epoch, index = divmod(position, self.samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.samples, generator=generator)
        return SampleIndex(int(self._order[index]), epoch)


def micro_batches(
    order: DataOrder,
    training: Training,
    length: Callable[[SampleIndex], float] | None,
    first_update: int,
    last_update: int,
    ranks: Ranks,
) -> Iterator[list[list[SampleIndex]]]:
    """The samples of this rank's micro-batches, for each update from first_update to last_update - 1.

    Every rank has as many in an update as the others. length: see cutting.cut.
    """
    for update in range(first_update, last_update):
        start = update * training.batch_size
        batch = [order[position] for position in range(start, start + training.batch_size)]
        yield [micro_step[ranks.rank] for micro_step in cut(batch, length, training, ranks.world)]


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch from the loader."""

    batches: Mapping[str, Batch]
    """One batch for each encoder, such as {"teacher": ..., "student": ...}; the same one for models that share it."""
    attached: list[Any]
    """What `attach` gave for each used sample, in order."""
    rejected: list[Rejected] = field(default_factory=list)
    """Samples of this micro-batch left out."""

    def tokens(self) -> int:
        """Response tokens of the micro-batch."""
        return len(next(iter(self.batches.values())).labels)

    def real_tokens(self) -> int:
        """Tokens of its samples, of the first encoder."""
        return next(iter(self.batches.values())).tokens

    def computed_tokens(self) -> int:
        """Tokens that a forward computes: with the padding, and the filler row of a batch without images."""
        return next(iter(self.batches.values())).inputs["input_ids"].numel()

    def images(self) -> int:
        """Samples of the micro-batch with at least one image."""
        return next(iter(self.batches.values())).images

    def sizes(self) -> str:
        """For messages: what a forward over it has to hold."""
        tokens = next(iter(self.batches.values())).inputs["input_ids"]
        return f"{tokens.shape[0]} x {tokens.shape[1]} tokens, {self.tokens()} to predict, {self.images()} with images"

    def nbytes(self) -> int:
        """What its tensors take, those that models share once."""
        return sum(batch.nbytes() for batch in {id(batch): batch for batch in self.batches.values()}.values())

    def pin_memory(self) -> LoadedBatch:
        """With its batches in page-locked memory.

        torch's loader calls a method of this name. `attached` stays: it is numpy.
        """
        return replace(self, batches=map_unique(Batch.pin_memory, self.batches))


Align = Callable[[RawSample, Mapping[str, Encoded]], tuple[dict[str, Encoded], Any]]
"""(a sample as it is stored, its form for each model) -> (the forms, with fewer tokens that carry loss; what is handed
over with them)."""


class ChatDataset(Dataset):
    """A shard folder's samples, encoded for each model that reads them."""

    def __init__(
        self,
        folder: ShardFolder,
        encoders: Mapping[str, ChatEncoder],
        attach: Callable[[SampleIndex, Encoded], tuple[Encoded, Any]] | None = None,
        memory: int = 0,
        align: Align | None = None,
        ids: Mapping[str, int] | None = None,
    ):
        """attach returns a sample's form and what is handed over with it, such as its record in the teacher cache.

        It may reduce the tokens that carry loss. It works with a single encoder only. memory: bytes of encoded samples
        that are kept for later epochs. align: for models whose tokenizers differ: chooses the tokens of each that carry
        loss, and may hand something over. Without it, their response tokens have to be equal. ids: of each encoder's
        model, how many its head is cut to: a sample with another response token cannot be used.
        """
        self.ids = dict(ids or {})
        self.folder, self.encoders, self.attach, self.align = folder, dict(encoders), attach, align
        self._kept: dict[int, tuple[dict[str, Encoded], Any]] = {}
        self._room = memory

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: SampleIndex) -> tuple[dict[str, Encoded], Any] | Rejected | Exception:
        """A sample, a Rejected, or an error that ends the job.

        The loader raises that error: if a worker raised it, torch would put the message inside a traceback.
        """
        try:
            return self._read(index)
        except (UserError, ShardError) as error:
            return error

    def _read(self, index: SampleIndex) -> tuple[dict[str, Encoded], Any] | Rejected:
        try:
            encoded, extra = self._kept.get(index.sample) or self._keep(index.sample)
            if self.attach is None:
                return encoded, extra
            ((role, only),) = encoded.items()
            only, extra = self.attach(index, only)
            return {role: only}, extra
        except SampleError as error:
            return Rejected.of(self.folder, index.sample, error)

    def encode(self, sample: int) -> dict[str, Encoded]:
        """A sample in each model's form, nothing attached. Raises SampleError where it cannot be used."""
        return self._encode(sample)[0]

    def _encode(self, sample: int) -> tuple[dict[str, Encoded], Any]:
        raw = read_sample(self.folder, sample)
        encoded = map_unique(lambda encoder: encoder(raw.key, raw.record["messages"], raw.images), self.encoders)
        if self.align is not None:
            return self.align(raw, encoded)
        first, *rest = encoded.values()
        if any(not torch.equal(first.response_ids, other.response_ids) for other in rest):
            raise SampleError("teacher and student tokenize the response differently (cut at max_length, most likely)")
        return encoded, None

    def _keep(self, sample: int) -> tuple[dict[str, Encoded], Any]:
        encoded, extra = self._encode(sample)
        for role, ids in self.ids.items():
            if (highest := int(encoded[role].response_ids.max())) >= ids:
                raise SampleError(f"the response has token {highest}; teacher and student share the first {ids} alone")
        size = encoded_nbytes(encoded)
        if size <= self._room:
            self._kept[sample] = encoded, extra
            self._room -= size
        return encoded, extra
