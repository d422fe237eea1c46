"""The data samples behind a cache's records, where the run's data folder still has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from data_prep.schema import DataError
from data_prep.shards import ShardFolder
from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.results.cache.on_disk import CacheOnDisk
from pipeline.vlm.chat_template import text_of


class CachedData:
    """Reads samples by cache shard and number. None where the data is gone, unreadable, or not what was cached."""

    def __init__(self, cache: CacheOnDisk):
        self._folder = _open(cache)
        shards = self._folder.shards if self._folder else []
        self._first = {
            shard.name: shard.first
            for shard in shards
            if shard.name in cache.sidecars and cache.sidecars[shard.name]["data_sha256"] == shard.sha256
        }

    def record(self, shard: str, index: int) -> dict[str, Any] | None:
        """The JSON of sample `index` of a shard, counted from 0."""
        if self._folder is None or shard not in self._first:
            return None
        try:
            return self._folder.read(self._first[shard] + index).record
        except DataError:
            return None

    def question_and_answer(self, shard: str, index: int) -> tuple[str, str] | None:
        """The texts of a sample's user turns and of its assistant turns; a slash stands between turns."""
        record = self.record(shard, index)
        if record is None:
            return None
        user, assistant = (
            " / ".join(text_of(turn).strip() for turn in record["messages"] if turn["role"] == role)
            for role in ("user", "assistant")
        )
        return user, assistant

    def planted(self, samples: Iterable[tuple[str, str, int]]) -> dict[str, bool]:
        """(key, shard, index) of samples -> {key: whether the answer is known to be wrong}, as --noise made it.

        Empty where the first sample's provenance does not say: then no other sample is read.
        """
        found: dict[str, bool] = {}
        for key, shard, index in samples:
            record = self.record(shard, index)
            wrong = record["provenance"].get("noise") if record else None
            if isinstance(wrong, bool):
                found[key] = wrong
            elif not found:
                break
        return found


def _open(cache: CacheOnDisk) -> ShardFolder | None:
    if cache.recipe is None:
        return None
    try:
        return ShardFolder(load_recipe(cache.recipe).recipe.data.train)
    except (DataError, RecipeError):
        return None
