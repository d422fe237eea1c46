"""How true a cached signal is: each layer's own distribution against what the cache holds of it, on a few tokens.

J cached teacher layers (the last is the teacher's last), r tokens measured, V common vocabulary, d width, S reference
students. A cache job has no student in memory, yet the errors that matter are those of a student's loss. So a teacher
layer stands in for the student that would follow layer j: the cached layer below it (above, for the lowest), taken to
be as far from layer j as a student layer typically is. With p the teacher's distribution and q the stand-in's, a token:

    true    = (p * (log_p - log_q)).sum()
    cached  = neg_entropy - (w * log_q).sum() - tail * log_q[rest].logsumexp()  # w: stored probabilities, in V places
    error   = cached - true
    slope   = scale * (1 - (logits_q / softcap) ** 2)
    gradient_true   = (slope * (q - p)) @ W
    gradient_cached = (slope * (total * q - w - tail * softmax(log_q over the rest))) @ W  # total = w.sum() + tail

These are the definitions of `sparse_kl`, made densely and in float64, without its floor under the student's tail.

Algorithm 1's draw is compared with every second of the first J - 1 layers as a student, and all of these as candidates.
A stand-in is then among its own candidates, at a true KL of 0.
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

HELD = 8
"""Floats of memory for each logit of a chunk: the log-probabilities in float64, and what one layer's errors take."""

SUMS = ("entropy", "mass", "kl_error", "kl_error_squared", "gradient_error_squared", "gradient_squared")
"""Of each layer."""


