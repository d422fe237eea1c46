"""Losses over a language head in chunks: a few rows of logits at a time, and their gradients in the same pass.

L layers, T response tokens, d width, V common vocabulary, c rows of a chunk.

In naive form, if memory did not matter:

    logits = softcap(scale * (h @ weight.T + bias))[..., :V]
    loss(logits).sum(over tokens)                               # one number for each layer; autograd does the rest

Here no tensor is larger than a chunk [c, V]. The gradients are computed in the forward pass, while the chunk's logits
exist; the backward pass only scales them. So it does not need the weight, which ZeRO-3 may have released by then.

The two matrix products take most of the time. They run on whole chunks, in the weight's dtype. The loss between them is
computed in float32, one tile (a few rows) of the chunk at a time, so that it stays in the CPU's caches. Its gradient
overwrites the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.signal import Unembedding

CHUNK_ELEMENTS = 2**26
"""Logits in a chunk on a CPU, in the weight's dtype: 128 MiB in bfloat16."""

ACCELERATOR_CHUNK_ELEMENTS = 2**28
"""The same on an accelerator, where matrix products need more rows to be fast: 512 MiB in bfloat16."""

TILE_ELEMENTS = 2**20
"""Logits in a float32 tile on a CPU, so that it stays in the caches. An accelerator uses tiles of CHUNK_ELEMENTS,
because kernel launches cost time there."""

ROW_BLOCK = 128
"""An accelerator computes matrix products in blocks of this many rows. Smaller chunks leave part of it idle."""

PRODUCT_BLOCK = 2**14
"""Ids in one partial sum of a low-precision matrix product on a CPU: a sixth faster than a sum over all ids."""

SLICE_ELEMENTS = 2**23
"""Elements of a trained head's gradient that are added or scaled at a time. The whole is as large as the head."""

TileLoss = Callable[[slice, Tensor], None]
"""(rows, logits [c, V] in float32) -> None. Overwrites the logits with the gradient with respect to them."""

Gradients = Iterator[tuple[slice, Tensor]]
"""For each chunk of h [T, d]: its rows, and the gradient at h W^T + b [c, V] in the weight's dtype."""

LayerGradients = Callable[[Tensor, Callable[[Tensor], None], "Workspace"], Gradients]
"""(h [T, d], add_losses, workspace) -> the gradients of one layer's loss.

It calls `add_losses` with the losses of a few rows [c] at a time."""


