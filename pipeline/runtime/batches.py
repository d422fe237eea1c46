"""Which samples form which global batch, and how a rank loads its part.

The order is a function of (seed, position) alone: neither the number of ranks nor of loader workers changes it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data_prep.shards import ShardFolder
from pipeline.errors import DataError, SampleError
from pipeline.recipe import Training
from pipeline.runtime.ranks import Ranks
from pipeline.vlm.processing import Batch, ChatEncoder, Encoded, collate


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from (seed, purpose, numbers...), the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class DataOrder:
    """The endless stream of sample indices: each epoch is one permutation of all samples, drawn from (seed, epoch)."""

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> int:
        """The sample at a position of the stream, from 0."""
        epoch, place = divmod(position, self.samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.samples, generator=generator)
        return int(self._order[place])


def micro_batches(
    order: DataOrder, training: Training, first_update: int, last_update: int, ranks: Ranks
) -> Iterator[list[int]]:
    """This rank's sample indices, micro-step after micro-step, for updates first_update .. last_update - 1."""
    micro = training.micro_batch_size
    for update in range(first_update, last_update):
        start = update * training.batch_size
        for position in range(start + ranks.rank * micro, start + training.batch_size, ranks.world * micro):
            yield [order[position + i] for i in range(micro)]


@dataclass(frozen=True)
class Rejected:
    """A sample that could not be used."""

    key: str
    shard: str
    reason: str


@dataclass(frozen=True)
class Loaded:
    """A micro-batch as the loader hands it over."""

    batches: Mapping[str, Batch]
    """One batch for each encoder, such as {"teacher": ..., "student": ...}."""
    attached: list[Any]
    """What `attach` gave for each used sample, in order."""
    rejected: list[Rejected] = field(default_factory=list)
    """Samples of this micro-batch left out."""

    def tokens(self) -> int:
        """Response tokens of the micro-batch."""
        return len(next(iter(self.batches.values())).labels)


class Chats(Dataset):
    """A shard folder's samples, encoded for each model that reads them."""

    def __init__(
        self,
        folder: ShardFolder,
        encoders: Mapping[str, ChatEncoder],
        attach: Callable[[int, Encoded], Any] | None = None,
    ):
        """attach(index, encoded) gives what travels with a sample, such as its record in the teacher cache."""
        self.folder, self.encoders, self.attach = folder, dict(encoders), attach

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[dict[str, Encoded], Any] | Rejected:
        raw = self.folder.read(index)
        try:
            encoded = self._encode(raw)
            return encoded, self.attach(index, next(iter(encoded.values()))) if self.attach else None
        except SampleError as error:
            shard = next(s.name for s in reversed(self.folder.shards) if s.first <= index)
            return Rejected(raw.key, shard, str(error))

    def _encode(self, raw: Any) -> dict[str, Encoded]:
        done: dict[int, Encoded] = {}
        for encoder in self.encoders.values():
            if id(encoder) not in done:  # models with one processor share the work
                done[id(encoder)] = encoder(raw.key, raw.record["messages"], raw.images)
        encoded = {role: done[id(encoder)] for role, encoder in self.encoders.items()}
        first, *rest = encoded.values()
        if any(not torch.equal(first.response_ids, other.response_ids) for other in rest):
            raise SampleError("teacher and student tokenize the response differently (cut at max_length, most likely)")
        return encoded


def load(
    chats: Chats, indices: Sequence[Sequence[int]] | Iterator[list[int]], workers: int, device: str
) -> Iterator[Loaded]:
    """Load micro-batches of the given indices, in order, in worker processes."""
    fillers = {role: encoder.filler() for role, encoder in chats.encoders.items()}
    pads = {role: _pad_id(encoder) for role, encoder in chats.encoders.items()}
    return iter(
        DataLoader(
            chats,
            batch_sampler=indices,  # type: ignore[arg-type]  # any iterable of index lists
            num_workers=workers,
            collate_fn=functools.partial(_merge, fillers=fillers, pads=pads),
            pin_memory=device != "cpu",
        )
    )


class BadSamples:
    """Counts what could not be used: read = used + rejected."""

    def __init__(self, largest_share: float):
        self.largest_share, self.read, self.rejected = largest_share, 0, 0

    def count(self, read: int, rejected: Sequence[Rejected]) -> None:
        """Add a global batch. Raises DataError when too large a share is bad; the first 100 samples are forgiven 1."""
        self.read += read
        self.rejected += len(rejected)
        allowed = max(1, self.largest_share * max(self.read, 100))
        if self.rejected > allowed:
            newest = rejected[-1]
            raise DataError(
                f"{self.rejected} of {self.read} samples could not be used, more than data.max_bad_share="
                f"{self.largest_share}; the last: {newest.key} in {newest.shard}: {newest.reason}. "
                "See rejects.jsonl in the run folder, and python -m data_prep lint"
            )


def _merge(samples: list[Any], fillers: Mapping[str, Encoded], pads: Mapping[str, int]) -> Loaded:
    used = [sample for sample in samples if not isinstance(sample, Rejected)]
    batches = {
        role: collate([encoded[role] for encoded, _ in used], filler, pads[role]) for role, filler in fillers.items()
    }
    rejected = [sample for sample in samples if isinstance(sample, Rejected)]
    return Loaded(batches, [extra for _, extra in used], rejected)


def _pad_id(encoder: ChatEncoder) -> int:
    tokenizer = encoder.processor.tokenizer
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
