"""The teacher cache's size on disk (docs/cache_format.md). Its container is exact; what zstd makes of it is measured.

A distribution is a *token-layer*: one cached layer at one response token.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass

from pipeline.recipe.schema import Codec
from pipeline.results.plan.samples import Samples

SAMPLED_BYTES = 48.2
"""Bytes of a token-layer of 64 points over 152,064 ids, as the README has them: measured, then scaled to these ids."""

SAMPLED_GROWTH = 0.66
"""A token-layer of N points takes (N / 64) to this power times that: 30.7 bytes at 32 points, 123 at 256."""

SIDECAR = 200
"""Bytes of a sample in its shard's sidecar and in the manifest: key and offset, twice."""


@dataclass(frozen=True)
class CacheSize:
    """How large a complete cache is."""

    token_layers: float
    """Distributions."""
    distributions: float
    """Bytes of all distributions, as compressed."""
    container: float
    """Bytes of tar headers, padding, sidecars and manifest."""
    fixed: float
    """Bytes of what the cache has once: the vocabulary's order or the teacher's head."""
    stated: str
    """Where the bytes of a distribution come from."""

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.distributions + self.container + self.fixed


def raw_bytes(codec: Codec, width: int, vocab: int) -> float | None:
    """Exact bytes of a token-layer before compression; None where they depend on the distribution.

    width: d of the teacher. vocab: V; topk's ids take the narrowest type that holds them.
    """
    if codec.name == "hidden":
        return width * (2 if codec.dtype == "bfloat16" else 4)
    if codec.name == "topk":
        kept = min(codec.k, vocab)
        return kept * (id_bytes(vocab - 1) + 2) + 4
    return None


def id_bytes(largest: int) -> int:
    """Bytes of the narrowest type that holds 0..largest."""
    return 1 if largest < 2**8 else 2 if largest < 2**16 else 4


def cache_size(
    codec: Codec, samples: Samples, layers: int, width: int, vocab: int, bytes_per_token_layer: float | None
) -> CacheSize:
    """layers: J, the target layers and the last one. bytes_per_token_layer: as `cache-info` says it; None: stated."""
    token_layers = samples.count * samples.response * layers
    raw = raw_bytes(codec, width, vocab)
    if bytes_per_token_layer is not None:  # all files are counted in it
        return CacheSize(token_layers, token_layers * bytes_per_token_layer, 0.0, 0.0, "command line")
    if raw is not None:
        each, stated = raw, "before compression, exact"
    else:
        each, stated = SAMPLED_BYTES * (codec.points / 64) ** SAMPLED_GROWTH, "measured, docs/LOG.md 2026-11-25"
    fixed = 4 * vocab if codec.name == "sampled" else 2 * vocab * width if codec.name == "hidden" else 0
    # Half a block of padding for each record, and half a tar record for each shard, are means.
    container = samples.count * (1.5 * tarfile.BLOCKSIZE + SIDECAR)
    container += samples.shards * (2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE / 2)
    return CacheSize(token_layers, token_layers * each, container, fixed, stated)
