"""Fidelity: how far cached signals are from the teacher's true distributions, measured on a few tokens.

J cached teacher layers (the last is the teacher's last), r measured tokens, V common vocabulary (of a mapped one: the
student's ids and the bucket), d width, S reference students.

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.loss.chunks import ACCELERATOR_CHUNK_ELEMENTS, CHUNK_ELEMENTS, row_chunks
from pipeline.loss.matching import draw_probabilities, search_ranges
from pipeline.signal import HiddenSignal, Signal, Unembedding
from pipeline.vocabulary_map import MappedHead

FLOATS_PER_LOGIT = 16
"""Memory for each logit of a chunk, in floats: at most eight float64 arrays [c, J, V] exist at the same time."""

SUMS = ("entropy", "mass", "kl_error", "kl_error_squared", "gradient_error_squared", "gradient_squared")
"""Names of the sums that each layer has."""

DRAWS = ("kl_true", "kl_cached")
"""Names of the sums that each reference student and candidate have."""


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
        matrices = {name: np.asarray(values[name], np.float64).reshape(shape) for name in DRAWS}
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


@dataclass(frozen=True, eq=False)
class Measurement:
    """The sums of some tokens, still on the device. Adding chunks to them waits for nothing."""

    tokens: Tensor
    """[] int64: number of tokens whose hidden states are finite."""
    layers: Tensor
    """[6, J] float64: the SUMS."""
    pairs: Tensor
    """[2, J, J] float64, nats: the true and the cached KL of each layer (row) to each as a student (column)."""

    def read(self) -> Fidelity:
        """The sums as numbers. Waits until the device has computed them."""
        sums, (true, cached) = self.layers.cpu().numpy(), self.pairs.cpu().numpy()
        draws = (_reference_students(pairs) for pairs in (true, cached))
        return Fidelity(int(self.tokens), **dict(zip(SUMS, sums, strict=True)), **dict(zip(DRAWS, draws, strict=True)))


def _reference_students(pairs: np.ndarray) -> np.ndarray:
    """KL of all pairs [J, J] -> of each reference student to the candidates in its search range [S, J - 1]."""
    candidates = len(pairs) - 1
    students = len(pairs) // 2  # every second of the first J - 1
    if students == candidates:
        return np.zeros((0, candidates))
    kl = np.zeros((students, candidates))
    for row, columns in enumerate(search_ranges(students, candidates)):
        kl[row, columns] = pairs[columns, 2 * row]
    return kl


@torch.no_grad()
def measure(hidden: Tensor, unembedding: Unembedding, signal: Signal) -> Measurement:
    """Measure fidelity from the teacher's hidden states and the cache's signal of the same tokens and layers.

    hidden: [r, J, d] normed verbalizer outputs. unembedding: the teacher's head. All must be on one device; nothing
    here waits for it. A token with a value that is not finite is left out, because the cache skips its sample. Raises
    ValueError for a signal of other tokens or layers, and for fewer than two layers, which leave no stand-in.
    """
    tokens, layers = hidden.shape[:2]
    found = (signal.hidden if isinstance(signal, HiddenSignal) else signal.ids).shape[:2]
    if found != (tokens, layers):
        raise ValueError(
            f"the cached signal has {found[0]} tokens and {found[1]} layers, the teacher has {tokens} and {layers}"
        )
    if layers < 2:
        raise ValueError("fidelity needs at least two cached layers: one stands in for the student of the other")
    usable = hidden.isfinite().flatten(1).all(1)
    sums = torch.zeros(len(SUMS), layers, dtype=torch.float64, device=hidden.device)
    pairs = torch.zeros(2, layers, layers, dtype=torch.float64, device=hidden.device)
    ids = unembedding.vocab + (unembedding.teacher.vocab if isinstance(unembedding, MappedHead) else 0)
    for rows in row_chunks(tokens, _rows_per_chunk(hidden, ids)):
        one, kl = _compare(hidden[rows], unembedding, signal.part(rows))
        sums += torch.where(usable[rows, None], one, 0.0).sum(1)
        pairs += torch.where(usable[rows, None, None], kl, 0.0).sum(1)
    return Measurement(usable.sum(), sums, pairs)


def _rows_per_chunk(hidden: Tensor, vocab: int) -> int:
    elements = CHUNK_ELEMENTS if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    return max(1, elements // (FLOATS_PER_LOGIT * hidden.shape[1] * vocab))


def _compare(hidden: Tensor, unembedding: Unembedding, signal: Signal) -> tuple[Tensor, Tensor]:
    """Compare c tokens, hidden [c, J, d]: each token's SUMS [6, c, J], and the KL of all pairs [2, c, J, J].

    All layers at once: the number of operations does not depend on J.
    """
    logits = unembedding.logits(hidden)
    stand_in = (torch.arange(hidden.shape[1], device=hidden.device) - 1).abs()  # 1, 0, 1, 2, ..., J - 2
    to_head = _gradient_at_products(hidden, logits, stand_in, unembedding)
    log_p = logits.double().log_softmax(-1)
    del logits
    p = log_p.exp()
    true, cached = _Targets(p, None, (p * log_p).sum(-1)), _cached_targets(signal, unembedding.vocab)
    rest = cached.rest(p)
    kl = torch.stack((true.kl(log_p, None), cached.kl(log_p, rest)))
    del log_p
    error = _at(kl[1] - kl[0], stand_in)
    mass = torch.where(cached.probs > 0, p, 0.0).sum(-1)
    norms = _squared_norms(true, cached, rest, stand_in, to_head, unembedding)
    return torch.stack((-true.neg_entropy, mass, error, error.square(), *norms)), kl


@dataclass(frozen=True)
class _Targets:
    """The distributions of c tokens and J teacher layers over all V ids, and the KL to students' distributions."""

    probs: Tensor
    """[c, J, V] float64; 0 for ids that are not stored."""
    tail: Tensor | None
    """[c, J] float64: total probability of the ids that are not stored; None where there is none."""
    neg_entropy: Tensor
    """[c, J] float64, nats."""

    def rest(self, q: Tensor) -> Tensor | None:
        """Each student's [c, S, V] total probability of the ids that a layer does not store [c, J, S]; with a tail."""
        if self.tail is None:
            return None
        not_stored = (self.probs == 0).to(q.dtype) @ q.mT
        return not_stored.clamp_min(torch.finfo(q.dtype).tiny)  # 0 where every id is stored: its logarithm is finite

    def kl(self, log_q: Tensor, rest: Tensor | None) -> Tensor:
        """The KL [c, J, S] in nats of each layer to each student, from log q [c, S, V] and `rest` of q."""
        kl = self.neg_entropy[..., None] - self.probs @ log_q.mT
        return kl if self.tail is None or rest is None else kl - self.tail[..., None] * rest.log()

    def gradient(self, q: Tensor, rest: Tensor | None) -> Tensor:
        """The gradient [c, J, V] at the logits of one student for each layer, from its q and `rest` [c, J].

        The tail is distributed over its ids in proportion to q.
        """
        total = self.probs.sum(-1)
        if self.tail is None or rest is None:
            return (total[..., None] * q).sub_(self.probs)
        spread = torch.where(self.probs > 0, self.probs, (self.tail / rest)[..., None] * q)
        return ((total + self.tail)[..., None] * q).sub_(spread)


