"""The cache of a mapped vocabulary: for which student's tokenizer it is, and whether its bucket is too large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cache.fingerprint import student_fingerprints
from pipeline.cache.mapping import MAP, MAPPED, VOCABULARY
from pipeline.errors import CacheError
from pipeline.loss.bucket import BucketShare
from pipeline.recipe.schema import Recipe
from pipeline.vlm.assemble import mapped_vocabulary
from pipeline.vlm.mapped_pair import MappedPair
from pipeline.vlm.processing import ChatEncoder
from pipeline.vocabulary_map import VocabularyMap


@dataclass(frozen=True)
class MappedCache:
    """What a cache job needs to know of the student."""

    pair: MappedPair
    ids: VocabularyMap
    fingerprints: Mapping[str, str]
    """What it adds to the cache's identity."""


def mapped_cache(recipe: Recipe, made: Mapping[str, ChatEncoder]) -> MappedCache | None:
    """For a recipe with vocabulary: mapped and the encoders of both models; None for one with a shared vocabulary."""
    if recipe.vocabulary != MAPPED:
        return None
    pair = MappedPair(made["teacher"], made["student"])
    ids = mapped_vocabulary(recipe, pair)
    student = student_fingerprints(recipe.student.path, str(made["student"].processor.chat_template))
    student |= made["student"].template.fingerprint_of_bos("student_bos")
    return MappedCache(pair, ids, {VOCABULARY: MAPPED, MAP: ids.digest, **student})


def bucket_summary(sidecars: Sequence[Mapping[str, Any]], largest: float) -> dict[str, Any]:
    """The manifest's "bucket", from all sidecars: tokens, and the mean share of each cached layer.

    Raises CacheError where it is above `largest`, cache.max_bucket_share.
    """
    first, *rest = (BucketShare.from_json(sidecar["bucket"]) for sidecar in sidecars)
    share = sum(rest, first)
    check_bucket(share, largest, f"all {share.tokens:,} tokens")
    return {"bucket": {"tokens": share.tokens, "layers": share.means()}}


def check_bucket(share: BucketShare, largest: float, of: str) -> None:
    """Raise CacheError where a layer's mean probability in the bucket is above cache.max_bucket_share.

    of: the tokens on which it was measured, for the message.
    """
    means = share.means()
    if max(means) <= largest:
        return
    shares = ", ".join(f"{mean:.1%}" for mean in means)
    raise CacheError(
        f"{of}: the bucket has {shares} of the teacher's probability, by cached layer, the last layer last; expected "
        f"at most cache.max_bucket_share={largest:g}. The bucket is every teacher token that is no single token of the "
        "student, which learns their sum alone. Choose a pair with closer tokenizers, or teacher.layers that are less "
        f"shallow, or allow it: the same command with --set cache.max_bucket_share={_above(max(means))}"
    )


def _above(share: float) -> float:
    """The next larger percent."""
    return min(1.0, (int(share * 100) + 1) / 100)
