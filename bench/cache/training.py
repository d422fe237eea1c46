"""A short training test: how much of what the dense teacher teaches does a student learn from a coded one?

One student layer follows one teacher layer, as in the interaction step: an adapter on the student layer's output is
trained on the KL to the coded teacher, through the layer's frozen verbalizer, with the project's own loss; then the
dense KL is taken on held-out tokens. Batches, adapter and the number of updates are the same for all codecs.

T training tokens, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cache.layer_outputs import LayerOutputs
from bench.cache.size import encoded, read_back
from pipeline.codec.registry import Codec
from pipeline.codec.sampled import Sampled, every_nth
from pipeline.loss.sparse_kl import column_kl
from pipeline.signal import HiddenSignal, Signal, Unembedding
from pipeline.vlm.verbalizer import VerbFFN, initial_verb_ffns

BATCH = 256
UPDATES = 36
LEARNING_RATE = 3e-3
"""Of 1e-3, 3e-3 and 1e-2 the one that the dense teacher teaches most with."""
NORM_EPSILON = 1e-5

TeacherSignal = Callable[[int, Tensor], Signal]
"""(epoch from 0, rows of the training tokens) -> what the coded teacher says there, J = 1."""


@dataclass(frozen=True)
class Schedule:
    """What a student is trained on: the first `tokens` training tokens, again and again for UPDATES updates."""

    tokens: int = UPDATES * BATCH
    updates: int = UPDATES


def constant_signal(signal: Signal) -> TeacherSignal:
    """The same words in every epoch."""
    return lambda epoch, rows: signal.part(rows)


def coded_signal(outputs: LayerOutputs, codec: Codec, tokens: int, seed: int) -> Signal:
    """What a codec keeps of the followed layer's words about the first training tokens."""
    arrays = encoded(codec, outputs.train_teacher[:tokens, None], outputs.unembedding, seed)
    return codec.decode(read_back(codec, arrays), outputs.unembedding)


def dense_signal(outputs: LayerOutputs) -> Signal:
    """The followed layer's words themselves."""
    return HiddenSignal(outputs.train_teacher[:, None], outputs.unembedding)


def rotating_subsets(outputs: LayerOutputs, codec: Sampled, points: int, tokens: int, seed: int) -> TeacherSignal:
    """Of stored points other ones in each epoch, as stage 2 takes them."""
    arrays = read_back(codec, encoded(codec, outputs.train_teacher[:tokens, None], outputs.unembedding, seed))
    n = codec.points // points
    first = np.random.default_rng(seed).integers(n, size=(tokens, 1))
    signals = [codec.decode(every_nth(arrays, n, (first + epoch) % n)) for epoch in range(n)]
    return lambda epoch, rows: signals[epoch % n].part(rows)


def redrawn_every_epoch(outputs: LayerOutputs, codec: Sampled, tokens: int, epochs: int, seed: int) -> TeacherSignal:
    """A new sample in each epoch, as a live teacher would give."""
    signals = [coded_signal(outputs, codec, tokens, epochs * seed + epoch) for epoch in range(epochs)]
    return lambda epoch, rows: signals[epoch].part(rows)


class AdaptedLayer(nn.Module):
    """Hidden states of the student layer to its normed verbalizer output; only the adapter trains."""

    def __init__(self, outputs: LayerOutputs, seed: int):
        super().__init__()
        width = outputs.norm_weight.shape[0]
        self.adapter = initial_verb_ffns((0,), width, "residual", torch.float32, seed)["0"]
        self.verb_ffn = VerbFFN(width)
        self.verb_ffn.load_state_dict(outputs.follower)
        self.verb_ffn.requires_grad_(False)
        self.register_buffer("norm_weight", outputs.norm_weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, d] -> [T, d]."""
        verbalized = self.verb_ffn(self.adapter(hidden))
        return F.rms_norm(verbalized, self.norm_weight.shape, self.norm_weight, NORM_EPSILON)


def train(outputs: LayerOutputs, teacher: TeacherSignal, schedule: Schedule, seed: int) -> float:
    """Held-out dense KL in nats after training from this teacher."""
    layer = AdaptedLayer(outputs, seed)
    head = Unembedding(outputs.student_weight.bfloat16(), vocab=len(outputs.student_weight))
    optimizer = torch.optim.AdamW(layer.adapter.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[tuple[int, Tensor]] = []
    while len(order) < schedule.updates:
        epoch = len(order) * BATCH // schedule.tokens
        order += [(epoch, rows) for rows in torch.randperm(schedule.tokens, generator=generator).split(BATCH)]
    for update, (epoch, rows) in enumerate(order[: schedule.updates]):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - update / schedule.updates)
        loss = column_kl(layer(outputs.train_student[rows]), head, teacher(epoch, rows), 0) / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return held_out_kl(outputs, layer)


@torch.no_grad()
def held_out_kl(outputs: LayerOutputs, layer: AdaptedLayer) -> float:
    """Dense KL on the evaluation tokens, in nats."""
    hidden = layer(outputs.eval_student)
    signal = HiddenSignal(outputs.teacher[:, outputs.followed : outputs.followed + 1], outputs.unembedding)
    return float(column_kl(hidden, outputs.student_unembedding, signal, 0)) / len(hidden)


def share_of_gain(start: float, ends: list[float], dense_ends: list[float]) -> dict[str, Any]:
    """Of the fall in held-out KL that the dense teacher brings, the share that this one does; one number a seed."""
    shares = [(start - end) / (start - best) for end, best in zip(ends, dense_ends, strict=True)]
    error = stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None
    return {
        "mean": sum(shares) / len(shares),
        "standard_error": error,
        "each": shares,
        "start_nats": start,
        "end_nats": ends,
    }
