"""The one loop over a language head: logits of a few rows at a time, a loss on them, its gradients made on the spot.

L layers, T response tokens, d width, V common vocabulary, c rows of a chunk.

What it equals, were memory no matter:

    logits = softcap(scale * (h @ weight.T + bias))[..., :V]
    loss(logits).sum(over tokens)                               # one number a layer, autograd does the rest

Here nothing of size [T, V] exists beyond one chunk, and the gradients are made in the forward, while the chunk's logits
are at hand: the backward only scales them. So it needs no weight, which under ZeRO-3 may be gone by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.teacher.signal import Unembedding

CHUNK_ELEMENTS = 2**26
"""Logits held at once: 256 MiB in float32."""

ChunkLoss = Callable[[int, slice, Tensor], Tensor]
"""(layer, rows, logits [c, V]) -> the loss of each row [c]. Overwrites the logits with that loss's gradient."""


def rows_per_chunk(vocab: int) -> int:
    """How many rows of a vocabulary's width are held at once, so that memory does not grow with the vocabulary."""
    return max(1, CHUNK_ELEMENTS // vocab)


def row_chunks(total: int, rows: int) -> Iterator[slice]:
    """Slices of at most `rows` rows that tile 0..total; none where there is nothing."""
    for start in range(0, total, rows):
        yield slice(start, min(start + rows, total))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that softmax and sums are made in: float32, or float64 where the weight is float64."""
    return torch.promote_types(dtype, torch.float32)


def chunk_logits(h: Tensor, unembedding: Unembedding) -> Tensor:
    """[c, d] -> [c, V] logits, as `Unembedding.logits`, in memory that may be overwritten, and float64 stays so."""
    weight, vocab = unembedding.weight, unembedding.vocab
    bias = None if unembedding.bias is None else unembedding.bias[:vocab]
    logits = torch.nn.functional.linear(h.to(weight.dtype), weight[:vocab], bias).to(accumulator(weight.dtype))
    if unembedding.scale != 1.0:
        logits.mul_(unembedding.scale)
    if unembedding.softcap is not None:
        logits.div_(unembedding.softcap).tanh_().mul_(unembedding.softcap)
    return logits


def cap_slope(logits: Tensor, unembedding: Unembedding) -> Tensor | None:
    """What the soft-cap multiplies a gradient with, from the capped logits: 1 - (z / cap)^2. None without a cap."""
    if unembedding.softcap is None:
        return None
    return (logits / unembedding.softcap).square_().neg_().add_(1.0)


def softmax_(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits [c, V] into probabilities in place; return log-probabilities of ids [c, n] and log-sum-exp [c, 1].

    The maximum is taken off before anything is read: near 30 a float32 is 2e-6 coarse, and so would a probability be.
    """
    top = logits.amax(1, keepdim=True)
    shifted = logits.sub_(top).gather(1, ids)
    total = logits.exp_().sum(1, keepdim=True)
    logits.div_(total)
    return shifted - total.log(), top + total.log()


class _HeadGradients:
    """Gradients at the head's inputs, filled chunk by chunk; None where nobody wants one."""

    def __init__(self, h: Tensor, unembedding: Unembedding):
        enabled = torch.is_grad_enabled()
        wide = accumulator(unembedding.weight.dtype)
        weight, bias = unembedding.weight, unembedding.bias
        self.inputs: tuple[Tensor | None, ...] = (h, weight, bias)
        self.h = torch.zeros_like(h) if enabled and h.requires_grad else None
        self.weight = torch.zeros_like(weight, dtype=wide) if enabled and weight.requires_grad else None
        self.bias = torch.zeros_like(bias, dtype=wide) if enabled and bias is not None and bias.requires_grad else None
        if (self.weight is not None or self.bias is not None) and len(h) != 1:
            raise ValueError(
                f"a trained head takes one layer a call, got {len(h)}: the gradient of its weight is made in the "
                "forward, before it is known how the layers' losses will be weighted. "
                "Call it layer by layer, or detach the weight."
            )

    @property
    def wanted(self) -> bool:
        """Whether anything is to be made."""
        return any(gradient is not None for gradient in (self.h, self.weight, self.bias))

    def add(self, layer: int, rows: slice, gradient: Tensor) -> None:
        """Take in the gradient at h W^T + b [c, V] of one chunk. Rows beyond V, the padding, stay zero."""
        h, weight, _ = self.inputs
        assert h is not None and weight is not None
        low = gradient.to(weight.dtype)
        vocab = gradient.shape[1]
        if self.h is not None:
            self.h[layer, rows] = (low @ weight[:vocab]).to(h.dtype)
        if self.weight is not None:
            self.weight[:vocab] += low.T @ h[layer, rows].to(weight.dtype)
        if self.bias is not None:
            self.bias[:vocab] += gradient.sum(0)

    def attach(self, sums: Tensor) -> Tensor:
        """The sums [L], carrying these gradients."""
        return attach_gradients(sums, self.inputs, (self.h, self.weight, self.bias))


def head_loss(h: Tensor, unembedding: Unembedding, chunk_loss: ChunkLoss, chunk: int | None = None) -> Tensor:
    """Sum over tokens of a loss on the logits of h [L, T, d]: [L], with gradient to h, weight and bias that want one.

    Raises ValueError where a head that wants a gradient is given more than one layer.
    """
    gradients = _HeadGradients(h, unembedding)
    sums = torch.zeros(len(h), dtype=torch.float64, device=h.device)
    with torch.no_grad():
        for layer in range(len(h)):
            for rows in row_chunks(h.shape[1], chunk or rows_per_chunk(unembedding.vocab)):
                logits = chunk_logits(h[layer, rows], unembedding)
                slope = cap_slope(logits, unembedding) if gradients.wanted else None
                sums[layer] += chunk_loss(layer, rows, logits).sum(dtype=torch.float64)
                if not gradients.wanted:
                    continue
                if slope is not None:
                    logits.mul_(slope)
                if unembedding.scale != 1.0:
                    logits.mul_(unembedding.scale)
                gradients.add(layer, rows, logits)
    return gradients.attach(sums.to(accumulator(unembedding.weight.dtype)))


class _Attach(torch.autograd.Function):
    """Values whose gradients are already known."""

    @staticmethod
    def forward(ctx, values: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        scaled: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is None:
                scaled.append(None)
            else:
                scaled.append((upstream.view(-1, *[1] * (gradient.dim() - 1)) * gradient).to(dtype))
        return (None, None, *scaled)


def attach_gradients(values: Tensor, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> Tensor:
    """Values [L] that carry a ready gradient for each input: first dimension L, or any shape where L is 1."""
    return _Attach.apply(values, gradients, *inputs)
