"""Fidelity: how far cached signals are from the teacher's true distributions, measured on a few tokens.

J cached teacher layers (the last is the teacher's last), r measured tokens, V common vocabulary, d width, S reference
students.

The errors that matter are those of a student's loss, but a cache job has no student in memory. So a teacher layer
stands in for the student that would follow layer j: the cached layer below it (above it, for the lowest). It is assumed
to be as far from layer j as a student layer typically is. With p the teacher's distribution and q the stand-in's, for
one token:

    true    = (p * (log_p - log_q)).sum()
    cached  = neg_entropy - (w * log_q).sum() - tail * log_q[rest].logsumexp()  # w: stored probabilities, in V places
    error   = cached - true
    slope   = scale * (1 - (logits_q / softcap) ** 2)
    gradient_true   = (slope * (q - p)) @ W
    gradient_cached = (slope * (total * q - w - tail * softmax(log_q over the rest))) @ W  # total = w.sum() + tail

These are the definitions of `sparse_kl`, computed densely in float64, without its lower bound of the student's tail.

Algorithm 1's draw probabilities are compared too. Every second of the first J - 1 layers is a reference student there,
and all of these layers are candidates. So a reference student is among its own candidates, at a true KL of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.loss.chunks import rows_per_chunk
from pipeline.loss.matching import draw_probabilities, search_ranges
from pipeline.signal import HiddenSignal, Signal, Unembedding

FLOATS_PER_LOGIT = 8
"""Memory for each logit of a chunk, in floats: the float64 log-probabilities and the temporaries of one layer."""

SUMS = ("entropy", "mass", "kl_error", "kl_error_squared", "gradient_error_squared", "gradient_squared")
"""Names of the sums that each layer has."""


@dataclass(frozen=True, eq=False)
class Fidelity:
    """Sums over measured tokens, in float64. `+` adds those of two batches, shards or jobs."""

    tokens: int
    """Number of measured tokens."""
    entropy: np.ndarray
    """[J] nats: entropy of the true distribution."""
    mass: np.ndarray
    """[J] true total probability of the stored ids."""
    kl_error: np.ndarray
    """[J] nats: KL from the cache minus the true KL."""
    kl_error_squared: np.ndarray
    """[J] nats^2: the same error, squared for each token."""
    gradient_error_squared: np.ndarray
    """[J] squared norm of the error of the gradient at the head's input."""
    gradient_squared: np.ndarray
    """[J] squared norm of the true gradient at the head's input."""
    kl_true: np.ndarray
    """[S, J - 1] nats: true KL of each reference student to its candidates; 0 outside its search range."""
    kl_cached: np.ndarray
    """[S, J - 1] nats: the same, from the cache."""

    def __add__(self, other: Fidelity) -> Fidelity:
        """The sums over both sets of tokens. Raises ValueError where the numbers of layers differ."""
        if self.entropy.shape != other.entropy.shape:
            raise ValueError(f"fidelity of {len(self.entropy)} layers cannot be added to that of {len(other.entropy)}")
        return Fidelity(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def to_json(self) -> dict[str, Any]:
        """The sums as numbers and lists, with all digits."""
        arrays = {field.name: getattr(self, field.name).tolist() for field in fields(self) if field.name != "tokens"}
        return {"tokens": self.tokens, **arrays}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Fidelity:
        """The inverse of `to_json`. Raises KeyError where a sum is missing."""
        sums = {name: np.asarray(values[name], np.float64) for name in SUMS}
        shape = (-1, len(sums["entropy"]) - 1)  # an empty list of students does not determine it
        matrices = {name: np.asarray(values[name], np.float64).reshape(shape) for name in ("kl_true", "kl_cached")}
        return cls(int(values["tokens"]), **sums, **matrices)

    def summary(self) -> dict[str, Any]:
        """Means over tokens: {"tokens", "layers": one dict for each layer, lowest first, "draw_tv"}.

        A layer has entropy, kl_bias and kl_rms (nats; kl_rms is over single tokens), mass, and gradient_error
        (relative, over single tokens: sqrt(sum of squared errors / sum of squared true norms)). A value is None where
        no token was measured.
        """
        return {
            "tokens": self.tokens,
            "layers": [self._layer(j) for j in range(len(self.entropy))],
            "draw_tv": self.draw_tv(),
        }

    def _layer(self, j: int) -> dict[str, float | None]:
        squared = _ratio(self.kl_error_squared[j], self.tokens)
        relative = _ratio(self.gradient_error_squared[j], self.gradient_squared[j])
        return {
            "entropy": _ratio(self.entropy[j], self.tokens),
            "mass": _ratio(self.mass[j], self.tokens),
            "kl_bias": _ratio(self.kl_error[j], self.tokens),
            "kl_rms": None if squared is None else squared**0.5,
            "gradient_error": None if relative is None else relative**0.5,
        }

    def draw_tv(self) -> float | None:
        """Total variation distance between Algorithm 1's draw probabilities from the cached and from the true mean KL.

        It is the mean over the reference students. Each one draws from its whole search range. None where there is no
        token or no student.
        """
        students, teachers = self.kl_true.shape
        if not self.tokens or not students:
            return None
        distances = []
        for row, columns in enumerate(search_ranges(students, teachers)):
            true, cached = (
                draw_probabilities(torch.from_numpy(kl[row, columns.start : columns.stop] / self.tokens))
                for kl in (self.kl_true, self.kl_cached)
            )
            distances.append(float((true - cached).abs().sum()) / 2)
        return sum(distances) / students


@torch.no_grad()
def measure(hidden: Tensor, unembedding: Unembedding, signal: Signal) -> Fidelity:
    """Measure fidelity from the teacher's hidden states and the cache's signal of the same tokens and layers.

    hidden: [r, J, d] normed verbalizer outputs. unembedding: the teacher's head. All must be on one device. A token
    with a value that is not finite is left out, because the cache skips its sample. Raises ValueError for a signal of
    other tokens or layers, and for fewer than two layers, which leave no stand-in.
    """
    tokens, layers = hidden.shape[:2]
    found = (signal.hidden if isinstance(signal, HiddenSignal) else signal.ids).shape[:2]
    if found != (tokens, layers):
        raise ValueError(
            f"the cached signal has {found[0]} tokens and {found[1]} layers, the teacher has {tokens} and {layers}"
        )
    if layers < 2:
        raise ValueError("fidelity needs at least two cached layers: one stands in for the student of the other")
    students = layers // 2  # every second of the first J - 1
    window = search_ranges(students, layers - 1) if students < layers - 1 else []
    sums = torch.zeros(len(SUMS), layers, dtype=torch.float64, device=hidden.device)
    matrices = torch.zeros(2, len(window), layers - 1, dtype=torch.float64, device=hidden.device)
    usable = hidden.isfinite().flatten(1).all(1).nonzero()[:, 0]
    for rows in usable.split(rows_per_chunk(FLOATS_PER_LOGIT * layers * unembedding.vocab)):
        _add_chunk(sums, matrices, window, hidden[rows], unembedding, signal.part(rows))
    kl_true, kl_cached = matrices.cpu().numpy()
    named = dict(zip(SUMS, sums.cpu().numpy(), strict=True))
    return Fidelity(len(usable), **named, kl_true=kl_true, kl_cached=kl_cached)


def _add_chunk(
    sums: Tensor, matrices: Tensor, window: Sequence[range], hidden: Tensor, unembedding: Unembedding, signal: Signal
) -> None:
    """Add c tokens, hidden [c, J, d], into sums [6, J] and matrices [2, S, J - 1]."""
    logits = unembedding.logits(hidden)
    log_p = logits.double().log_softmax(-1)
    weight = unembedding.weight[: unembedding.vocab]
    gradients = []
    for j in range(hidden.shape[1]):
        stand_in = j - 1 if j else 1
        log_q, slope = log_p[:, stand_in], _slope(logits[:, stand_in], unembedding)
        true, cached = _exact_target(log_p[:, j]), _cached_target(signal, j, unembedding.vocab)
        error = cached.kl(log_q) - true.kl(log_q)
        mass = torch.where(cached.probs > 0, true.probs, 0.0).sum(1)
        sums[:4, j] += torch.stack((-true.neg_entropy, mass, error, error.square())).sum(1)
        true_gradient = true.gradient(log_q)
        gradient_error = cached.gradient(log_q) - true_gradient
        # Subtract before the product with the weight: the difference of two low-precision products would be rounding.
        gradients += [(gradient * slope).to(weight.dtype) for gradient in (gradient_error, true_gradient)]
        for row, columns in enumerate(window):
            if j in columns:
                student = log_p[:, 2 * row]
                matrices[:, row, j] += torch.stack((true.kl(student), cached.kl(student))).sum(1)
    norms = (
        (torch.cat(gradients) @ weight).double().square().sum(1)
    )  # one product for all layers: products of few rows are slow
    sums[4:] += norms.view(hidden.shape[1], 2, len(hidden)).sum(2).T


@dataclass(frozen=True)
class _DenseTarget:
    """One teacher layer's distributions of c tokens over all V ids, and the KL to a student's log q [c, V]."""

    probs: Tensor
    """[c, V] float64; 0 for ids that are not stored."""
    tail: Tensor
    """[c, 1] float64: total probability of the ids that are not stored."""
    neg_entropy: Tensor
    """[c] float64, nats."""

    def kl(self, log_q: Tensor) -> Tensor:
        """The KL [c] in nats."""
        kl = self.neg_entropy - (self.probs * log_q).sum(-1)
        if self.tail.any():
            kl -= torch.where(self.tail > 0, self.tail * self._rest(log_q), 0.0)[:, 0]
        return kl

    def gradient(self, log_q: Tensor) -> Tensor:
        """The gradient [c, V] at the student's logits. The tail is distributed over its ids in proportion to q."""
        target = self.probs
        if self.tail.any():
            target = torch.where(target > 0, target, self.tail * (log_q - self._rest(log_q)).exp())
        return (self.probs.sum(-1, keepdim=True) + self.tail) * log_q.exp() - target

    def _rest(self, log_q: Tensor) -> Tensor:
        """[c, 1] log of the student's total probability of the ids that are not stored."""
        return log_q.masked_fill(self.probs > 0, -torch.inf).logsumexp(-1, keepdim=True)


def _exact_target(log_p: Tensor) -> _DenseTarget:
    p = log_p.exp()
    return _DenseTarget(p, torch.zeros_like(p[:, :1]), (p * log_p).sum(-1))


def _cached_target(signal: Signal, column: int, vocab: int) -> _DenseTarget:
    if isinstance(signal, HiddenSignal):
        return _exact_target(signal.unembedding.logits(signal.hidden[:, column]).double().log_softmax(-1))
    ids, probs = signal.ids[:, column], signal.probs[:, column].double()
    dense = torch.zeros(len(ids), vocab, dtype=torch.float64, device=ids.device).scatter_add_(1, ids, probs)
    return _DenseTarget(dense, signal.tail[:, column, None].double(), signal.neg_entropy[:, column].double())


def _slope(logits: Tensor, unembedding: Unembedding) -> Tensor | float:
    """The derivative of scale and soft-cap: a number, or [c, V] from the capped logits [c, V]."""
    if unembedding.softcap is None:
        return unembedding.scale
    return unembedding.scale * (1 - (logits.double() / unembedding.softcap).square())


def _ratio(total: float, count: float) -> float | None:
    return float(total) / float(count) if count else None
