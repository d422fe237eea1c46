"""The losses of the language head on the device, against the same formulas dense and in float64.

On a GPU with Triton these run the fused kernel, elsewhere plain torch: the figures say which. T response tokens, d
width, V vocabulary, K kept ids. Each case has random inputs of its own. The error of a loss and of its gradients is the
norm of the difference to float64 over its norm. It may be as large as that of dense torch in the same dtype, plus a
quarter of the dtype's step (a sum in another order rounds otherwise) and SOFTMAX_ERROR.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.gpu.device import Device
from bench.gpu.figures import Report
from bench.gpu.profiles import ran
from bench.gpu.shapes import Shapes
from pipeline.loss.linear_ce import linear_cross_entropy
from pipeline.loss.sparse_kl import kl_matrix, matched_kl
from pipeline.signal import SparseSignal, Unembedding

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS = {"plain": {}, "bias and padding": {"bias": True}, "scale": {"scale": 0.3}, "soft-cap": {"softcap": 4.0}}
"""The forms that a language head has; scale and soft-cap as Unembedding knows them."""
ROWS = (1, 127, 300)
"""Response tokens: alone, and not a multiple of any block."""
CHUNK = 128
"""Rows of a chunk, so that the last one is ragged."""
FUSED_KERNEL = "_softmax"
"""Name of the Triton kernel in pipeline/loss/softmax_kernel.py."""
SOFTMAX_ERROR = 2e-6
"""Of a softmax in float32, whatever the dtype of the products."""
SMALLEST_NORM = 1e-2
"""Where the truth is zero (one id has all the probability) errors are relative to this."""
Results = tuple[Tensor, ...]
"""A loss, and its gradients at h and the weight where it trains."""


@dataclass(frozen=True)
class Inputs:
    """One case."""

    h: Tensor
    """[T, d]"""
    head: Unembedding
    labels: Tensor
    """[T]"""
    signal: SparseSignal
    """One teacher layer, without tail."""

    def wide(self) -> Inputs:
        """The same numbers in float64."""
        head = self.head
        bias = None if head.bias is None else head.bias.double()
        wide = Unembedding(head.weight.double(), head.vocab, bias, head.scale, head.softcap)
        return replace(self, h=self.h.double(), head=wide)


def add_accuracy(report: Report, device: Device, shapes: Shapes) -> None:
    """A figure for each dtype: the worst error over the one allowed, and whether the kernel is fused.

    Raises RuntimeError, once all dtypes are known, where an error is larger than allowed.
    """
    wrong = []
    for dtype in DTYPES:
        ratios, fused = {}, _is_fused(device, dtype)
        for name, inputs in _cases(device, shapes, dtype):
            for loss, (ours, dense) in LOSSES.items():
                ratios[f"{loss}, {name}"] = _error_ratio(inputs, ours, dense)
        worst = max(ratios, key=ratios.__getitem__)
        kind = str(dtype).removeprefix("torch.")
        report.add(
            f"losses in {kind}: worst error over that allowed",
            ratios[worst],
            goal=("at most", 1.0),
            beside=f"{'fused kernel' if fused else 'plain torch'}; {worst}; {len(ratios)} cases",
        )
        if device.is_cuda:
            report.add(f"losses in {kind}: the fused kernel ran", float(fused), goal=("at least", 1.0))
        report.detail(f"error_ratios_{kind}", ratios)
        wrong += [f"{kind}, {name}: {ratio:.3g} times" for name, ratio in ratios.items() if not ratio <= 1.0]
    if wrong:
        raise RuntimeError(f"{len(wrong)} cases have a larger error than is allowed, such as {'; '.join(wrong[:3])}")


def _is_fused(device: Device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel runs: as the profiler sees it, not as the code means it."""
    inputs = _inputs(device, dtype, vocab=513, width=64, rows=3, seed=0)
    cross_entropy(inputs)  # compiles it
    return any(name.startswith(FUSED_KERNEL) for name in ran(device, lambda: cross_entropy(inputs)))


