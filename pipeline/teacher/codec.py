"""How a teacher's distributions become bytes, and a signal again.

T response tokens, J teacher layers, K kept ids, V common vocabulary, d width of the teacher.

A codec makes named arrays whose first two dimensions are [T, J]. On disk each is one member, `NAME.DTYPE`: raw
little-endian numbers in C order, no header, no pickle. A new codec is one class here and one row in CODECS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CacheError
from pipeline.teacher.signal import HiddenSignal, Signal, SparseSignal, Unembedding

DTYPES: dict[str, np.dtype[Any]] = {
    "uint16": np.dtype("<u2"),
    "int32": np.dtype("<i4"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),  # numpy has none: the same bits as unsigned integers
}
"""What a member's name may say its numbers are."""


class Codec(Protocol):
    """One way to write down J distributions a token."""

    name: str
    params: dict[str, Any]
    needs_head: bool
    """Whether decoding needs the teacher's language head."""

    def encode(self, hidden: Tensor, unembedding: Unembedding, chunk: int = 1024) -> dict[str, Tensor]:
        """Normed verbalizer outputs [T, J, d] to arrays [T, J, ...], on the device where they are.

        Logits exist for at most `chunk` rows, each one token of one layer, at a time.
        """
        ...

    def decode(
        self,
        arrays: Mapping[str, np.ndarray],
        columns: Sequence[int],
        unembedding: Unembedding | None = None,
        device: torch.device | str = "cpu",
    ) -> Signal:
        """Arrays to a signal of the teacher layers in `columns` (of J), in the order asked."""
        ...

    def empty(self, layers: int, unembedding: Unembedding | None = None, device: torch.device | str = "cpu") -> Signal:
        """What `layers` layers say about no token at all: a rank whose micro-batch had no good sample computes too."""
        ...


class TopK:
    """The k likeliest ids, and one bucket for all others.

    Stored: ids by falling probability, float16 log-probabilities, and the bucket's mass in float32, computed from the
    true distribution. float16 moves a probability by at most 0.05 % at p > 0.14 and 0.4 % at p > 1e-7. Decoding scales
    the kept ones back to the mass that they truly hold, 1 - tail (never to 1), so entries and tail sum to 1 within
    float32 rounding, no entry exceeds 1, and KL(p, p) = 0 with the negative entropy taken from the decoded numbers.
    With k >= V the tail is exactly 0.
    """

    name = "topk"
    needs_head = False

    def __init__(self, k: int = 64):
        if k < 1:
            raise ValueError(f"topk keeps at least one id, asked for k={k}")
        self.k = k
        self.params: dict[str, Any] = {"k": k}

    @torch.no_grad()
    def encode(self, hidden: Tensor, unembedding: Unembedding, chunk: int = 1024) -> dict[str, Tensor]:
        """[T, J, d] -> {"ids": [T, J, K] int32, "logprobs": [T, J, K] float16, "tail": [T, J] float32}."""
        tokens, layers, width = hidden.shape
        kept = min(self.k, unembedding.vocab)
        rows = [self._encode_rows(part, unembedding, kept) for part in hidden.reshape(-1, width).split(chunk)]
        ids, logprobs, tail = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return {
            "ids": ids.view(tokens, layers, kept),
            "logprobs": logprobs.view(tokens, layers, kept),
            "tail": tail.view(tokens, layers),
        }

    @staticmethod
    def _encode_rows(hidden: Tensor, unembedding: Unembedding, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = unembedding.logits(hidden)
        top, ids = logits.topk(kept)
        # Not 1 - sum of the kept: that would be rounding noise where the distribution is sharp.
        rest = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        total = torch.logaddexp(rest, top.logsumexp(-1))
        return ids.int(), (top - total[:, None]).half(), (rest - total).exp()

    def decode(
        self,
        arrays: Mapping[str, np.ndarray],
        columns: Sequence[int],
        unembedding: Unembedding | None = None,
        device: torch.device | str = "cpu",
    ) -> SparseSignal:
        """The head is not needed."""
        ids, logprobs, tail = (_select(arrays[name], columns, device) for name in ("ids", "logprobs", "tail"))
        probs, tail = logprobs.float().exp(), tail[..., 0]
        probs = (probs * ((1 - tail) / probs.sum(-1))[..., None]).clamp(max=1.0)
        neg_entropy = torch.xlogy(probs, probs).sum(-1) + torch.xlogy(tail, tail)
        return SparseSignal(ids.long(), probs, tail, neg_entropy)

    def empty(
        self, layers: int, unembedding: Unembedding | None = None, device: torch.device | str = "cpu"
    ) -> SparseSignal:
        """No token, k ids each."""
        probs, tail = torch.zeros(0, layers, self.k, device=device), torch.zeros(0, layers, device=device)
        return SparseSignal(probs.long(), probs, tail, tail)


class Hidden:
    """The normed verbalizer output itself; the teacher's head, stored once a cache, makes logits of it. Exact.

    dtype float32 loses nothing; bfloat16 loses nothing where the teacher runs in bfloat16.
    """

    name = "hidden"
    needs_head = True

    def __init__(self, dtype: str = "bfloat16"):
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"hidden states are stored as bfloat16 or float32, asked for {dtype}")
        self.dtype = dtype
        self.params: dict[str, Any] = {"dtype": dtype}

    @torch.no_grad()
    def encode(self, hidden: Tensor, unembedding: Unembedding, chunk: int = 1024) -> dict[str, Tensor]:
        """[T, J, d] -> {"hidden": [T, J, d]}."""
        return {"hidden": hidden.to(getattr(torch, self.dtype))}

    def decode(
        self,
        arrays: Mapping[str, np.ndarray],
        columns: Sequence[int],
        unembedding: Unembedding | None = None,
        device: torch.device | str = "cpu",
    ) -> HiddenSignal:
        """Raises ValueError without the teacher's head, which TeacherCache.unembedding has."""
        hidden = _select(arrays["hidden"], columns, device)
        hidden = hidden.view(torch.bfloat16) if self.dtype == "bfloat16" else hidden
        return HiddenSignal(hidden, _required(unembedding))

    def empty(
        self, layers: int, unembedding: Unembedding | None = None, device: torch.device | str = "cpu"
    ) -> HiddenSignal:
        """No token, as wide as the head."""
        head = _required(unembedding)
        shape = (0, layers, head.weight.shape[1])
        return HiddenSignal(torch.zeros(shape, dtype=getattr(torch, self.dtype), device=device), head)


