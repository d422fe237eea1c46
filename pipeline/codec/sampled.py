"""The sampled codec: a systematic sample of each distribution. Unbiased, a few tens of bytes for each token and layer.

T response tokens, J teacher layers, N points, K distinct ids among them, V common vocabulary, d width of the teacher.

The vocabulary has a fixed order: the ids that the teacher uses most come first. Each token and layer has one random
number u, uniform in [0, 1). Point i of N lies at (i + u) / N of the distribution's cumulative mass and selects the id
there:

    ranks = searchsorted(cumsum(p[order]), (arange(N) + u) / N)       # counts / N estimates p: E[counts / N] = p

Every id gets about N p points, rounded down or up, so the error is far below that of independent draws. The entropy
H(p) is stored too. The KL is then estimated as cross-entropy - H. The mean of this estimate is the dense KL, and the
mean of its gradient is the dense gradient: no id is cut off, and nothing is renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.packing import narrowest, raw_array, raw_stream, to_device
from pipeline.codec.systematic import draw_points
from pipeline.rows import row_states
from pipeline.signal import SparseSignal, Unembedding

COUNTS = 12
"""Number of count values in a symbol. A symbol holds a gap's class and a count below this; larger counts have their
own stream."""

ENTROPY_STEPS = 2**16 - 1
"""Steps of the stored entropy, which is a share of its maximum ln V in two bytes: exact to 1e-4 nat."""


class Sampled:
    """Stores N systematic points of each distribution, and its entropy."""

    name = "sampled"
    PARAMS = ("points", "seed")
    needs_head = False
    needs_order = True

    def __init__(self, points: int = 64, seed: int = 0, order: np.ndarray | None = None):
        """order: [V] all ids, those that the teacher uses most first. Without it only the name and parameters work.

        Raises ValueError for points outside 16..1024.
        """
        if not 16 <= points <= 1024:
            raise ValueError(f"sampled draws 16 to 1024 points, asked for points={points}")
        self.points, self.seed, self._order = points, seed, order
        self.params: dict[str, Any] = {"points": points, "seed": seed}

    @property
    def order(self) -> np.ndarray:
        """[V] all ids, most used first. Raises ValueError where the codec was created without an order."""
        if self._order is None:
            raise ValueError("the sampled codec needs the order of the vocabulary: make_codec(..., order=...)")
        return self._order

    @torch.no_grad()
    def encode(self, hidden: Tensor, unembedding: Unembedding, uniform: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
        """[T, J, d] and u [T, J] -> {"ranks": [T, J, N] int32 ascending, "entropy": [T, J] float32, nats}."""
        tokens, layers, _ = hidden.shape
        order, u = (to_device(array, hidden.device) for array in (self.order, uniform))
        products = unembedding.buffer(min(chunk, tokens * layers))
        drawn = [
            draw_points(unembedding.products(states, products[: len(states)]), unembedding, order, u_chunk, self.points)
            for states, u_chunk in zip(row_states(hidden, chunk), u.reshape(-1).split(chunk), strict=True)
        ]
        ranks, entropy = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return {"ranks": ranks.view(tokens, layers, self.points), "entropy": entropy.view(tokens, layers)}

    def finite(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """[T] bool: whether a token's entropies are finite. Where a logit is not finite, the entropy is NaN."""
        return np.isfinite(arrays["entropy"]).all(1)

    def pack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """One record's ranks and entropies -> streams: one symbol for each distinct id, and its gap's low digits.

        A distinct id is stored as its gap to the previous one in the order. The class of a gap is its number of binary
        digits minus 1. The digits after the leading one go to the stream "bits".
        Symbol = class * COUNTS + min(count - 1, COUNTS - 1).
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

    def token_bytes(self, layers: int) -> int:
        """For each point at most a symbol, four bytes of digits and a count; an entropy, and each class's last byte."""
        return layers * (self.points * (1 + 4 + 2) + 2) + 32

    def unpack(self, streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
        """-> {"ranks": [T, J, K], "counts": [T, J, K] (0 for padding), "entropy": [T, J, 1] uint16}.

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
        column = np.arange(len(row)) - first[row]
        cumulative = _unpack_bits(streams["bits"], classes).cumsum()
        base = np.concatenate(([0], cumulative))[first]
        shape = (rows, int(column.max()) + 1)
        ranks = np.zeros(shape, narrowest(len(self.order) - 1))
        ranks[row, column] = cumulative - base[row] - 1
        padded = np.zeros(shape, narrowest(self.points))
        padded[row, column] = counts
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
        """Unpacked arrays -> a signal. A probability is a count / the sum of counts; the tail is 0. Needs no head."""
        order = to_device(self.order, device)
        ranks, counts, entropy = (to_device(arrays[name], device) for name in ("ranks", "counts", "entropy"))
        counts = counts.float()
        neg_entropy = entropy[..., 0].to(torch.float32) * (-math.log(len(self.order)) / ENTROPY_STEPS)
        probs = counts / counts.sum(-1, keepdim=True)
        return SparseSignal(
            order[ranks.long()].long(), probs, torch.zeros_like(neg_entropy), neg_entropy, has_tail=False
        )

    def empty(
        self, layers: int, unembedding: Unembedding | None = None, device: torch.device | str = "cpu"
    ) -> SparseSignal:
        """A signal of no token: ids [0, J, N]."""
        probs, tail = torch.zeros(0, layers, self.points, device=device), torch.zeros(0, layers, device=device)
        return SparseSignal(probs.long(), probs, tail, tail, has_tail=False)


def every_nth(arrays: Mapping[str, np.ndarray], n: int, first: np.ndarray) -> dict[str, np.ndarray]:
    """Keep every n-th point of each distribution, starting at point `first` [T, J] (0..n-1). Takes unpacked arrays.

    The points i = first + n k are again a systematic sample, of N / n points with u' = (first + u) / n. With a uniform
    `first`, u' is uniform too, so the sample is unbiased. Over n epochs that each take the next `first`, every point is
    used once.
    """
    counts = arrays["counts"].astype(np.int64)
    ends = counts.cumsum(2)
    # How many of the numbers first, first + n, ... lie below each bound.
    below = np.maximum(0, -(-(np.concatenate((np.zeros_like(ends[..., :1]), ends), 2) - first[..., None]) // n))
    kept = np.diff(below, axis=2)
    front = np.argsort(kept == 0, axis=2, kind="stable")[..., : max(1, int((kept > 0).sum(2).max(initial=0)))]
    return {
        "ranks": np.take_along_axis(arrays["ranks"], front, 2),
        "counts": np.take_along_axis(kept, front, 2).astype(arrays["counts"].dtype),
        "entropy": arrays["entropy"],
    }


def _distinct(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending ranks [rows, N] -> flat (counts, gaps) of the runs of equal ranks. A row's first gap is rank + 1."""
    new = np.ones(ranks.shape, bool)
    new[:, 1:] = ranks[:, 1:] != ranks[:, :-1]
    starts = np.flatnonzero(new)
    counts = np.diff(starts, append=ranks.size)
    values = ranks.ravel()[starts]
    before = np.concatenate(([0], values[:-1]))
    before[starts % ranks.shape[1] == 0] = -1
    return counts, values - before


def _pack_bits(gaps: np.ndarray, classes: np.ndarray) -> bytes:
    """The binary digits after each gap's leading one, class by class. Each class starts at a whole byte."""
    parts = []
    for digits in range(1, int(classes.max(initial=0)) + 1):
        of_class = gaps[classes == digits]
        parts.append(np.packbits((of_class[:, None] >> np.arange(digits)) & 1 != 0, bitorder="little").tobytes())
    return b"".join(parts)


def _unpack_bits(stream: bytes, classes: np.ndarray) -> np.ndarray:
    """Gaps from their classes and packed digits. Raises ValueError where there are too few digits."""
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
