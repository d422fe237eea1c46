"""The teacher's pass for the cache: samples in batches of similar length, through the engine, to encoded arrays.

T response tokens, J cached layers, d width of the teacher, V common vocabulary (a mapped one: the student's ids and the
bucket).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.packing import to_device, to_numpy
from pipeline.codec.random import uniform
from pipeline.codec.registry import Codec
from pipeline.loss.bucket import bucket_mass
from pipeline.loss.chunks import rows_per_chunk
from pipeline.loss.fidelity import Measurement, measure
from pipeline.rows import row_states
from pipeline.runtime.data.batches import ChatDataset, LoadedBatch, SampleIndex
from pipeline.runtime.data.loader import (
    WINDOW,
    WINDOW_WORKERS,
    load,
    load_by_length,
    typical_nbytes,
    waiting_room,
    workers_within,
)
from pipeline.runtime.engine import Engine
from pipeline.runtime.loop import Job
from pipeline.runtime.node import Share, loader_workers, rank_share
from pipeline.signal import Unembedding
from pipeline.vocabulary_map import MappedHead, TeacherGroups, VocabularyMap

MEASURED = 1 / 128
"""Share of the response tokens whose coded distributions are compared with the dense ones."""


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's encoded distributions for a batch, still on the device."""

    codes: dict[str, Tensor]
    """The codec's arrays [T, J, ...]."""
    fidelity: Measurement
    """Their error against the dense distributions, measured on a few of the tokens."""
    bucket: Tensor | None = None
    """What `bucket_mass` returned, of all of the tokens; None for a shared vocabulary."""


class TeacherPass:
    """The teacher's engine and the dataset that it reads."""

    def __init__(
        self,
        job: Job,
        engine: Engine,
        dataset: ChatDataset,
        layers: tuple[int, ...],
        vocab: int,
        ids: VocabularyMap | None = None,
    ):
        """All ranks must call. ids: the teacher's as the student's, for a mapped vocabulary."""
        engine.eval()
        self.job, self.engine, self.dataset, self.layers = job, engine, dataset, layers
        self._groups = None if ids is None else TeacherGroups(ids, engine.device)
        self._rows = rows_per_chunk(vocab if ids is None else max(vocab, len(ids.class_of)))
        self.workers = window_workers(job.recipe.data.workers, dataset, rank_share())

    def batches(self, windows: Sequence[Sequence[SampleIndex]]) -> Iterator[list[LoadedBatch]]:
        """Windows of samples, each as its batches."""
        tokens = self.job.recipe.cache.batch_tokens
        return load_by_length(self.dataset, windows, tokens, self.workers, self.job.ranks.device)

    def encode_response(self, loaded: LoadedBatch, codec: Codec) -> TeacherOutput:
        """One forward:

        the distributions of every cached layer at the batch's response tokens, encoded. All ranks must call.
        """
        batch, seed = loaded.batches["teacher"], self.job.recipe.seed
        samples = list(zip(batch.keys, batch.counts, strict=True))
        nothing = np.zeros((0, len(self.layers)))
        drawn = np.concatenate([nothing, *(uniform(seed, "draw", key, self.layers, n) for key, n in samples)])
        chance = np.concatenate([nothing[:, :1], *(uniform(seed, "measure", key, (0,), n) for key, n in samples)])
        rows = torch.from_numpy(np.flatnonzero(chance < MEASURED))
        return self._forward(loaded, partial(encode_batch, codec, torch.from_numpy(drawn), rows, self._rows))

    def token_usage(self, loaded: LoadedBatch) -> np.ndarray:
        """One forward: [V] how much the layers use each id, as the sum of all their distributions."""
        return self._forward(loaded, partial(token_usage, self._rows)).cpu().numpy()

    def head(self) -> Unembedding | None:
        """The teacher's head, whole, on the CPU of rank 0; None elsewhere. All ranks must call."""
        return self._forward(self.empty_batch, partial(_head, self.job.ranks.first))

    @cached_property
    def empty_batch(self) -> LoadedBatch:
        """A batch without samples, for a rank that has none left but must take part."""
        (nothing,) = load(self.dataset, [[]], 0, self.job.ranks.device)
        return nothing

    def _forward(self, loaded: LoadedBatch, encode):
        batch = loaded.batches["teacher"].to(self.engine.device, self.engine.dtype)
        groups = self._groups
        if groups is None:
            return self.engine({"teacher": batch}, encode=encode)
        return self.engine({"teacher": batch}, encode=lambda hidden, head: encode(hidden, MappedHead.of(head, groups)))


