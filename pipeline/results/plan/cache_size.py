"""The teacher cache's size on disk (docs/cache_format.md), before zstd: exact but for `sampled` distributions.

A distribution is a *token-layer*: one cached layer at one response token.
"""

from __future__ import annotations

import math
import tarfile
from dataclasses import dataclass

from pipeline.recipe.schema import Codec
from pipeline.results.plan.samples import Samples

SAMPLED_BYTES, SAMPLED_IDS = 40.93, 49_152
"""Bytes of a token-layer of 64 points over so many ids, as measured on text. Of fewer ids it takes less, by how much is
not known."""

SAMPLED_BITS = 4.45
"""Bytes more for each doubling of the ids: one bit of each of the 35.5 distinct ids of 64 points."""

SAMPLED_GROWTH = 0.66
"""A token-layer of N points takes (N / 64) to this power times that: 26 bytes at 32 points, 102 at 256."""

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


def sampled_bytes(points: int, vocab: int) -> float:
    """Bytes of a token-layer on average, estimated from what one teacher's text took (docs/LOG.md 2026-11-25)."""
    doublings = math.log2(max(vocab, SAMPLED_IDS) / SAMPLED_IDS)
    return (SAMPLED_BYTES + SAMPLED_BITS * doublings) * (points / 64) ** SAMPLED_GROWTH


def sampled_at_most(points: int, vocab: int) -> float:
    """Bytes before compression that no token-layer exceeds, with a bit stream's last byte of each class left out.

    K distinct ids take a symbol each, and the digits of gaps that sum to V at most: K log2(V / K) bits. Two bytes more
    for a count above 11, and two for the entropy.
    """
    return 2 + max(
        kept * (1 + math.log2(vocab / kept) / 8) + 2 * min(kept, (points - kept) // 11)
        for kept in range(1, min(points, vocab) + 1)
    )


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
        most = sampled_at_most(codec.points, vocab)
        each = min(sampled_bytes(codec.points, vocab), most)
        stated = f"estimated from other text; before compression at most {most:.0f}"
    fixed = 4 * vocab if codec.name == "sampled" else 2 * vocab * width if codec.name == "hidden" else 0
    # Half a block of padding for each record, and half a tar record for each shard, are means.
    container = samples.count * (1.5 * tarfile.BLOCKSIZE + SIDECAR)
    container += samples.shards * (2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE / 2)
    return CacheSize(token_layers, token_layers * each, container, fixed, stated)
