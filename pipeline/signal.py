"""What a teacher says about response tokens: the type that a live teacher and a cached one both answer with.

T response tokens, J teacher layers, K kept ids, V common vocabulary, d width of the model that speaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Rows = slice | Tensor
"""Some of the tokens: a slice, their indices, or a mask."""


@dataclass(frozen=True)
class Unembedding:
    """A language head as plain tensors: logits(h) = softcap(scale * (h W^T + b)), cut to the common vocabulary."""

    weight: Tensor
    """[rows, d]; rows may exceed the vocabulary by padding."""
    vocab: int
    """V, the common vocabulary: ids below it exist in both models."""
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] normed hidden states -> [..., V] logits in float32 (the product itself in the weight's dtype)."""
        return self.scale_and_cap_(self.products(hidden).float())

    def products(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """h W^T + b [..., V] in the weight's dtype; in `out`, if given, for hidden [c, d] and without gradient."""
        hidden, weight = hidden.to(self.weight.dtype), self.weight[: self.vocab]
        bias = None if self.bias is None else self.bias[: self.vocab]
        if out is None:
            return torch.nn.functional.linear(hidden, weight, bias)
        return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)

    def scale_and_cap_(self, products: Tensor) -> Tensor:
        """What is made of the products [..., V], in place: scaled, then capped."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products


@dataclass(frozen=True)
class SparseSignal:
    """A few ids of each distribution, the rest as one bucket."""

    ids: Tensor
    """[T, J, K] int64; an entry that pads has probability 0."""
    probs: Tensor
    """[T, J, K] float32, absolute: never renormalised over the kept ids."""
    tail: Tensor
    """[T, J] float32: probability of all other ids together; 0 where the codec has no such bucket."""
    neg_entropy: Tensor
    """[T, J] float32, nat: sum p log p over the entries and the tail, so that KL(p, p) = 0."""
    tailed: bool = True
    """False where the codec has no such bucket: nobody then needs to look at the numbers on the device."""

    def part(self, rows: Rows, columns: int | slice = slice(None)) -> SparseSignal:
        """What is said of some tokens, by some layers; with a number for the layer, that dimension is gone."""
        some = {name: getattr(self, name)[rows][:, columns] for name in ("ids", "probs", "tail", "neg_entropy")}
        return replace(self, **some)


@dataclass(frozen=True)
class HiddenSignal:
    """The exact form: normed verbalizer outputs, and the head that turns them into logits."""

    hidden: Tensor
    """[T, J, d]."""
    unembedding: Unembedding

    def part(self, rows: Rows, columns: int | slice = slice(None)) -> HiddenSignal:
        """As that of SparseSignal."""
        return replace(self, hidden=self.hidden[rows][:, columns])


Signal = SparseSignal | HiddenSignal
