"""The hidden codec: stores the normed verbalizer outputs. Exact, but its size grows with the teacher's width.

T response tokens, J teacher layers, d width of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.packing import raw_arrays, raw_stream, to_device
from pipeline.signal import HiddenSignal, Unembedding

MOST_WIDTH = 65_536
"""Width of a state that is unpacked: several times that of today's largest models."""


class Hidden:
    """Stores normed verbalizer outputs. The teacher's head, stored once for each cache, turns them into logits.

    dtype float32 is exact. bfloat16 is exact where the teacher runs in bfloat16.
    """

    name = "hidden"
    PARAMS = ("dtype",)
    needs_head = True
    needs_order = False

    def __init__(self, dtype: str = "bfloat16"):
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"hidden states are stored as bfloat16 or float32, asked for {dtype}")
        self.dtype = dtype
        self.params: dict[str, Any] = {"dtype": dtype}

    @torch.no_grad()
    def encode(self, hidden: Tensor, unembedding: Unembedding, uniform: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
        """Hidden states [T, J, d] -> {"hidden": [T, J, d]} in the codec's dtype."""
        return {"hidden": hidden.to(getattr(torch, self.dtype))}

    def finite(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """[T] bool: whether all hidden states of a token are finite. Logits are not checked: this codec makes none."""
        return self._states(arrays).isfinite().flatten(1).all(1).numpy()

    def pack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """One record's hidden states -> one stream of raw numbers."""
        return {f"hidden.{self.dtype}": raw_stream(arrays["hidden"], self.dtype)}

    def token_bytes(self, layers: int) -> int:
        """A state of each layer, as wide as any model's. The true width is known where the head is."""
        return layers * MOST_WIDTH * getattr(torch, self.dtype).itemsize

    def unpack(self, streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
        """-> {"hidden": [T, J, d]}, bfloat16 as its bits. Raises ValueError where the size does not fit T and J."""
        return raw_arrays(streams, tokens, layers)

    def decode(
        self,
        arrays: Mapping[str, np.ndarray],
        unembedding: Unembedding | None = None,
        device: torch.device | str = "cpu",
    ) -> HiddenSignal:
        """Unpacked arrays -> a signal. Raises ValueError without the teacher's head (TeacherCache.unembedding)."""
        return HiddenSignal(to_device(self._states(arrays), device), _required(unembedding))

    def empty(
        self, layers: int, unembedding: Unembedding | None = None, device: torch.device | str = "cpu"
    ) -> HiddenSignal:
        """A signal of no token: hidden [0, J, d]. Raises ValueError without the teacher's head."""
        head = _required(unembedding)
        shape = (0, layers, head.weight.shape[1])
        return HiddenSignal(torch.zeros(shape, dtype=getattr(torch, self.dtype), device=device), head)

    def _states(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        return torch.from_numpy(arrays["hidden"]).view(getattr(torch, self.dtype))


def _required(unembedding: Unembedding | None) -> Unembedding:
    if unembedding is None:
        raise ValueError("the hidden codec decodes through the teacher's head: pass its unembedding")
    return unembedding
