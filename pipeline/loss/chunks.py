"""The one loop over a language head: logits of a few rows at a time, a loss on them, its gradients made on the spot.

L layers, T response tokens, d width, V common vocabulary, c rows of a chunk.

What it equals, were memory no matter:

    logits = softcap(scale * (h @ weight.T + bias))[..., :V]
    loss(logits).sum(over tokens)                               # one number a layer, autograd does the rest

Here nothing of size [T, V] exists beyond one chunk, and the gradients are made in the forward, while the chunk's logits
are at hand: the backward only scales them. So it needs no weight, which under ZeRO-3 may be gone by then.

What costs time is the two matrix products, so they get a whole chunk in the weight's dtype. The loss in between is made
in float32 of a tile of it at a time, small enough for the caches, and its gradient takes the logits' place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.signal import Unembedding

CHUNK_ELEMENTS = 2**26
"""Logits held at once, in the weight's dtype: 128 MiB in bfloat16."""

ACCELERATOR_CHUNK_ELEMENTS = 2**28
"""The same on an accelerator, whose products want more rows to be fast: 512 MiB."""

TILE_ELEMENTS = 2**20
"""How many logits a CPU has in float32 at a time, for its caches. An accelerator has CHUNK_ELEMENTS: launches cost."""

ROW_BLOCK = 128
"""Rows of an accelerator's matrix product are computed in blocks of this many: a chunk of fewer leaves some idle."""

PRODUCT_BLOCK = 2**14
"""Ids over which a CPU sums a low-precision product at a time: a sixth faster there than over all of them."""

SLICE_ELEMENTS = 2**23
"""How many elements of a trained head's gradient, as large as the head, are added or scaled at a time."""

TileLoss = Callable[[slice, Tensor], None]
"""(rows, logits [c, V] in float32): overwrites the logits with the gradient at them."""

Gradients = Iterator[tuple[slice, Tensor]]
"""For each chunk of h [T, d]: its rows, and the gradient at h W^T + b [c, V] in the weight's dtype."""

Walk = Callable[[Tensor, Callable[[Tensor], None], "Workspace"], Gradients]
"""(h [T, d], add, workspace) -> the gradients of a loss; `add` is called with the rows' losses, a few [c] at a time."""


