"""How cache shards are shared out: whole shards a rank, as many forwards on every rank, batches within a shard."""

from __future__ import annotations

import pytest
from tiny import write_data

from data_prep.shards import ShardFolder
from pipeline.steps.cache import plan


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_sample_once_and_equal_numbers_of_forwards(tmp_path, world):
    data = ShardFolder(write_data(tmp_path / "train", 23, shards=4))
    names = [shard.name for shard in data.shards]
    plans = [plan(data, names, batch_size=4, rank=rank, world=world) for rank in range(world)]
    assert len({len(parts) for parts in plans}) == 1
    seen = sorted(index for parts in plans for part in parts for index in part.indices)
    assert seen == list(range(23))
    assert sorted(part.shard for parts in plans for part in parts if part.last) == names
    batches = {(part.shard, tuple(part.indices)) for parts in plans for part in parts if part.shard}
    alone = {(part.shard, tuple(part.indices)) for part in plan(data, names, 4, 0, 1)}
    assert batches == alone, "a shard's batches do not depend on the number of ranks"
