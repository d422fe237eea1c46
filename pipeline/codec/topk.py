"""The topk codec: the k most likely ids and one bucket for all others. Other systems store this; kept for comparison.

T response tokens, J teacher layers, K kept ids, V common vocabulary, d width of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.packing import narrowest, raw_arrays, raw_stream, to_device
from pipeline.rows import row_states
from pipeline.signal import SparseSignal, Unembedding


class TopK:
    """Stores the k most likely ids, and one bucket for all others: the tail.

    Stored are the ids by falling probability, their log-probabilities in float16, and the tail's mass in float32,
    computed from the true distribution. float16 changes a probability by at most 0.05 % at p > 0.14, and 0.4 % at
    p > 1e-7.

    Decoding scales the kept probabilities to their true total, 1 - tail, never to 1. So entries and tail sum to 1
    within float32 rounding, and no entry exceeds 1. The negative entropy is computed from the decoded numbers, so
    KL(p, p) = 0. With k >= V the tail is exactly 0.
    """

    name = "topk"
    PARAMS = ("k",)
    needs_head = False
    needs_order = False

    def __init__(self, k: int = 64):
        if k < 1:
            raise ValueError(f"topk keeps at least one id, asked for k={k}")
        self.k = k
        self.params: dict[str, Any] = {"k": k}

    @torch.no_grad()
    def encode(self, hidden: Tensor, unembedding: Unembedding, uniform: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
        """[T, J, d] -> {"ids": [T, J, K] int32, "logprobs": [T, J, K] float16, "tail": [T, J] float32}."""
        tokens, layers, _ = hidden.shape
        kept = min(self.k, unembedding.vocab)
        rows = [self._encode_rows(unembedding.logits(states), kept) for states in row_states(hidden, chunk)]
        ids, logprobs, tail = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return {
            "ids": ids.view(tokens, layers, kept),
            "logprobs": logprobs.view(tokens, layers, kept),
            "tail": tail.view(tokens, layers),
        }

    @staticmethod
    def _encode_rows(logits: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        top, ids = logits.topk(kept)
        # Not 1 - the sum of the kept ones: for a sharp distribution that would be rounding noise.
        rest = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        total = torch.logaddexp(rest, top.logsumexp(-1))
        return ids.int(), (top - total[:, None]).half(), (rest - total).exp()

    def finite(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """[T] bool: whether no stored log-probability of a token is NaN.

        This finds every logit that is not finite: topk treats it as the largest, and its log-probability is NaN.
        """
        return ~np.isnan(arrays["logprobs"]).any((1, 2))

    def pack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """One record's arrays -> streams of raw numbers. Ids take the narrowest dtype that holds them."""
        ids = narrowest(int(arrays["ids"].max(initial=0)))
        types = {"ids": ids, "logprobs": "float16", "tail": "float32"}
        return {f"{name}.{dtype}": raw_stream(arrays[name], dtype) for name, dtype in types.items()}

    def token_bytes(self, layers: int) -> int:
        """k ids and log-probabilities, and the tail, of each layer."""
        return layers * (self.k * (4 + 2) + 4)

    def unpack(self, streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
        """-> {"ids": [T, J, K], "logprobs": [T, J, K], "tail": [T, J, 1]}. Raises ValueError where sizes do not fit."""
        return raw_arrays(streams, tokens, layers)

    def decode(
        self,
        arrays: Mapping[str, np.ndarray],
        unembedding: Unembedding | None = None,
        device: torch.device | str = "cpu",
    ) -> SparseSignal:
        """Unpacked arrays -> a signal. Needs no head."""
        ids, logprobs, tail = (to_device(arrays[name], device) for name in ("ids", "logprobs", "tail"))
        probs, tail = logprobs.float().exp(), tail[..., 0]
        probs = (probs * ((1 - tail) / probs.sum(-1))[..., None]).clamp(max=1.0)
        neg_entropy = torch.xlogy(probs, probs).sum(-1) + torch.xlogy(tail, tail)
        return SparseSignal(ids.long(), probs, tail, neg_entropy)

    def empty(
        self, layers: int, unembedding: Unembedding | None = None, device: torch.device | str = "cpu"
    ) -> SparseSignal:
        """A signal of no token: ids [0, J, k]."""
        probs, tail = torch.zeros(0, layers, self.k, device=device), torch.zeros(0, layers, device=device)
        return SparseSignal(probs.long(), probs, tail, tail)
