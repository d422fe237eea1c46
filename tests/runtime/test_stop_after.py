"""--stop-after counts the updates of a command, over its steps."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from small_engine import small_recipe

from pipeline.runtime.loop import Job, Stopped, _Loop
from pipeline.runtime.ranks import Ranks


def end_update(job: Job, step: str, update: int) -> None:
    """What the loop does after an update, of 4."""
    loop = SimpleNamespace(job=job, name=step, total=4, first=0, checkpoints=Mock(), _is_due=Mock(), _save=Mock())
    _Loop.checkpoint(loop, update, Mock())


def test_updates_of_the_step_before_count():
    job = Job(small_recipe("zero0"), Ranks(), stop_after=3)
    end_update(job, "interact", 3)  # it was resumed after update 2
    end_update(job, "interact", 4)
    assert not job.is_over()
    with pytest.raises(Stopped, match="reinforce: stopped after update 1 of 4"):
        end_update(job, "reinforce", 1)


def test_a_step_that_ends_with_the_last_of_them_is_ended_and_the_next_not_begun():
    job = Job(small_recipe("zero0"), Ranks(), stop_after=1)
    end_update(job, "interact", 4)
    assert job.is_over() and not Job(small_recipe("zero0"), Ranks()).is_over()