def rows_per_chunk(vocab: int) -> int:
    """The number of rows in a chunk for this vocabulary size. Memory then does not grow with the vocabulary."""
    rows = max(1, CHUNK_ELEMENTS // vocab)
    return rows - rows % ROW_BLOCK if rows > ROW_BLOCK else rows


def row_chunks(total: int, rows: int) -> Iterator[slice]:
    """Split 0..total into slices of at most `rows` rows of nearly equal size. total = 0 gives no slice.

    The sizes are nearly equal, because a product of few rows takes almost as long as one of many. They are multiples of
    ROW_BLOCK (the last one excepted) if `rows` is.
    """
    if total:
        count, block = -(-total // rows), 1 if rows % ROW_BLOCK else ROW_BLOCK
        size = -(-total // (count * block)) * block
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype for softmax and sums: float32, or float64 where the weight is float64."""
    return torch.promote_types(dtype, torch.float32)


def wide_logits(h: Tensor, unembedding: Unembedding) -> Tensor:
    """Hidden states [c, d] -> logits [c, V] in new memory: float32, or float64 where the weight is float64."""
    products = unembedding.products(h)
    return unembedding.scale_and_cap_(products.to(accumulator(products.dtype)))


class Workspace:
    """A head, and memory for one chunk of its logits. All chunks and layers reuse this memory.

    On a CPU, the page faults of fresh memory cost more than the passes over it.
    """

    def __init__(self, unembedding: Unembedding, chunk: int | None = None):
        """chunk: rows in a chunk; None: as many as the memory limits above allow."""
        self.unembedding = unembedding
        self._on_cpu = unembedding.weight.device.type == "cpu"
        self.chunk = chunk or (
            rows_per_chunk(unembedding.vocab)
            if self._on_cpu
            else max(1, ACCELERATOR_CHUNK_ELEMENTS // unembedding.vocab // ROW_BLOCK) * ROW_BLOCK
        )
        self._products = self._tile = unembedding.weight.new_empty(0, unembedding.vocab)

    def products(self, h: Tensor) -> Tensor:
        """h W^T + b [c, V] in the weight's dtype, without gradient. Valid until the next call."""
        if len(self._products) < len(h):
            self._products = self.unembedding.weight.new_empty(len(h), self.unembedding.vocab)
        return self.unembedding.products(h, self._products[: len(h)])

    def logits(self, products: Tensor) -> Tensor:
        """Products [c, V] -> logits in float32, valid until the next call. Wide products are changed in place."""
        wide = accumulator(products.dtype)
        if products.dtype == wide:
            return self.unembedding.scale_and_cap_(products)
        if len(self._tile) < len(products):
            self._tile = products.new_empty(products.shape, dtype=wide)
        return self.unembedding.scale_and_cap_(self._tile[: len(products)].copy_(products))

    def tile_rows(self) -> int:
        """The number of rows in a float32 tile."""
        return max(1, (TILE_ELEMENTS if self._on_cpu else CHUNK_ELEMENTS) // self.unembedding.vocab)


def cap_slope(logits: Tensor, unembedding: Unembedding) -> Tensor | None:
    """The derivative of the soft-cap, from the capped logits z: 1 - (z / cap)^2. None without a cap."""
    if unembedding.softcap is None:
        return None
    return (logits / unembedding.softcap).square_().neg_().add_(1.0)


def exp_(logits: Tensor, ids: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits [c, V] into exp(logits - maximum) in place. `top`: the maximum [c, 1], if it is known.

    Returns the log-probabilities of ids [c, n], the log-sum-exp [c, 1], and the sum of the exponentials [c, 1].

    The maximum is subtracted before the logits of `ids` are read. Near 30, the float32 step is 2e-6, and the
    probabilities would have that error.
    """
    if top is None:
        top = logits.amax(1, keepdim=True)
    shifted = logits.sub_(top).gather(1, ids)
    total = logits.exp_().sum(1, keepdim=True)
    log_total = total.log()
    return shifted.sub_(log_total), top + log_total, total


def softmax_(logits: Tensor, ids: Tensor) -> Tensor:
    """Turn logits [c, V] into probabilities in place. Returns the log-probabilities of ids [c, n]."""
    log_q, _, total = exp_(logits, ids)
    logits.div_(total)
    return log_q


def times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient [c, V] times weight [V, d] -> [c, d].

    In the weight's dtype; on a CPU with a low-precision weight, summed over blocks of ids in float32.
    """
    vocab, wide = len(weight), accumulator(weight.dtype)
    if weight.device.type != "cpu" or weight.dtype == wide or vocab <= PRODUCT_BLOCK:
        return gradient @ weight
    total = torch.zeros(len(gradient), weight.shape[1], dtype=wide)
    for ids in row_chunks(vocab, PRODUCT_BLOCK):
        total += gradient[:, ids] @ weight[ids]
    return total


def product_gradients(h: Tensor, workspace: Workspace, loss: TileLoss, tile: int | None = None) -> Gradients:
    """Chunk by chunk, the gradients of a loss that is computed on a tile of the logits at a time.

    loss: gives the gradient with respect to the logits. The derivative of soft-cap and scale is applied here.
    tile: rows in a tile; None: `Workspace.tile_rows`. A chunk's gradient is valid until the next chunk is requested.
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
            del slope  # or the next tile's would be computed beside it
            if unembedding.scale != 1.0:
                logits.mul_(unembedding.scale)
            if logits.dtype != products.dtype:
                products[part] = logits
        yield rows, products


class _HeadGradients:
    """The gradients of h, weight and bias, summed chunk by chunk. None where an input needs none.

    The weight's gradient is a sum over chunks in float32. If there is only one chunk, its two factors are kept instead:
    they are smaller. The backward pass multiplies the smaller one by the upstream gradient, then takes the product.
    """

    def __init__(self, h: Tensor, unembedding: Unembedding, chunk: int):
        weight, bias = unembedding.weight, unembedding.bias
        self.inputs: tuple[Tensor | None, ...] = (h, weight, bias)
        wants_h, wants_weight, wants_bias = (
            torch.is_grad_enabled() and x is not None and x.requires_grad for x in self.inputs
        )
        if (wants_weight or wants_bias) and len(h) != 1:
            raise ValueError(
                f"a trained head takes one layer a call, got {len(h)}: the gradient of its weight is computed in the "
                "forward pass, where the weights of the layers' losses are not known yet. "
                "Call it layer by layer, or detach the weight."
            )
        self.h = torch.zeros_like(h) if wants_h else None
        wide = accumulator(weight.dtype)
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants_bias else None
        several = wants_weight and h.shape[1] > chunk
        self.weight = torch.zeros_like(weight, dtype=wide) if several else None
        self.factors = (weight.new_empty(0, unembedding.vocab), h[0, :0]) if wants_weight and not several else None

    def add(self, layer: int, rows: slice, gradient: Tensor) -> None:
        """Add one chunk, from its gradient at h W^T + b [c, V]. Rows beyond V (padding) stay zero."""
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
        """The sums [L], with these gradients attached for autograd."""
        return attach_gradients(sums, self.inputs, (self.h, self.weight, self.bias), self.factors)


def head_loss(h: Tensor, unembedding: Unembedding, layer_gradients: LayerGradients, chunk: int | None = None) -> Tensor:
    """Sum a loss on the logits of h [L, T, d] over tokens: [L], with gradients to h, weight and bias where required.

    layer_gradients: computes losses and gradients of one layer. chunk: rows in a chunk; None: as memory allows.
    Raises ValueError where a head that requires a gradient gets more than one layer.
    """
    if chunk is None and unembedding.weight.requires_grad and h.shape[1] <= h.shape[2]:
        chunk = max(1, h.shape[1])  # one chunk: the two factors of the weight's gradient are smaller than the gradient
    workspace = Workspace(unembedding, chunk)
    gradients = _HeadGradients(h, unembedding, workspace.chunk)
    sums = torch.zeros(len(h), dtype=torch.float64, device=h.device)

    def add_losses(layer: int, losses: Tensor) -> None:
        sums[layer] += losses.sum(dtype=sums.dtype)

    with torch.no_grad():
        for layer in range(len(h)):
            for rows, gradient in layer_gradients(h[layer], partial(add_losses, layer), workspace):
                gradients.add(layer, rows, gradient)
    return gradients.attach(sums.to(accumulator(unembedding.weight.dtype)))


class _Attach(torch.autograd.Function):
    """Attaches known gradients to values. The second input's (the weight's) may be given as two factors."""

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
    """left^T [V, c] times right [c, d], padded with zero rows to the given shape [rows, d]."""
    product = torch.empty(shape, dtype=dtype, device=left.device)
    vocab = left.shape[1]
    torch.mm(left.T, right.to(left.dtype), out=product[:vocab])
    product[vocab:] = 0
    return product


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """upstream [L] times gradient ([L, ...], or any shape where L is 1). Rounded to the dtype after the product."""
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
    """Values [L] with a precomputed gradient for each input. A gradient is [L, ...], or any shape where L is 1.

    factors: [c, V] and [c, d], instead of the second input's gradient. The backward pass multiplies them.
    """
    return _Attach.apply(values, gradients, factors, *inputs)
