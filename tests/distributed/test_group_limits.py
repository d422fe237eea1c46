"""hang_minutes holds in every group of ranks: those that DeepSpeed makes itself have the limit of a collective, too."""

from __future__ import annotations

from datetime import timedelta

import torch
from small_engine import on_ranks


def limits(ranks) -> list[timedelta]:
    """Of DeepSpeed's copy of all ranks' group, and of a group by NCCL."""
    from deepspeed.utils import groups
    from torch.distributed import distributed_c10d as c10d

    from pipeline.runtime import engine

    engine.start(limit_minutes=85)
    copy = groups._clone_world_group()._get_backend(torch.device("cpu"))
    return [copy.options._timeout, c10d._get_default_timeout(c10d.Backend.NCCL)]


def test_a_group_that_is_made_later_has_the_limit_of_all_ranks_group(tmp_path):
    assert on_ranks(1, tmp_path, limits) == [[timedelta(minutes=85)] * 2]