def rows_per_chunk(vocab: int) -> int:
    """How many rows of a vocabulary's width are held at once, so that memory does not grow with the vocabulary."""
    return max(1, CHUNK_ELEMENTS // vocab)


def row_chunks(total: int, rows: int) -> Iterator[slice]:
    """Slices of at most `rows` rows, nearly equal ones, that tile 0..total; none where there is nothing.

    Nearly equal, because a product of few rows takes almost as long as one of many; of whole ROW_BLOCKs if `rows` is.
    """
    if total:
        count, block = -(-total // rows), 1 if rows % ROW_BLOCK else ROW_BLOCK
        size = -(-total // (count * block)) * block
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that softmax and sums are made in: float32, or float64 where the weight is float64."""
    return torch.promote_types(dtype, torch.float32)


def wide_logits(h: Tensor, unembedding: Unembedding) -> Tensor:
    """[c, d] -> [c, V] logits, as `Unembedding.logits`, in memory that may be overwritten, and float64 stays so."""
    products = unembedding.products(h)
    return unembedding.scale_and_cap_(products.to(accumulator(products.dtype)))


class Workspace:
    """A head, and the memory for a chunk of its logits: the same from chunk to chunk and from layer to layer.

    On a CPU fresh memory costs more, page by page, than the passes over it.
    """

    def __init__(self, unembedding: Unembedding, chunk: int | None = None):
        """`chunk` is in rows; without it, memory decides."""
        self.unembedding = unembedding
        self._on_cpu = unembedding.weight.device.type == "cpu"
        self.chunk = chunk or (
            rows_per_chunk(unembedding.vocab)
            if self._on_cpu
            else max(1, ACCELERATOR_CHUNK_ELEMENTS // unembedding.vocab // ROW_BLOCK) * ROW_BLOCK
        )
        self._products = self._tile = unembedding.weight.new_empty(0, unembedding.vocab)

    def products(self, h: Tensor) -> Tensor:
        """h W^T + b [c, V] in the weight's dtype, until the next call. Without gradient."""
        if len(self._products) < len(h):
            self._products = self.unembedding.weight.new_empty(len(h), self.unembedding.vocab)
        return self.unembedding.products(h, self._products[: len(h)])

    def logits(self, products: Tensor) -> Tensor:
        """The products [c, V] scaled and capped, in float32, until the next call; or, where they are wide, in place."""
        wide = accumulator(products.dtype)
        if products.dtype == wide:
            return self.unembedding.scale_and_cap_(products)
        if len(self._tile) < len(products):
            self._tile = products.new_empty(products.shape, dtype=wide)
        return self.unembedding.scale_and_cap_(self._tile[: len(products)].copy_(products))

    def tile_rows(self) -> int:
        """How many rows of a chunk are in float32 at a time."""
        return max(1, (TILE_ELEMENTS if self._on_cpu else CHUNK_ELEMENTS) // self.unembedding.vocab)


def cap_slope(logits: Tensor, unembedding: Unembedding) -> Tensor | None:
    """What the soft-cap multiplies a gradient with, from the capped logits: 1 - (z / cap)^2. None without a cap."""
    if unembedding.softcap is None:
        return None
    return (logits / unembedding.softcap).square_().neg_().add_(1.0)


def exp_(logits: Tensor, ids: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits [c, V] into exp(logits - maximum) in place.

    Returns the log-probabilities of ids [c, n], the log-sum-exp [c, 1], and the sum of what the logits became [c, 1].
    The maximum, `top` [c, 1] where it is known, is taken off before anything is read: near 30 a float32 is 2e-6 coarse,
    and so would a probability be.
    """
    if top is None:
        top = logits.amax(1, keepdim=True)
    shifted = logits.sub_(top).gather(1, ids)
    total = logits.exp_().sum(1, keepdim=True)
    log_total = total.log()
    return shifted.sub_(log_total), top + log_total, total


def softmax_(logits: Tensor, ids: Tensor) -> Tensor:
    """Turn logits [c, V] into probabilities in place; return log-probabilities of ids [c, n]."""
    log_q, _, total = exp_(logits, ids)
    logits.div_(total)
    return log_q


def times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient [c, V] times weight [V, d] -> [c, d], in the weight's dtype or, summed over blocks of ids, wider."""
    vocab, wide = len(weight), accumulator(weight.dtype)
    if weight.device.type != "cpu" or weight.dtype == wide or vocab <= PRODUCT_BLOCK:
        return gradient @ weight
    total = torch.zeros(len(gradient), weight.shape[1], dtype=wide)
    for ids in row_chunks(vocab, PRODUCT_BLOCK):
        total += gradient[:, ids] @ weight[ids]
    return total


def product_gradients(h: Tensor, workspace: Workspace, loss: TileLoss, tile: int | None = None) -> Gradients:
    """The gradients of a loss that is made of a tile of the logits at a time.

    `loss` gives the gradient at the logits; that of the soft-cap and the scale is taken on here. `tile` is in rows. A
    chunk's gradient is good until the next one is asked for.
    """
    unembedding, tile = workspace.unembedding, tile or workspace.tile_rows()
    for rows in row_chunks(len(h), workspace.chunk):
        products = workspace.products(h[rows])
        for part in row_chunks(len(products), tile):
            logits = workspace.logits(products[part])
            slope = cap_slope(logits, unembedding)
            loss(slice(rows.start + part.start, rows.start + part.stop), logits)
            if slope is not None:
                logits.mul_(slope)
            if unembedding.scale != 1.0:
                logits.mul_(unembedding.scale)
            if logits.dtype != products.dtype:
                products[part] = logits
        yield rows, products


class _HeadGradients:
    """Gradients at the head's inputs, filled chunk by chunk; None where nobody wants one.

    That of the weight is a sum over chunks in float32. Of a single chunk, its two factors are kept instead: they are
    smaller, and the backward makes the product with what comes from above already in the smaller factor.
    """

    def __init__(self, h: Tensor, unembedding: Unembedding, chunk: int):
        weight, bias = unembedding.weight, unembedding.bias
        self.inputs: tuple[Tensor | None, ...] = (h, weight, bias)
        wants_h, wants_weight, wants_bias = (
            torch.is_grad_enabled() and x is not None and x.requires_grad for x in self.inputs
        )
        if (wants_weight or wants_bias) and len(h) != 1:
            raise ValueError(
                f"a trained head takes one layer a call, got {len(h)}: the gradient of its weight is made in the "
                "forward, before it is known how the layers' losses will be weighted. "
                "Call it layer by layer, or detach the weight."
            )
        self.h = torch.zeros_like(h) if wants_h else None
        wide = accumulator(weight.dtype)
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants_bias else None
        several = wants_weight and h.shape[1] > chunk
        self.weight = torch.zeros_like(weight, dtype=wide) if several else None
        self.factors = (weight.new_empty(0, unembedding.vocab), h[0, :0]) if wants_weight and not several else None

    def add(self, layer: int, rows: slice, gradient: Tensor) -> None:
        """Take in the gradient at h W^T + b [c, V] of one chunk. Rows beyond V, the padding, stay zero."""
        h, weight, _ = self.inputs
        assert h is not None and weight is not None
        vocab = gradient.shape[1]
        if self.h is not None:
            self.h[layer, rows] = times_weight(gradient, weight[:vocab]).to(h.dtype)
        if self.factors is not None:
            self.factors = (gradient, h[layer, rows])
        if self.weight is not None:
            inputs = h[layer, rows].to(weight.dtype)
            for ids in _slices(weight[:vocab]):
                self.weight[ids] += gradient[:, ids].T @ inputs
        if self.bias is not None:
            self.bias[:vocab] += gradient.sum(0, dtype=self.bias.dtype)

    def attach(self, sums: Tensor) -> Tensor:
        """The sums [L], carrying these gradients."""
        return attach_gradients(sums, self.inputs, (self.h, self.weight, self.bias), self.factors)


def head_loss(h: Tensor, unembedding: Unembedding, walk: Walk, chunk: int | None = None) -> Tensor:
    """Sum over tokens of a loss on the logits of h [L, T, d]: [L], with gradient to h, weight and bias that want one.

    `walk` goes over one layer. Raises ValueError where a head that wants a gradient is given more than one layer.
    """
    if chunk is None and unembedding.weight.requires_grad and h.shape[1] <= h.shape[2]:
        chunk = max(1, h.shape[1])  # a trained head's two factors then take less memory than a sum of its gradient
    workspace = Workspace(unembedding, chunk)
    gradients = _HeadGradients(h, unembedding, workspace.chunk)
    sums = torch.zeros(len(h), dtype=torch.float64, device=h.device)

    def add(layer: int, losses: Tensor) -> None:
        sums[layer] += losses.sum(dtype=sums.dtype)

    with torch.no_grad():
        for layer in range(len(h)):
            for rows, gradient in walk(h[layer], partial(add, layer), workspace):
                gradients.add(layer, rows, gradient)
    return gradients.attach(sums.to(accumulator(unembedding.weight.dtype)))


class _Attach(torch.autograd.Function):
    """Values whose gradients are already known; that of the second input, a weight, perhaps only by its factors."""

    @staticmethod
    def forward(
        ctx,
        values: Tensor,
        gradients: Sequence[Tensor | None],
        factors: tuple[Tensor, Tensor] | None,
        *inputs: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*(factors or (None, None)), *gradients)
        ctx.like = [(torch.Size(), torch.float32) if x is None else (x.shape, x.dtype) for x in inputs]
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        left, right, *gradients = ctx.saved_tensors
        pairs = zip(gradients, ctx.like, strict=True)
        scaled = [None if x is None else _scaled(x, upstream, dtype) for x, (_, dtype) in pairs]
        if left is not None:
            scaled[1] = _product(left, upstream * right, *ctx.like[1])
        return (None, None, None, *scaled)


def _product(left: Tensor, right: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """left^T [V, c] times right [c, d], with rows of zeros below: [rows, d]."""
    product = torch.empty(shape, dtype=dtype, device=left.device)
    vocab = left.shape[1]
    torch.mm(left.T, right.to(left.dtype), out=product[:vocab])
    product[vocab:] = 0
    return product


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """upstream [L] times gradient, which is [L, ...] or, where L is 1, anything; rounded to the dtype only then."""
    factors = upstream.view(-1, *[1] * (gradient.dim() - 1)).expand(len(gradient), *gradient.shape[1:])
    scaled = torch.empty_like(gradient, dtype=dtype)
    for rows in _slices(gradient):
        scaled[rows] = factors[rows] * gradient[rows]
    return scaled


def _slices(tensor: Tensor) -> Iterator[slice]:
    return row_chunks(len(tensor), max(1, SLICE_ELEMENTS // max(1, tensor[:1].numel())))


def attach_gradients(
    values: Tensor,
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    factors: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Values [L] that carry a ready gradient for each input: first dimension L, or any shape where L is 1.

    factors: the second input's, [c, V] and [c, d], where its gradient is yet to be made of them.
    """
    return _Attach.apply(values, gradients, factors, *inputs)
