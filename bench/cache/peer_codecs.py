"""Codecs of other systems, with the interface of the project's codecs: the arithmetic of their formats.

T response tokens, J teacher layers, V vocabulary, k kept ids. Written from the systems' own descriptions and code,
without using their code. Their containers and metadata are left out, which favours them. Log-probabilities are natural.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.packing import raw_array, raw_stream, to_numpy
from pipeline.codec.sampled import Sampled
from pipeline.codec.topk import TopK
from pipeline.signal import SparseSignal, Unembedding

Arrays = Mapping[str, np.ndarray]


class RenormalisedTopK(TopK):
    """The k most likely ids with float16 log-probabilities, scaled to sum to 1: the most common offline format."""

    name = "renormalised_topk"

    def pack(self, arrays: Arrays) -> dict[str, bytes]:
        """As TopK, without the tail."""
        return {name: stream for name, stream in super().pack(arrays).items() if not name.startswith("tail")}

    def decode(
        self, arrays: Arrays, unembedding: Unembedding | None = None, device: torch.device | str = "cpu"
    ) -> SparseSignal:
        """Probabilities over the kept ids only."""
        return _renormalised(torch.from_numpy(arrays["ids"]).long(), torch.from_numpy(arrays["logprobs"]).float())


class MegatronTopK:
    """Megatron-LM's offline logits: k = 128, float16 log-probabilities, 16-bit ids, the 17th bit in its own plane.

    Its loss assigns the missing probability of both distributions to one additional id (a "ghost token"), computed from
    the stored numbers.
    """

    name = "megatron_topk"
    needs_head = False
    needs_order = False

    def __init__(self, k: int = 128):
        self.k = k
        self.params: dict[str, Any] = {"k": k}

    def encode(self, hidden: Tensor, unembedding: Unembedding, uniform: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
        """[T, J, d] -> {"ids": [T, J, k], "logprobs": [T, J, k] float16}."""
        ids, logprobs = _top(hidden, unembedding, self.k, chunk)
        return {"ids": ids, "logprobs": logprobs.half()}

    def pack(self, arrays: Arrays) -> dict[str, bytes]:
        """The three streams of the format."""
        ids = arrays["ids"]
        return {
            "low": raw_stream(ids & 0xFFFF, "uint16"),
            "high": np.packbits(ids >> 16 != 0).tobytes(),
            "logprobs": raw_stream(arrays["logprobs"], "float16"),
        }

    def unpack(self, streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
        """The arrays that `encode` gave."""
        low = raw_array(streams["low"], "uint16", tokens, layers, self.k).astype(np.int32)
        high = np.unpackbits(np.frombuffer(streams["high"], np.uint8), count=low.size).reshape(low.shape)
        logprobs = raw_array(streams["logprobs"], "float16", tokens, layers, self.k)
        return {"ids": low | high.astype(np.int32) << 16, "logprobs": logprobs}

    def decode(
        self, arrays: Arrays, unembedding: Unembedding | None = None, device: torch.device | str = "cpu"
    ) -> SparseSignal:
        """Decode to a signal whose tail is the ghost token."""
        return _with_tail(torch.from_numpy(arrays["ids"]).long(), torch.from_numpy(arrays["logprobs"]).float())


class DistillKit:
    """DistillKit's compressed logits: the first log-probabilities in bfloat16, the others as a curve over their rank.

    The curve is a least-squares fit of a few terms (powers of the rank, or its square root) in float32. Ids are packed
    with ceil(log2 V) bits each. By default its loss sets the missing probability to zero and scales the rest to sum to
    1 (`missing="zero"`); "symmetric_uniform" compares the missing probability as one bucket. A curve may exceed the
    available probability; then the probabilities sum to more than 1, here as in the original. On SmolLM2's
    distributions this code gives DistillKit's (a61c2e7) probabilities within 4e-4, and the same bytes.
    """

    name = "distillkit"
    needs_head = False
    needs_order = False

    def __init__(self, vocab: int, k: int, exact: int, terms: Sequence[int | str], missing: str = "zero"):
        self.vocab, self.k, self.exact = vocab, k, exact
        self.bits = (vocab - 1).bit_length()
        self.params: dict[str, Any] = {"k": k, "exact_k": exact, "terms": list(terms), "missing": missing}
        self._missing = missing
        rank = torch.arange(k - exact, dtype=torch.float32)
        self._basis = torch.stack([rank.sqrt() if term == "sqrt" else rank**term for term in terms], 1)
        self._inverse = torch.linalg.pinv(self._basis, atol=1e-5, rtol=0.0)

    def fit(self, logprobs: Tensor) -> Tensor:
        """[..., k - exact] log-probabilities -> coefficients [..., terms]."""
        return logprobs @ self._inverse.T

    def curve(self, coefficients: Tensor) -> Tensor:
        """Coefficients [..., terms] -> log-probabilities [..., k - exact]."""
        return coefficients @ self._basis.T

    def encode(self, hidden: Tensor, unembedding: Unembedding, uniform: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
        """[T, J, d] -> {"ids": [T, J, k], "exact": [T, J, exact] bfloat16, "curve": [T, J, terms] float32}."""
        ids, logprobs = _top(hidden, unembedding, self.k, chunk)
        curve = self.fit(logprobs[..., self.exact :])
        return {"ids": ids, "exact": logprobs[..., : self.exact].bfloat16(), "curve": curve}

    def pack(self, arrays: Arrays) -> dict[str, bytes]:
        """The three streams of the format; each distribution's ids begin at a whole byte."""
        digits = (arrays["ids"][..., None] >> np.arange(self.bits)) & 1
        return {
            "ids": np.packbits(digits.reshape(-1, self.k * self.bits).astype(bool), axis=1).tobytes(),
            "exact": raw_stream(arrays["exact"], "bfloat16"),
            "curve": raw_stream(arrays["curve"], "float32"),
        }

    def unpack(self, streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
        """The arrays that `encode` gave."""
        packed = raw_array(streams["ids"], "uint8", tokens, layers, -1)
        digits = np.unpackbits(packed, axis=2, count=self.k * self.bits).reshape(tokens, layers, self.k, self.bits)
        return {
            "ids": digits @ np.left_shift(1, np.arange(self.bits)),
            "exact": raw_array(streams["exact"], "bfloat16", tokens, layers, self.exact),
            "curve": raw_array(streams["curve"], "float32", tokens, layers, self._basis.shape[1]),
        }

    def decode(
        self, arrays: Arrays, unembedding: Unembedding | None = None, device: torch.device | str = "cpu"
    ) -> SparseSignal:
        """Kept ids with the log-probabilities given by the curve."""
        exact = torch.from_numpy(arrays["exact"]).view(torch.bfloat16).float()
        curve = self.curve(torch.from_numpy(arrays["curve"]))
        ids, logprobs = torch.from_numpy(arrays["ids"]).long(), torch.cat((exact, curve), -1)
        return (_renormalised if self._missing == "zero" else _with_tail)(ids, logprobs)


class RandomSampling(Sampled):
    """Random Sampling KD (arXiv 2503.16870): N independent draws from each distribution, stored as counts.

    Its authors publish no format. Here it is packed, and given the entropy, like the project's systematic sample, so
    that the two differ only in the draw.
    """

    name = "random_sampling"

    @torch.no_grad()
    def encode(self, hidden: Tensor, unembedding: Unembedding, uniform: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
        """As Sampled, but with independent uniform points; `uniform` is not used."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.from_numpy(self.order).long()
        ranks, entropies = [], []
        for rows in hidden.flatten(0, 1).split(chunk):
            log_p = unembedding.logits(rows).log_softmax(1)
            p = log_p.exp()
            mass = p.index_select(1, order).cumsum(1, dtype=torch.float64)
            points = torch.rand(len(rows), self.points, generator=generator, dtype=torch.float64) * mass[:, -1:]
            found = torch.searchsorted(mass, points.sort(1).values, right=True)
            ranks.append(found.clamp_(max=mass.shape[1] - 1).int())
            entropies.append(-(p * log_p).sum(1))
        shape = hidden.shape[:2]
        return {"ranks": torch.cat(ranks).view(*shape, -1), "entropy": torch.cat(entropies).view(shape)}


def published(vocab: int, order: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The other systems' codecs at their published settings, by the names of the results' entries."""
    budget: dict[str, Any] = {"vocab": vocab, "k": 50, "exact": 1, "terms": (0, 1, "sqrt")}
    return {
        "renormalised_top64": RenormalisedTopK(64),
        "megatron_top128": MegatronTopK(128),
        "distillkit_k50": DistillKit(**budget),
        "distillkit_k50_bucket": DistillKit(**budget, missing="symmetric_uniform"),
        "distillkit_k128": DistillKit(vocab=vocab, k=128, exact=16, terms=(0, 1, 2, 3, 4, "sqrt")),
        "random_sampling64": RandomSampling(64, seed, order),
    }


@torch.no_grad()
def _top(hidden: Tensor, unembedding: Unembedding, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The k most likely ids of each row (int32) and their log-probabilities, both [T, J, k]."""
    ids, logprobs = [], []
    for rows in hidden.flatten(0, 1).split(chunk):
        logits = unembedding.logits(rows)
        top = logits.topk(k)
        ids.append(top.indices.int())
        logprobs.append(top.values - logits.logsumexp(1, keepdim=True))
    shape = (*hidden.shape[:2], k)
    return torch.cat(ids).view(shape), torch.cat(logprobs).view(shape)


def _renormalised(ids: Tensor, logprobs: Tensor) -> SparseSignal:
    log_p = logprobs.log_softmax(-1)
    p, zero = log_p.exp(), torch.zeros(log_p.shape[:-1])
    return SparseSignal(ids, p, zero, (p * log_p).sum(-1))


def _with_tail(ids: Tensor, logprobs: Tensor) -> SparseSignal:
    p = logprobs.exp()
    tail = (1.0 - p.sum(-1)).clamp_min(1e-6)
    return SparseSignal(ids, p, tail, (p * logprobs).sum(-1) + tail * tail.log())


def record_arrays(arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Output of `encode` in the form that `pack` takes."""
    return {name: to_numpy(tensor) for name, tensor in arrays.items()}