def window_workers(asked: int | None, dataset: ChatDataset, share: Share) -> int:
    """Loader workers of a rank, each with a window waiting: as far as there is room for them. asked: data.workers."""
    workers = loader_workers(asked, share, WINDOW_WORKERS)
    if not workers:
        return 0
    spread = range(0, len(dataset), max(1, len(dataset) // WINDOW))
    return workers_within(waiting_room(share.ranks), WINDOW * typical_nbytes(dataset, spread), workers)


def stored_samples(
    loaded: LoadedBatch,
) -> Iterator[tuple[str, slice, np.ndarray, np.ndarray | None]]:
    """Each sample of a batch as its record has it: (key, its rows of the codec's arrays, token ids, places).

    The ids of a mapped vocabulary are the student's; of a shared one there are no places, see pack_record.
    """
    batch, end = loaded.batches["teacher"], 0
    for number, (key, count) in enumerate(zip(batch.keys, batch.counts, strict=True)):
        rows, end = slice(end, end + count), end + count
        supervised = loaded.attached[number] if loaded.attached else None
        if supervised is None:
            yield key, rows, batch.labels[rows].numpy(), None
        else:
            yield key, rows, supervised.tokens, supervised.places


def encode_batch(
    codec: Codec, drawn: Tensor, rows: Tensor, chunk: int, hidden: Tensor, unembedding: Unembedding
) -> TeacherOutput:
    """Encode a batch while the head is gathered. The measured rows are encoded to bytes and decoded again.

    Rows that are not finite are not measured: they cannot be encoded, and their samples will be skipped. Reading the
    measured rows' codes is the one place where the host waits for the device.
    """
    codes = codec.encode(hidden, unembedding, drawn, chunk)
    measured = to_device(rows, hidden.device)
    some = {name: to_numpy(array[measured]) for name, array in codes.items()}
    finite = codec.finite(some)
    rows, some = rows[torch.from_numpy(finite)], {name: array[finite] for name, array in some.items()}
    layers = hidden.shape[1]
    signal = (
        codec.decode(codec.unpack(codec.pack(some), len(rows), layers), unembedding, hidden.device)
        if len(rows)
        else codec.empty(layers, unembedding, hidden.device)
    )
    fidelity = measure(hidden[to_device(rows, hidden.device)], unembedding, signal)
    bucket = bucket_mass(hidden, unembedding, chunk) if isinstance(unembedding, MappedHead) else None
    return TeacherOutput(codes, fidelity, bucket)


def token_usage(chunk: int, hidden: Tensor, unembedding: Unembedding) -> Tensor:
    """Hidden states [T, J, d] -> [V] float64: each id's probability, summed over all finite rows."""
    total = torch.zeros(unembedding.vocab, dtype=torch.float64, device=hidden.device)
    for states in row_states(hidden, chunk):
        # A row that is not finite is left out: its NaN would become the use of every id.
        total += unembedding.logits(states).softmax(1).nan_to_num_(0.0).sum(0, dtype=torch.float64)
    return total


def _head(wanted: bool, hidden: Tensor, unembedding: Unembedding) -> Unembedding | None:
    """A copy on the CPU, where it is wanted: a head of 72B is 2.5 GB, and a node has many ranks."""

    def whole(tensor: Tensor) -> Tensor:
        return tensor[: unembedding.vocab].detach().to("cpu", copy=True)

    if not wanted:
        return None
    bias = None if unembedding.bias is None else whole(unembedding.bias)
    return replace(unembedding, weight=whole(unembedding.weight), bias=bias)
