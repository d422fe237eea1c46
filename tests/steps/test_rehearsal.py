"""What a cache job says before it begins: how large the cache will be, and that there is no room for it."""

from __future__ import annotations

import pytest
from tiny import write_data

from data_prep.shards import ShardFolder
from pipeline.errors import CacheError
from pipeline.steps.rehearsal import SAMPLES, Projection, _spread, refuse_without_room
from pipeline.teacher.fill import CacheFolder
from pipeline.teacher.folder import CacheIdentity


def test_a_cache_that_cannot_fit_is_refused_with_the_numbers(tmp_path):
    data = ShardFolder(write_data(tmp_path / "train", 4))
    cache = CacheFolder(
        tmp_path / "cache", CacheIdentity({"name": "sampled", "points": 64, "seed": 0}, (2, 4), 20), data
    )
    refuse_without_room(cache, Projection(token_layers=10.0, bytes=450.0))
    with pytest.raises(CacheError) as refused:
        refuse_without_room(cache, Projection(token_layers=4e17, bytes=2e19))
    said = str(refused.value)
    assert "20,000,000.0 TB (400,000,000,000,000,000 token-layers of 50 bytes)" in said
    assert "are free there" in said and "teacher.layers" in said and "cache.codec.points" in said


@pytest.mark.parametrize("samples", [1, 5, 64, 65, 100])
def test_samples_read_beforehand_are_spread_over_the_data(tmp_path, samples):
    places = [place.sample for place in _spread(ShardFolder(write_data(tmp_path / "train", samples, shards=1)))]
    assert len(set(places)) == len(places) == min(SAMPLES, samples) and places[0] == 0
    assert places[-1] >= samples - 1 - samples // len(places) and max(places) < samples