def _cached_targets(signal: Signal, vocab: int) -> _Targets:
    if isinstance(signal, HiddenSignal):
        log_p = signal.unembedding.logits(signal.hidden).double().log_softmax(-1)
        p = log_p.exp()
        return _Targets(p, None, (p * log_p).sum(-1))
    shape = (*signal.ids.shape[:2], vocab)
    dense = torch.zeros(shape, dtype=torch.float64, device=signal.ids.device)
    dense.scatter_add_(2, signal.ids, signal.probs.double())
    return _Targets(dense, signal.tail.double() if signal.has_tail else None, signal.neg_entropy.double())


def _squared_norms(
    true: _Targets,
    cached: _Targets,
    rest: Tensor | None,
    stand_in: Tensor,
    to_head: Callable[[Tensor], Tensor],
    unembedding: Unembedding,
) -> Tensor:
    """Squared norms [2, c, J] of the gradients at the stand-ins' head inputs: of the cache's error, and the true one.

    They are subtracted before the product with the weight: the difference of two low-precision products would be
    rounding.
    """
    q = true.probs.index_select(1, stand_in)
    gradient = true.gradient(q, None)
    error = cached.gradient(q, None if rest is None else _at(rest, stand_in)).sub_(gradient)
    del q
    both = torch.stack([to_head(one).to(unembedding.weight.dtype) for one in (error, gradient)])
    return (both @ unembedding.weight[: both.shape[-1]]).double().square().sum(-1)


def _at(pairs: Tensor, columns: Tensor) -> Tensor:
    """Pairs [c, J, S] -> for each of the J layers, its entry in one of the columns [J]: [c, J]."""
    return pairs.gather(2, columns[None, :, None].expand(len(pairs), -1, 1))[..., 0]


def _gradient_at_products(
    hidden: Tensor, logits: Tensor, stand_in: Tensor, unembedding: Unembedding
) -> Callable[[Tensor], Tensor]:
    """From a gradient at the stand-ins' logits [c, J, V] to that at the products h W^T + b, whose rows are W's."""
    if not isinstance(unembedding, MappedHead):
        slope = _slope(logits, stand_in, unembedding)
        return lambda gradient: gradient * slope
    own = unembedding.teacher.logits(hidden)
    own_slope, at_stand_in = _slope(own, stand_in, unembedding), own.index_select(1, stand_in)
    return lambda gradient: unembedding.at_teacher_ids(gradient, at_stand_in) * own_slope


def _slope(logits: Tensor, stand_in: Tensor, unembedding: Unembedding) -> Tensor | float:
    """The derivative of scale and soft-cap at the stand-ins, from the capped logits: a number, or [c, J, V]."""
    if unembedding.softcap is None:
        return unembedding.scale
    return unembedding.scale * (1 - (logits.index_select(1, stand_in).double() / unembedding.softcap).square())


def _ratio(total: float, count: float) -> float | None:
    return float(total) / float(count) if count else None