def _cases(device: Device, shapes: Shapes, dtype: torch.dtype) -> Iterator[tuple[str, Inputs]]:
    cases = itertools.product(shapes.kernel_vocabs, HEADS.items(), ROWS)
    for seed, (vocab, (form, options), rows) in enumerate(cases):
        yield (
            f"{form}, V = {vocab}, T = {rows}",
            _inputs(device, dtype, vocab, shapes.kernel_width, rows, seed, **options),
        )


def _inputs(
    device: Device,
    dtype: torch.dtype,
    vocab: int,
    width: int,
    rows: int,
    seed: int,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Inputs:
    """Logits have a standard deviation of 2; a head with a bias also has 5 rows of padding."""
    generator = torch.Generator(device.torch).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device.torch)

    padded = vocab + 5 * bias
    head = Unembedding(
        (normal(padded, width) / width**0.5).to(dtype),
        vocab,
        normal(padded).to(dtype) if bias else None,
        scale,
        softcap,
    )
    kept = min(8, vocab)
    ids = torch.argsort(torch.rand(rows, vocab, generator=generator, device=device.torch))[:, None, :kept].contiguous()
    probs = normal(rows, 1, kept).softmax(-1)
    none = torch.zeros(rows, 1, device=device.torch)
    signal = SparseSignal(ids, probs, none, (probs * probs.log()).sum(-1), has_tail=False)
    return Inputs(2 * normal(rows, width).to(dtype), head, ids[:, 0, 0].contiguous(), signal)


def _error_ratio(inputs: Inputs, ours: Callable[[Inputs], Results], dense: Callable[[Inputs], Results]) -> float:
    """The largest of error / (the error that is allowed), over the loss and its gradients."""
    tiny = torch.finfo(inputs.h.dtype).eps / 4 + SOFTMAX_ERROR
    truth, found, plain = dense(inputs.wide()), ours(inputs), dense(inputs)
    return max(
        float(_error(one, true) / (_error(other, true) + tiny))
        for one, other, true in zip(found, plain, truth, strict=True)
    )


def _error(value: Tensor, truth: Tensor) -> Tensor:
    return (value.double() - truth).norm() / truth.norm().clamp_min(SMALLEST_NORM)


def _trained(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def _dense_log_probs(h: Tensor, head: Unembedding, weight: Tensor) -> Tensor:
    logits = head.scale * (h @ weight.T + (0 if head.bias is None else head.bias))[:, : head.vocab]
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def cross_entropy(inputs: Inputs) -> Results:
    """Ours."""
    h, weight = _trained(inputs.h, inputs.head.weight)
    loss = linear_cross_entropy(h[None], replace(inputs.head, weight=weight), inputs.labels, chunk=CHUNK)[0]
    return loss.detach(), *torch.autograd.grad(loss, (h, weight))


def dense_cross_entropy(inputs: Inputs) -> Results:
    """- sum over tokens of log q[label]."""
    h, weight = _trained(inputs.h, inputs.head.weight)
    loss = -_dense_log_probs(h, inputs.head, weight).gather(1, inputs.labels[:, None]).sum()
    return loss.detach(), *torch.autograd.grad(loss, (h, weight))


def divergence(inputs: Inputs) -> Results:
    """Ours: both passes of the interaction loss, with one candidate."""
    (h,) = _trained(inputs.h[None])
    matrix = kl_matrix(h, inputs.head, inputs.signal, [range(1)], chunk=CHUNK)
    loss = matched_kl(h, inputs.head, inputs.signal, [0], matrix)[0]
    return loss.detach(), torch.autograd.grad(loss, h)[0][0]


def dense_divergence(inputs: Inputs) -> Results:
    """Sum over tokens and kept ids of p (log p - log q)."""
    (h,) = _trained(inputs.h)
    log_q = _dense_log_probs(h, inputs.head, inputs.head.weight).gather(1, inputs.signal.ids[:, 0])
    p = inputs.signal.probs[:, 0].to(log_q.dtype)
    loss = (p * (p.log() - log_q)).sum()
    return loss.detach(), torch.autograd.grad(loss, h)[0]


LOSSES = {"cross-entropy": (cross_entropy, dense_cross_entropy), "divergence": (divergence, dense_divergence)}
"""{loss: (ours, dense torch)}."""
