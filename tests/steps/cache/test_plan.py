"""How cache shards are shared out: whole shards a rank, batches alike in length, formed within a shard."""

from __future__ import annotations

import pytest
from tiny import write_data

from data_prep.shards import ShardFolder
from launch.cache import parse, shard_range
from pipeline.runtime.data import loader
from pipeline.runtime.data.batches import Rejected
from pipeline.runtime.data.loader import WINDOW
from pipeline.steps.cache.writing import plan


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_sample_once_and_windows_that_do_not_depend_on_ranks(tmp_path, world):
    data = ShardFolder(write_data(tmp_path / "train", 150, shards=4))
    names = [shard.name for shard in data.shards]
    plans = [plan(data, names, rank, world) for rank in range(world)]
    assert sorted(index.sample for windows in plans for window in windows for index in window.indices) == list(
        range(150)
    )
    assert sorted(window.shard for windows in plans for window in windows if window.last) == names
    assert all(0 < len(window.indices) <= WINDOW for windows in plans for window in windows)
    windows = [window for windows in plans for window in windows]
    assert sorted(windows, key=lambda window: window.indices) == plan(data, names, 0, 1)


@pytest.mark.parametrize(("text", "bounds"), [("0-99", (0, 99)), ("7", (7, 7)), ("3-3", (3, 3))])
def test_a_range_of_shards(text, bounds):
    assert shard_range(text) == bounds


@pytest.mark.parametrize(
    ("text", "said"),
    [(text, "expected FIRST-LAST, as in 0-99, found") for text in ("5-", "-5", "", "a-b", "1-2-3")]
    + [("7-5", "expected FIRST <= LAST, both from 0, found")],
)
def test_what_is_no_range_of_shards_is_refused(text, said, capsys):
    with pytest.raises(SystemExit):
        parse(["--recipe", "recipe.yaml", f"--shards={text}"])
    assert f"argument --shards: {said} {text!r}" in capsys.readouterr().err


class Sized:
    """As much of an encoded sample as grouping looks at."""

    def __init__(self, length):
        self.response = range(length)


def test_a_batch_is_alike_in_length_and_within_its_tokens(monkeypatch):
    monkeypatch.setattr(loader, "_merge", lambda samples, fillers, pads: samples)
    bad = Rejected("k", "000000.tar", "broken")
    samples = [({"teacher": Sized(length)}, None) for length in (5, 90, 7, 6, 200, 8, 30)]
    found = loader._group([*samples, bad], most_tokens=100, fillers={}, pads={})
    sizes = [[len(one[0]["teacher"].response) for one in batch if one is not bad] for batch in found]
    assert sizes == [[200], [90], [30, 8, 7], [6, 5]] and found[0][-1] is bad
    assert loader._group([bad], 100, {}, {}) == [[bad]], "rejects alone are a batch, so that they are not forgotten"
