"""Waiting for data is said once, with the share and what helps, and again only where it gets clearly worse."""

from __future__ import annotations

from pipeline.runtime.data.data_wait import STARTING, WINDOW, DataWaitNotice


def told(notice: DataWaitNotice, share: float, updates: int) -> list[str]:
    said = [notice.after_update(share * 2.0, 2.0, workers=3) for _ in range(updates)]
    return [text for text in said if text is not None]


def test_it_is_said_once_with_share_and_knobs():
    notice = DataWaitNotice("interact")
    assert told(notice, 0.9, STARTING) == [] == told(notice, 0.23, WINDOW - 1)
    (text,) = told(notice, 0.23, 200)
    assert text.startswith("interact: 23% of the time of the last 20 updates was spent on waiting for data.")
    assert all(knob in text for knob in ("data.workers", "now 3 a rank", "data.memory_mb", "data.max_pixels"))


def test_little_waiting_and_a_single_slow_read_say_nothing():
    notice = DataWaitNotice("interact")
    told(notice, 0.0, STARTING)
    assert told(notice, 0.02, 100) + told(notice, 0.9, 1) + told(notice, 0.02, 100) == []


def test_it_is_said_again_where_it_has_become_much_worse():
    notice = DataWaitNotice("interact")
    told(notice, 0.0, STARTING)
    assert len(told(notice, 0.2, 50)) == 1 and told(notice, 0.25, 100) == []
    (text,) = told(notice, 0.31, 100)
    assert "30%" in text or "31%" in text


def test_a_step_that_reads_each_sample_once_is_not_told_to_keep_them():
    notice = DataWaitNotice("cache", "batches", epochs=False)
    told(notice, 0.0, STARTING)
    (text,) = told(notice, 0.5, 30)
    assert text.startswith("cache: 50% of the time of the last 20 batches") and "data.memory_mb" not in text
    assert "data.workers" in text and "data.max_pixels" in text
