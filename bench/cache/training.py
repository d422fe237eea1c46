"""A short training test: what share of the dense teacher's gain does a student get from a coded teacher?

One student layer follows one teacher layer, as in the interaction step. An adapter on the student layer's output is
trained on the KL to the coded teacher, through the layer's frozen verbalizer, with the project's own loss. Then the
dense KL is measured on held-out tokens. Batches, adapter and number of updates are the same for all codecs.

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
from pipeline.vlm.verb_ffns import initial_verb_ffns
from pipeline.vlm.verbalizer import VerbFFN

BATCH = 256
UPDATES = 36
LEARNING_RATE = 3e-3
"""The one of 1e-3, 3e-3 and 1e-2 with the largest gain from the dense teacher."""
NORM_EPSILON = 1e-5

TeacherSignal = Callable[[int, Tensor], Signal]
"""(epoch from 0, rows of the training tokens) -> the coded teacher's signal there, J = 1."""


@dataclass(frozen=True)
class Schedule:
    """Training length: the first `tokens` training tokens are repeated until `updates` updates are done."""

    tokens: int = UPDATES * BATCH
    updates: int = UPDATES


def constant_signal(signal: Signal) -> TeacherSignal:
    """The same signal in every epoch."""
    return lambda epoch, rows: signal.part(rows)


def coded_signal(outputs: LayerOutputs, codec: Codec, tokens: int, seed: int) -> Signal:
    """The followed layer's distributions on the first training tokens, after coding."""
    arrays = encoded(codec, outputs.train_teacher[:tokens, None], outputs.unembedding, seed)
    return codec.decode(read_back(codec, arrays), outputs.unembedding)


def dense_signal(outputs: LayerOutputs) -> Signal:
    """The followed layer's exact distributions."""
    return HiddenSignal(outputs.train_teacher[:, None], outputs.unembedding)


def rotating_subsets(outputs: LayerOutputs, codec: Sampled, points: int, tokens: int, seed: int) -> TeacherSignal:
    """A different part of the stored points in each epoch, as in stage 2."""
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
    """Student layer with a trainable adapter: hidden states -> normed verbalizer output. Only the adapter trains."""

    def __init__(self, outputs: LayerOutputs, seed: int):
        super().__init__()
        width = outputs.norm_weight.shape[0]
        self.adapter = initial_verb_ffns((0,), width, "residual", torch.float32, seed)["0"]
        self.verb_ffn = VerbFFN(width)
        self.verb_ffn.load_state_dict(outputs.follower)
        self.verb_ffn.requires_grad_(False)
        self.register_buffer("norm_weight", outputs.norm_weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, d] -> normed verbalizer output [T, d]."""
        verbalized = self.verb_ffn(self.adapter(hidden))
        return F.rms_norm(verbalized, self.norm_weight.shape, self.norm_weight, NORM_EPSILON)


def train(outputs: LayerOutputs, teacher: TeacherSignal, schedule: Schedule, seed: int) -> float:
    """Train from this teacher signal; returns the held-out dense KL in nats."""
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
    """The decrease of held-out KL as a share of the dense teacher's decrease; one number per seed."""
    shares = [(start - end) / (start - best) for end, best in zip(ends, dense_ends, strict=True)]
    error = stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None
    return {
        "mean": sum(shares) / len(shares),
        "standard_error": error,
        "each": shares,
        "start_nats": start,
        "end_nats": ends,
    }
