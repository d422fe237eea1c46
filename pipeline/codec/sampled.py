"""Systematic samples of each distribution: unbiased, and a few tens of bytes a token and layer.

T response tokens, J teacher layers, N points, K distinct ids among them, V common vocabulary, d width of the teacher.

With the vocabulary in a fixed order (the ids that the teacher uses most first) and one number u uniform in [0, 1) for
each token and layer, point i of N stands at (i + u) / N of the distribution's mass, and takes the id that it falls on:

    ranks = searchsorted(cumsum(p[order]), (arange(N) + u) / N)       # counts / N estimates p: E[counts / N] = p

Every id gets floor(N p) or ceil(N p) points or so, so that the error is far below that of independent draws. The
entropy H(p) is stored with them, so that cross-entropy - H has the dense KL as its mean, and its gradient as the mean
of its gradients: nothing is cut off and nothing renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.packing import narrowest, raw_array, raw_stream
from pipeline.codec.systematic import draw_points
from pipeline.rows import row_states
from pipeline.signal import SparseSignal, Unembedding

COUNTS = 12
"""A point's symbol says its gap's class and its count up to this; larger counts stand in a stream of their own."""

ENTROPY_STEPS = 2**16 - 1
"""The entropy is stored as a share of its largest value, ln V: exact to 1e-4 nat in two bytes."""


class Sampled:
    """N systematic points of each distribution, and its entropy."""

    name = "sampled"
    PARAMS = ("points", "seed")
    needs_head = False
    needs_order = True

    def __init__(self, points: int = 64, seed: int = 0, order: np.ndarray | None = None):
        """order: [V] all ids, the teacher's most used first; without it there is only the name."""
        if not 16 <= points <= 1024:
            raise ValueError(f"sampled draws 16 to 1024 points, asked for points={points}")
        self.points, self.seed, self._order = points, seed, order
        self.params: dict[str, Any] = {"points": points, "seed": seed}

    @property
    def order(self) -> np.ndarray:
        """[V] all ids by falling use. Raises ValueError where the codec was made without."""
        if self._order is None:
            raise ValueError("the sampled codec needs the order of the vocabulary: make_codec(..., order=...)")
        return self._order

    @torch.no_grad()
    def encode(self, hidden: Tensor, unembedding: Unembedding, uniform: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
        """[T, J, d] and u [T, J] -> {"ranks": [T, J, N] int32 ascending, "entropy": [T, J] float32 in nat}."""
        tokens, layers, _ = hidden.shape
        order, u = torch.from_numpy(self.order).to(hidden.device), uniform.to(hidden.device).reshape(-1).split(chunk)
        space = unembedding.weight.new_empty(min(chunk, tokens * layers), unembedding.vocab)
        drawn = [
            draw_points(unembedding.products(states, space[: len(states)]), unembedding, order, of_chunk, self.points)
            for states, of_chunk in zip(row_states(hidden, chunk), u, strict=True)
        ]
        ranks, entropy = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return {"ranks": ranks.view(tokens, layers, self.points), "entropy": entropy.view(tokens, layers)}

    def finite(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """[T] bool: the entropy of logits that are not all finite is NaN."""
        return np.isfinite(arrays["entropy"]).all(1)

    def pack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """One record's ranks and entropies to streams: one symbol for each distinct id, and the bits below it.

        A distinct id is the gap to the one before it in the order: its class is the gap's number of binary digits, and
        the digits after the leading one are the bits. Symbol = class * COUNTS + min(count - 1, COUNTS - 1).
        """
        ranks, entropy = arrays["ranks"], arrays["entropy"]
        counts, gaps = _distinct(ranks.reshape(-1, self.points).astype(np.int64))
        classes = np.frexp(gaps)[1] - 1
        symbols = classes * COUNTS + np.minimum(counts - 1, COUNTS - 1)
        large = counts[counts >= COUNTS] - COUNTS
        share = np.clip(entropy / math.log(len(self.order)), 0.0, 1.0)
        return {
            "symbols": raw_stream(symbols, "uint8"),
            "bits": _pack_bits(gaps, classes),
            "counts": raw_stream(large, "uint16"),
            "entropy": raw_stream(np.rint(share * ENTROPY_STEPS), "uint16"),
        }

    def unpack(self, streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
        """-> {"ranks": [T, J, K], "counts": [T, J, K] (0 where padded), "entropy": [T, J, 1] uint16}.

        Raises ValueError where the streams do not hold N points for each token and layer.
        """
        symbols = raw_array(streams["symbols"], "uint8", -1)
        classes, counts = (symbols // COUNTS).astype(np.int64), (symbols % COUNTS).astype(np.int64) + 1
        large = counts == COUNTS
        counts[large] += raw_array(streams["counts"], "uint16", int(large.sum()))
        ends = counts.cumsum()
        rows = tokens * layers
        if not rows or not len(ends) or ends[-1] != rows * self.points:
            raise ValueError(f"it does not hold {self.points} points for {tokens} tokens and {layers} layers")
        row = (ends - counts) // self.points
        first = np.searchsorted(row, np.arange(rows))
        place = np.arange(len(row)) - first[row]
        reached = _unpack_bits(streams["bits"], classes).cumsum()
        base = np.concatenate(([0], reached))[first]
        shape = (rows, int(place.max()) + 1)
        ranks = np.zeros(shape, narrowest(len(self.order) - 1))
        ranks[row, place] = reached - base[row] - 1
        padded = np.zeros(shape, narrowest(self.points))
        padded[row, place] = counts
        entropy = raw_array(streams["entropy"], "uint16", tokens, layers, 1)
        return {
            "ranks": ranks.reshape(tokens, layers, -1),
            "counts": padded.reshape(tokens, layers, -1),
            "entropy": entropy,
        }

    def decode(
        self,
        arrays: Mapping[str, np.ndarray],
        unembedding: Unembedding | None = None,
        device: torch.device | str = "cpu",
    ) -> SparseSignal:
        """Unpacked arrays to a signal: weights are counts over all of them, the tail is 0. The head is not needed."""
        order = torch.from_numpy(self.order).to(device)
        ranks, counts, entropy = (torch.from_numpy(arrays[name]).to(device) for name in ("ranks", "counts", "entropy"))
        counts = counts.float()
        neg_entropy = entropy[..., 0].to(torch.float32) * (-math.log(len(self.order)) / ENTROPY_STEPS)
        probs = counts / counts.sum(-1, keepdim=True)
        return SparseSignal(order[ranks.long()].long(), probs, torch.zeros_like(neg_entropy), neg_entropy, tailed=False)

    def empty(
        self, layers: int, unembedding: Unembedding | None = None, device: torch.device | str = "cpu"
    ) -> SparseSignal:
        """No token, N ids each."""
        probs, tail = torch.zeros(0, layers, self.points, device=device), torch.zeros(0, layers, device=device)
        return SparseSignal(probs.long(), probs, tail, tail, tailed=False)


def every_nth(arrays: Mapping[str, np.ndarray], n: int, first: np.ndarray) -> dict[str, np.ndarray]:
    """Of each distribution's points, in their order, every n-th from point `first` [T, J] (0..n-1) on.

    Points i = first + n k are a systematic sample again, of N / n points with u' = (first + u) / n. With `first`
    uniform so is u': unbiased. With n epochs that each take the next `first`, every point is used once.
    """
    counts = arrays["counts"].astype(np.int64)
    ends = counts.cumsum(2)
    # How many of the numbers first, first + n, ... lie below a bound.
    below = np.maximum(0, -(-(np.concatenate((np.zeros_like(ends[..., :1]), ends), 2) - first[..., None]) // n))
    kept = np.diff(below, axis=2)
    front = np.argsort(kept == 0, axis=2, kind="stable")[..., : max(1, int((kept > 0).sum(2).max(initial=0)))]
    return {
        "ranks": np.take_along_axis(arrays["ranks"], front, 2),
        "counts": np.take_along_axis(kept, front, 2).astype(arrays["counts"].dtype),
        "entropy": arrays["entropy"],
    }


def _distinct(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending ranks [rows, N] -> flat (count, gap) of each run of equal ones; a row's first gap is rank + 1."""
    new = np.ones(ranks.shape, bool)
    new[:, 1:] = ranks[:, 1:] != ranks[:, :-1]
    starts = np.flatnonzero(new)
    counts = np.diff(starts, append=ranks.size)
    values = ranks.ravel()[starts]
    before = np.concatenate(([0], values[:-1]))
    before[starts % ranks.shape[1] == 0] = -1
    return counts, values - before


def _pack_bits(gaps: np.ndarray, classes: np.ndarray) -> bytes:
    """The binary digits after each gap's leading one, class by class, each class from a whole byte on."""
    parts = []
    for digits in range(1, int(classes.max(initial=0)) + 1):
        of_class = gaps[classes == digits]
        parts.append(np.packbits((of_class[:, None] >> np.arange(digits)) & 1 != 0, bitorder="little").tobytes())
    return b"".join(parts)


def _unpack_bits(stream: bytes, classes: np.ndarray) -> np.ndarray:
    """Gaps from their classes and digits. Raises ValueError where there are too few digits."""
    gaps = np.left_shift(1, classes)
    packed, position = np.frombuffer(stream, np.uint8), 0
    for digits in range(1, int(classes.max(initial=0)) + 1):
        where = np.flatnonzero(classes == digits)
        size = -(-len(where) * digits // 8)
        if position + size > len(packed):
            raise ValueError("it has fewer binary digits than its symbols ask for")
        bits = np.unpackbits(packed[position : position + size], count=len(where) * digits, bitorder="little")
        gaps[where] += bits.reshape(-1, digits) @ np.left_shift(1, np.arange(digits))
        position += size
    return gaps
