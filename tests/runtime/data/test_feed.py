"""A step's feed: a whole update is ready before it is asked for, within bounds, and a resumed one cuts the same."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from running import tiny_recipe
from tiny import write_data

from data_prep.shards import MANIFEST, ShardFolder, write_manifest
from pipeline.errors import DataError, SampleError
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.runtime.counts import count_update
from pipeline.runtime.data.batches import ChatDataset, encoded_nbytes
from pipeline.runtime.data.feed import Feed, open_feed
from pipeline.runtime.data.lengths import LengthModel
from pipeline.runtime.data.loader import (
    WAITING_BYTES,
    batches_ahead,
    typical_nbytes,
    waiting_room,
    workers_within,
)
from pipeline.runtime.ranks import Ranks
from pipeline.vlm.processing import ChatEncoder, load_processor

ACCUMULATION = 8
TRAINING = {"steps": 6, "batch_size": ACCUMULATION, "micro_batch_size": 1}


def recipe_of(folder: Path, models, workers: int | None, **training) -> Recipe:
    path = tiny_recipe(
        folder, models, "qwen2_vl", folder / "data", data={"workers": workers}, reinforce={**TRAINING, **training}
    )
    return load_recipe(path).recipe


def encoder_of(models) -> ChatEncoder:
    return ChatEncoder(load_processor(models["qwen2_vl", "student"]), 512)


def feed_of(recipe: Recipe, dataset: ChatDataset, first: int = 0, state=None, ranks: Ranks | None = None) -> Feed:
    training = recipe.reinforce
    assert training.steps
    return open_feed(recipe, ranks or Ranks(), "reinforce", training, dataset, (first, training.steps), state or {})


class Counting(ChatDataset):
    """Leaves a file for each sample that a worker has made."""

    made: Path

    def _read(self, index):
        result = super()._read(index)
        (self.made / f"{index.sample}-{index.epoch}").touch()
        return result


def test_the_next_update_is_loaded_while_this_one_computes(tiny_models, tmp_path):
    recipe = recipe_of(tmp_path, tiny_models, workers=2)
    dataset = Counting(ShardFolder(write_data(tmp_path / "data", 48)), {"student": encoder_of(tiny_models)})
    dataset.made = tmp_path / "made"
    dataset.made.mkdir()
    feed = feed_of(recipe, dataset)
    assert len(feed.next_update()) == ACCUMULATION
    end = time.monotonic() + 60
    while len(list(dataset.made.iterdir())) < 2 * ACCUMULATION and time.monotonic() < end:
        time.sleep(0.05)  # "computing"
    assert 2 * ACCUMULATION <= len(list(dataset.made.iterdir())) <= 2 * ACCUMULATION + 2 * 2, "one update, not the data"


def test_of_large_micro_batches_no_more_wait_than_there_is_room_for(tiny_models, tmp_path, monkeypatch, capsys):
    """An update of one micro-step, whose lengths are not asked for: fewer workers, where one each is too much."""
    recipe = recipe_of(tmp_path, tiny_models, workers=4, micro_batch_size=ACCUMULATION)
    dataset = Counting(ShardFolder(write_data(tmp_path / "data", 48)), {"student": encoder_of(tiny_models)})
    dataset.made = tmp_path / "made"
    dataset.made.mkdir()
    (one,) = feed_of(recipe_of(tmp_path, tiny_models, 0, micro_batch_size=ACCUMULATION), dataset).next_update()
    for made in dataset.made.iterdir():
        made.unlink()
    monkeypatch.setattr("pipeline.runtime.data.feed.waiting_room", lambda ranks: 2.9 * one.nbytes())
    feed = feed_of(recipe, dataset)
    assert feed.workers == 2, "a third would have more waiting"
    assert re.search(r"2 of 4 loader workers a rank: a micro-batch takes .* may wait", capsys.readouterr().out)
    feed.next_update()
    time.sleep(1)
    assert len(list(dataset.made.iterdir())) <= (1 + 2) * ACCUMULATION
    assert len(feed.next_update()) == 1


def test_at_least_one_worker_is_ahead_and_none_stays_none():
    assert workers_within(2e9, 0.6e9, 8) == 3 and workers_within(2e9, 0.1e9, 8) == 8
    assert workers_within(2e9, 3e9, 8) == 1 and workers_within(2e9, 3e9, 0) == 0
    assert workers_within(2e9, 0.0, 8) == 8, "no sample could be used"


def test_the_bytes_of_samples_are_estimated_over_their_sizes(tiny_models, tmp_path):
    """Text among pictures; samples that cannot be used do not count."""
    dataset = ChatDataset(ShardFolder(write_data(tmp_path / "data", 40)), {"student": encoder_of(tiny_models)})
    every = [encoded_nbytes(dataset.encode(sample)) for sample in range(40)]
    assert typical_nbytes(dataset, range(40)) == pytest.approx(sum(every) / 40, rel=0.5)
    broken = ChatDataset(ShardFolder(write_data(tmp_path / "bad", 4, good=5)), dataset.encoders)
    assert typical_nbytes(broken, range(1, 4)) == 0.0


def test_as_many_wait_as_the_room_takes():
    assert batches_ahead(16, 0.0, 2, 1.0) == 9, "an update and two more"
    assert batches_ahead(1, 0.0, 2, 1.0) == 2 and batches_ahead(1, 0.0, 8, 1.0) == 1
    assert batches_ahead(16, 50e6, 2, 2e9) == 9
    assert batches_ahead(16, 250e6, 2, 2e9) == 4, "eight wait"
    assert batches_ahead(16, 5e9, 2, 2e9) == 1


def test_the_room_is_a_ranks_share_of_half_the_free_shared_memory(monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 64_000_000))
    assert waiting_room(ranks_here=2) == 16_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10**13))
    assert waiting_room(ranks_here=8) == WAITING_BYTES


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [{"micro_batch_size": 2}, {"micro_batch_tokens": 150}])
def test_a_resumed_feed_cuts_the_same_and_workers_change_nothing(tiny_models, tmp_path, workers, cut):
    recipe = recipe_of(tmp_path, tiny_models, workers, **cut)
    dataset = ChatDataset(ShardFolder(write_data(tmp_path / "data", 20)), {"student": encoder_of(tiny_models)})
    whole = feed_of(recipe, dataset)
    updates = [whole.next_update() for _ in range(6)]
    other = LengthModel((1.0, 0.0, 0.0, 0.0), 1.0, 0.0, 0.0).to_json()  # not what a fit would find: it is the saved one
    for state, expected in ((whole.state(), True), ({"lengths": other}, False)):
        resumed = feed_of(recipe, dataset, 2, json.loads(json.dumps(state)))
        rest = [resumed.next_update() for _ in range(4)]
        same = [[m.batches["student"].keys for m in u] for u in rest] == [
            [m.batches["student"].keys for m in u] for u in updates[2:]
        ]
        assert same == expected and resumed.state() == state
    keys = [sorted(key for micro in update for key in micro.batches["student"].keys) for update in updates]
    assert all(len(update) == ACCUMULATION for update in keys)


def test_micro_batches_stay_within_their_tokens_and_ranks_have_as_many(tiny_models, tmp_path):
    recipe = recipe_of(tmp_path, tiny_models, 0, micro_batch_tokens=150)
    dataset = ChatDataset(ShardFolder(write_data(tmp_path / "data", 30)), {"student": encoder_of(tiny_models)})
    state = feed_of(recipe, dataset).state()
    feeds = [feed_of(recipe, dataset, 0, state, Ranks(rank, 2)) for rank in range(2)]
    for _ in range(6):
        updates = [feed.next_update() for feed in feeds]
        assert len({len(update) for update in updates}) == 1
        for micro in (micro for update in updates for micro in update):
            rows = micro.batches["student"].inputs["input_ids"][: len(micro.batches["student"].keys)]
            assert rows.numel() <= 160 or len(rows) == 1, "by estimated lengths, so a little over"
            assert len(rows), "every rank has a sample"


def test_one_micro_step_an_update_needs_no_probe(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(ChatDataset, "encode", lambda *_: pytest.fail("a sample was encoded"))
    recipe = recipe_of(tmp_path, tiny_models, 0, micro_batch_size=8)
    dataset = ChatDataset(ShardFolder(write_data(tmp_path / "data", 20)), {"student": encoder_of(tiny_models)})
    assert feed_of(recipe, dataset).state() == {}


def without_sizes(folder: Path) -> ShardFolder:
    manifest = json.loads((folder / MANIFEST).read_text())
    for entry in manifest["shards"]:
        del entry["sizes"]
    write_manifest(folder, manifest["shards"], format=manifest["format"], version=1, split="train")
    return ShardFolder(folder)


def test_a_folder_without_sizes_is_sorted_by_bytes_and_refused_under_a_budget(tiny_models, tmp_path, capsys):
    folder = without_sizes(write_data(tmp_path / "data", 20))
    dataset = ChatDataset(folder, {"student": encoder_of(tiny_models)})
    assert len(feed_of(recipe_of(tmp_path, tiny_models, 0), dataset).next_update()) == ACCUMULATION
    assert f"from their bytes: {folder.path} has no sizes" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"reinforce.micro_batch_tokens: .*manifest.json does not say how large.*again"):
        feed_of(recipe_of(tmp_path, tiny_models, 0, micro_batch_tokens=200), dataset)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_with_their_update_and_rejects_are_counted(tiny_models, tmp_path, workers):
    class Fails(ChatDataset):
        def _encode(self, sample):
            if sample % 7 == 6:
                raise SampleError("odd")
            return super()._encode(sample)

        def _read(self, index):
            if index == failing:
                raise DataError("gone")
            return super()._read(index)

    dataset = Fails(ShardFolder(write_data(tmp_path / "data", 48)), {"student": encoder_of(tiny_models)})
    recipe = recipe_of(tmp_path, tiny_models, workers)
    failing = None
    keys = [one.keys for one in (m.batches["student"] for m in feed_of(recipe, dataset).next_update())]
    assert len(keys) == ACCUMULATION
    failing = next(index for index in _second_update(recipe, dataset))
    feed = feed_of(recipe, dataset)
    first = feed.next_update()
    counts = count_update(first, Ranks(), torch.device("cpu"))
    assert counts.rejected == sum(len(micro.rejected) for micro in first) == ACCUMULATION - sum(map(len, keys))
    with pytest.raises(DataError, match="gone"):
        feed.next_update()


def _second_update(recipe: Recipe, dataset: ChatDataset):
    from pipeline.runtime.data.batches import DataOrder, derived_seed

    order = DataOrder(len(dataset), derived_seed(recipe.seed, "reinforce"))
    return [order[position] for position in range(ACCUMULATION, 2 * ACCUMULATION)]


def test_real_over_computed_tokens_counts_padding_and_the_slowest_rank(tiny_models, tmp_path):
    """By hand: two micro-steps of one rank, with a filler row where no sample has a picture."""
    recipe = recipe_of(tmp_path, tiny_models, 0, micro_batch_size=4)
    dataset = ChatDataset(ShardFolder(write_data(tmp_path / "data", 20)), {"student": encoder_of(tiny_models)})
    update = feed_of(recipe, dataset).next_update()
    counts = count_update(update, Ranks(), torch.device("cpu"))
    inputs = [micro.batches["student"].inputs for micro in update]
    kept = [one["attention_mask"][: len(m.batches["student"].keys)] for one, m in zip(inputs, update, strict=True)]
    assert counts.real == sum(int(mask.sum()) for mask in kept)
    assert counts.computed == sum(one["input_ids"].numel() for one in inputs) and 0 < counts.real_share <= 1
    assert counts.tokens == sum(micro.tokens() for micro in update)
