"""Teacher signals: the next-token distributions of some teacher layers at some response tokens.

A live teacher and a cache return the same types, so a training step cannot tell them apart.

T response tokens, J teacher layers, K kept ids, V common vocabulary, d width of the model whose head is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Rows = slice | Tensor
"""A selection of tokens: a slice, an index tensor or a boolean mask."""


@dataclass(frozen=True)
class Unembedding:
    """A language head as plain tensors, cut to the common vocabulary.

    logits(h) = softcap(scale * (h W^T + b)), with softcap(z) = softcap * tanh(z / softcap).
    """

    weight: Tensor
    """[rows, d]. rows >= V: a model may pad its vocabulary."""
    vocab: int
    """V, the size of the common vocabulary: ids below it exist in both models."""
    bias: Tensor | None = None
    """[rows], or None."""
    scale: float = 1.0
    """Factor on the products h W^T + b."""
    softcap: float | None = None
    """Bound of the absolute value of a logit; None: no cap."""

    def buffer(self, rows: int) -> Tensor:
        """Memory for the products of so many rows: the `out` of `products`."""
        return self.weight.new_empty(rows, self.vocab)

    def detached(self) -> Unembedding:
        """The same head, without gradient to its tensors."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [..., d] -> logits [..., V] in float32. The matrix product is in the weight's dtype."""
        return self.scale_and_cap_(self.products(hidden).float())

    def products(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """h W^T + b [..., V] in the weight's dtype.

        `out`: memory to write the result to. It needs hidden [c, d], and no gradient is recorded.
        """
        hidden, weight = hidden.to(self.weight.dtype), self.weight[: self.vocab]
        bias = None if self.bias is None else self.bias[: self.vocab]
        if out is None:
            return torch.nn.functional.linear(hidden, weight, bias)
        return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)

    def scale_and_cap_(self, products: Tensor) -> Tensor:
        """Turn products h W^T + b [..., V] into logits in place: scale first, then soft-cap."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products


@dataclass(frozen=True)
class Bucket:
    """What a teacher says outside of the ids that it shares with the student (vocabulary: mapped)."""

    mass: Tensor
    """[T, J] float32: probability of the teacher's ids that mean no single id of the student."""
    outside: Tensor
    """[U] int64: the student's ids that no teacher id means. Their probability is the student's share of the bucket."""

    def part(self, rows: Rows, columns: int | slice = slice(None)) -> Bucket:
        """The bucket of some tokens and some layers, as in SparseSignal."""
        return replace(self, mass=self.mass[rows][:, columns])


@dataclass(frozen=True)
class SparseSignal:
    """Distributions over a few ids each, with all other ids together as one bucket, the tail."""

    ids: Tensor
    """[T, J, K] int64. Padding entries have probability 0."""
    probs: Tensor
    """[T, J, K] float32 absolute probabilities: never renormalised over the kept ids."""
    tail: Tensor
    """[T, J] float32: total probability of all other ids; 0 where the codec has no tail."""
    neg_entropy: Tensor
    """[T, J] float32, nats: sum of p log p over the entries and the tail, so that KL(p, p) = 0."""
    has_tail: bool = True
    """False where the codec has no tail. Code then need not read `tail` back from the device to find out."""
    bucket: Bucket | None = None
    """None where the models share their ids, and where the tail holds the bucket too."""

    def part(self, rows: Rows, columns: int | slice = slice(None)) -> SparseSignal:
        """The signal of some tokens and some layers. An integer `columns` drops the layer dimension."""
        some = {name: getattr(self, name)[rows][:, columns] for name in ("ids", "probs", "tail", "neg_entropy")}
        return replace(self, bucket=None if self.bucket is None else self.bucket.part(rows, columns), **some)


@dataclass(frozen=True)
class HiddenSignal:
    """Exact distributions: normed verbalizer outputs, and the head that turns them into logits."""

    hidden: Tensor
    """[T, J, d] normed verbalizer outputs."""
    unembedding: Unembedding

    def part(self, rows: Rows, columns: int | slice = slice(None)) -> HiddenSignal:
        """The signal of some tokens and some layers, as in SparseSignal."""
        return replace(self, hidden=self.hidden[rows][:, columns])


Signal = SparseSignal | HiddenSignal
