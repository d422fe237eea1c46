"""How a teacher's distributions become bytes, and a signal again: what every codec does, and which there are.

T response tokens, J teacher layers, d width of the teacher. Stored names and numbers: docs/cache_format.md. A new codec
is one class in a file of its own and one row in CODECS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.hidden import Hidden
from pipeline.codec.sampled import Sampled
from pipeline.codec.topk import TopK
from pipeline.errors import CacheError
from pipeline.signal import Signal, Unembedding


class Codec(Protocol):
    """One way to write down J distributions a token."""

    name: str
    params: dict[str, Any]
    needs_head: bool
    """Whether decoding needs the teacher's language head."""
    needs_order: bool
    """Whether it needs the order of the vocabulary by use, which is then stored with the cache."""

    def encode(self, hidden: Tensor, unembedding: Unembedding, uniform: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
        """Normed verbalizer outputs [T, J, d] to arrays [T, J, ...], on the device where they are.

        uniform: [T, J] random numbers in [0, 1), see draws.py; codecs that draw nothing do not look at them. Logits
        exist for at most `chunk` rows, each one token of one layer, at a time.
        """
        ...

    def finite(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """[T] bool: the tokens of whose arrays, as encode gave them, all numbers come from finite ones.

        The others can be neither packed nor decoded: their samples are skipped.
        """
        ...

    def pack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """One record's arrays, as encode gave them, to named streams of bytes, not yet compressed."""
        ...

    def unpack(self, streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
        """Streams to arrays [T, J, n], narrow, good for passing between processes; n may differ between records.

        Raises ValueError (KeyError for a stream that is not there) where they do not fit T and J.
        """
        ...

    def decode(
        self,
        arrays: Mapping[str, np.ndarray],
        unembedding: Unembedding | None = None,
        device: torch.device | str = "cpu",
    ) -> Signal:
        """Unpacked arrays of some layers to what those layers say."""
        ...

    def empty(self, layers: int, unembedding: Unembedding | None = None, device: torch.device | str = "cpu") -> Signal:
        """What `layers` layers say about no token at all: a rank whose micro-batch had no good sample computes too."""
        ...


CODECS: dict[str, Any] = {codec.name: codec for codec in (Sampled, TopK, Hidden)}
"""Known codecs by name."""


def make_codec(name: str, order: np.ndarray | None = None, **params: Any) -> Codec:
    """The codec that a recipe or a cache names; `order` for those that need it, which otherwise cannot code anything.

    Raises CacheError for a name or parameter that this version lacks.
    """
    if name not in CODECS:
        raise CacheError(f"codec '{name}' is not known here; expected one of {', '.join(CODECS)}: upgrade this package")
    try:
        return CODECS[name](**params, **({"order": order} if CODECS[name].needs_order else {}))
    except (TypeError, ValueError) as error:
        raise CacheError(f"codec '{name}' does not take {params}: {error}") from None