CODECS: dict[str, Any] = {codec.name: codec for codec in (TopK, Hidden)}
"""Known codecs by name."""


def make_codec(name: str, **params: Any) -> Codec:
    """The codec that a recipe or a cache names. Raises CacheError for a name or parameter that this version lacks."""
    if name not in CODECS:
        raise CacheError(f"codec '{name}' is not known here; expected one of {', '.join(CODECS)}: upgrade this package")
    try:
        return CODECS[name](**params)
    except (TypeError, ValueError) as error:
        raise CacheError(f"codec '{name}' does not take {params}: {error}") from None


def to_bytes(arrays: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Arrays of one record to members: {"NAME.DTYPE": bytes}. Ids that all fit are stored as uint16."""
    members = {}
    for name, tensor in arrays.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            dtype, array = "bfloat16", tensor.view(torch.uint16).numpy()
        elif tensor.dtype == torch.int32 and (not tensor.numel() or int(tensor.max()) < 2**16):
            dtype, array = "uint16", tensor.numpy().astype(DTYPES["uint16"])
        else:
            dtype, array = str(tensor.dtype).removeprefix("torch."), tensor.numpy()
        members[f"{name}.{dtype}"] = array.astype(DTYPES[dtype], copy=False).tobytes()
    return members


def from_bytes(members: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
    """Members to arrays [tokens, layers, numbers of each]; bfloat16 comes as its bits in uint16.

    Raises ValueError for an unknown dtype or a size that is no multiple of tokens x layers numbers.
    """
    arrays = {}
    for member, data in members.items():
        name, _, dtype = member.partition(".")
        if dtype not in DTYPES:
            raise ValueError(f"member '{member}': expected NAME.DTYPE with one of {', '.join(DTYPES)}")
        row = tokens * layers * DTYPES[dtype].itemsize
        if not row or not data or len(data) % row:
            raise ValueError(
                f"member '{member}' has {len(data)} bytes, no multiple of {tokens} tokens x {layers} layers"
            )
        arrays[name] = np.frombuffer(data, DTYPES[dtype]).reshape(tokens, layers, -1)
    return arrays


def _required(unembedding: Unembedding | None) -> Unembedding:
    if unembedding is None:
        raise ValueError("the hidden codec decodes through the teacher's head: pass its unembedding")
    return unembedding


def _select(array: np.ndarray, columns: Sequence[int], device: torch.device | str) -> Tensor:
    """Columns of [T, J, n] as a tensor on the device: narrow numbers travel, and widen there."""
    return torch.from_numpy(np.ascontiguousarray(array[:, list(columns)])).to(device)
