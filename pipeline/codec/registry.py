"""The codec interface and the table of codecs: teacher distributions to bytes, and back to a signal.

T response tokens, J teacher layers, d width of the teacher. docs/cache_format.md lists the stored names and numbers. To
add a codec, write one class in a file of its own and add it to CODECS.
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
    """A way to store J distributions for each token."""

    name: str
    params: dict[str, Any]
    needs_head: bool
    """Whether decoding needs the teacher's language head."""
    needs_order: bool
    """Whether coding needs the vocabulary order, which is then stored with the cache."""

    def encode(self, hidden: Tensor, unembedding: Unembedding, uniform: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
        """Normed verbalizer outputs [T, J, d] -> arrays [T, J, ...], on the same device.

        uniform: [T, J] random numbers in [0, 1), see random.py. Codecs that draw nothing ignore them.
        chunk: the most rows whose logits exist at one time. A row is one token of one layer.
        """
        ...

    def finite(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """[T] bool: whether a token's arrays, as `encode` returned them, come from finite numbers only.

        The other tokens can be neither packed nor decoded, so their samples are skipped.
        """
        ...

    def pack(self, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """One record's arrays, as `encode` returned them -> named streams of bytes, not yet compressed."""
        ...

    def token_bytes(self, layers: int) -> int:
        """The most bytes of streams that one token of so many layers takes."""
        ...

    def unpack(self, streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
        """Streams -> arrays [T, J, n] of narrow dtypes, cheap to pass between processes. n may differ between records.

        Raises ValueError where the streams do not fit T and J, and KeyError for a missing stream.
        """
        ...

    def decode(
        self,
        arrays: Mapping[str, np.ndarray],
        unembedding: Unembedding | None = None,
        device: torch.device | str = "cpu",
    ) -> Signal:
        """Unpacked arrays of some layers -> the signal of those layers."""
        ...

    def empty(self, layers: int, unembedding: Unembedding | None = None, device: torch.device | str = "cpu") -> Signal:
        """A signal of no token and `layers` layers.

        A rank whose micro-batch has no good sample needs it, because it must take part in the computation too.
        """
        ...


CODECS: dict[str, Any] = {codec.name: codec for codec in (Sampled, TopK, Hidden)}
"""All codecs by name."""


def make_codec(name: str, order: np.ndarray | None = None, **params: Any) -> Codec:
    """The codec of a name and its parameters, as a recipe or a cache has them.

    order: [V] the vocabulary order, for codecs that need it. Without it such a codec can neither encode nor decode.
    Raises CacheError for a name or a parameter that this version does not know.
    """
    if name not in CODECS:
        raise CacheError(f"codec '{name}' is not known here; expected one of {', '.join(CODECS)}: upgrade this package")
    try:
        return CODECS[name](**params, **({"order": order} if CODECS[name].needs_order else {}))
    except (TypeError, ValueError) as error:
        raise CacheError(f"codec '{name}' does not take {params}: {error}") from None