@dataclass(frozen=True, eq=False)
class Fidelity:
    """Sums over measured tokens, float64: those of two batches, shards or jobs are added with `+`."""

    tokens: int
    entropy: np.ndarray
    """[J] nat, of the true distribution."""
    mass: np.ndarray
    """[J] true probability of the stored ids."""
    kl_error: np.ndarray
    """[J] nat: KL from the cache less the true one."""
    kl_error_squared: np.ndarray
    """[J] nat^2."""
    gradient_error_squared: np.ndarray
    """[J] squared norm, at the head's input, of the gradient's error."""
    gradient_squared: np.ndarray
    """[J] squared norm of the true gradient."""
    kl_true: np.ndarray
    """[S, J - 1] nat: true KL of each reference student to its candidates, 0 outside its search range."""
    kl_cached: np.ndarray
    """[S, J - 1] nat: the same from the cache."""

    def __add__(self, other: Fidelity) -> Fidelity:
        """Both tokens' sums. Raises ValueError where the two have different numbers of layers."""
        if self.entropy.shape != other.entropy.shape:
            raise ValueError(f"fidelity of {len(self.entropy)} layers cannot be added to that of {len(other.entropy)}")
        return Fidelity(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists, every digit kept."""
        arrays = {field.name: getattr(self, field.name).tolist() for field in fields(self) if field.name != "tokens"}
        return {"tokens": self.tokens, **arrays}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Fidelity:
        """What `to_json` wrote. Raises KeyError where a sum is missing."""
        sums = {name: np.asarray(values[name], np.float64) for name in SUMS}
        shape = (-1, len(sums["entropy"]) - 1)  # a list of no students does not tell
        matrices = {name: np.asarray(values[name], np.float64).reshape(shape) for name in ("kl_true", "kl_cached")}
        return cls(int(values["tokens"]), **sums, **matrices)

    def summary(self) -> dict[str, Any]:
        """{"tokens", "layers": one dict a layer, lowest first, "draw_tv"}: means over tokens, None where none are.

        A layer has entropy, mass, kl_bias, kl_rms (nat, over single tokens) and gradient_error (relative, over single
        tokens: sqrt(sum of squared errors / sum of squared true norms)).
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
        """Total variation between Algorithm 1's draws from the cached and from the true mean KL, mean over students.

        Each student draws from its whole search range. None where there is no token or no student.
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
    """hidden [r, J, d] (normed verbalizer outputs), the teacher's head, and the cache's signal of the same r and J.

    All on one device. A token with a number that is not finite is left out: the cache skips its sample. Raises
    ValueError for a signal of other tokens or layers, and for fewer than two layers, where no stand-in is to be had.
    """
    said = signal.hidden if isinstance(signal, HiddenSignal) else signal.ids
    tokens, layers = hidden.shape[:2]
    if said.shape[:2] != (tokens, layers):
        raise ValueError(
            f"the cache speaks of {said.shape[0]} tokens and {said.shape[1]} layers, "
            f"the teacher of {tokens} and {layers}"
        )
    if layers < 2:
        raise ValueError("fidelity needs two cached layers at least: one stands in for the student of the other")
    students = layers // 2  # every second of the first J - 1
    window = search_ranges(students, layers - 1) if students < layers - 1 else []
    sums = torch.zeros(len(SUMS), layers, dtype=torch.float64, device=hidden.device)
    matrices = torch.zeros(2, len(window), layers - 1, dtype=torch.float64, device=hidden.device)
    usable = hidden.isfinite().flatten(1).all(1).nonzero()[:, 0]
    for rows in usable.split(rows_per_chunk(HELD * layers * unembedding.vocab)):
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
        below = j - 1 if j else 1
        log_q, slope = log_p[:, below], _slope(logits[:, below], unembedding)
        true, cached = _exact(log_p[:, j]), _stored(signal, j, unembedding.vocab)
        error = cached.kl(log_q) - true.kl(log_q)
        mass = torch.where(cached.probs > 0, true.probs, 0.0).sum(1)
        sums[:4, j] += torch.stack((-true.neg_entropy, mass, error, error.square())).sum(1)
        right = true.gradient(log_q)
        # The difference first, the product after: in a low-precision weight's dtype two products would not cancel.
        gradients += [(gradient * slope).to(weight.dtype) for gradient in (cached.gradient(log_q) - right, right)]
        for row, columns in enumerate(window):
            if j in columns:
                student = log_p[:, 2 * row]
                matrices[:, row, j] += torch.stack((true.kl(student), cached.kl(student))).sum(1)
    norms = (torch.cat(gradients) @ weight).double().square().sum(1)  # one product: with few rows it is slow
    sums[4:] += norms.view(hidden.shape[1], 2, len(hidden)).sum(2).T


@dataclass(frozen=True)
class _Target:
    """What one teacher layer says of c tokens, in V places, and its loss for a student's log q [c, V]."""

    probs: Tensor
    """[c, V] float64; 0 where no id is stored."""
    tail: Tensor
    """[c, 1] float64: probability of the others together."""
    neg_entropy: Tensor
    """[c] float64."""

    def kl(self, log_q: Tensor) -> Tensor:
        """[c] nat."""
        kl = self.neg_entropy - (self.probs * log_q).sum(-1)
        if self.tail.any():
            kl -= torch.where(self.tail > 0, self.tail * self._rest(log_q), 0.0)[:, 0]
        return kl

    def gradient(self, log_q: Tensor) -> Tensor:
        """[c, V] at the student's logits: the tail is shared out as the student shares its own."""
        target = self.probs
        if self.tail.any():
            target = torch.where(target > 0, target, self.tail * (log_q - self._rest(log_q)).exp())
        return (self.probs.sum(-1, keepdim=True) + self.tail) * log_q.exp() - target

    def _rest(self, log_q: Tensor) -> Tensor:
        """[c, 1] log of the student's probability of all ids that are not stored."""
        return log_q.masked_fill(self.probs > 0, -torch.inf).logsumexp(-1, keepdim=True)


def _exact(log_p: Tensor) -> _Target:
    p = log_p.exp()
    return _Target(p, torch.zeros_like(p[:, :1]), (p * log_p).sum(-1))


def _stored(signal: Signal, column: int, vocab: int) -> _Target:
    if isinstance(signal, HiddenSignal):
        return _exact(signal.unembedding.logits(signal.hidden[:, column]).double().log_softmax(-1))
    ids, probs = signal.ids[:, column], signal.probs[:, column].double()
    dense = torch.zeros(len(ids), vocab, dtype=torch.float64, device=ids.device).scatter_add_(1, ids, probs)
    return _Target(dense, signal.tail[:, column, None].double(), signal.neg_entropy[:, column].double())


def _slope(logits: Tensor, unembedding: Unembedding) -> Tensor | float:
    """What scale and soft-cap multiply a gradient with: a number, or [c, V] from the capped logits [c, V]."""
    if unembedding.softcap is None:
        return unembedding.scale
    return unembedding.scale * (1 - (logits.double() / unembedding.softcap).square())


def _ratio(total: float, count: float) -> float | None:
    return float(total) / float(count) if count else None
