"""Data order is a function of (seed, position); ranks, micro-batches and loader workers only share it out."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import write_data
from torch.utils.data._utils.pin_memory import pin_memory

from data_prep.schema import DataError as ShardError
from data_prep.shards import ShardFolder
from pipeline.errors import CacheError
from pipeline.recipe.schema import Training
from pipeline.runtime.data.batches import (
    ChatDataset,
    DataOrder,
    SampleIndex,
    micro_batches,
)
from pipeline.runtime.data.loader import load, load_by_length
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.schedule import learning_rate
from pipeline.vlm.processing import ChatEncoder, load_processor


def global_batches(world: int, first: int = 0, last: int = 5, length=None, **cut: int) -> list[list[SampleIndex]]:
    """What all ranks together see in each update, which has as many micro-batches on each of them."""
    training = Training(steps=9, batch_size=12, **cut)
    per_rank = [
        list(micro_batches(DataOrder(30, seed=5), training, length, first, last, Ranks(rank, world)))
        for rank in range(world)
    ]
    updates = list(zip(*per_rank, strict=True))
    assert len(updates) == last - first
    assert all(len({len(batches) for batches in update}) == 1 for update in updates)
    return [sorted(i for batches in update for batch in batches for i in batch) for update in updates]


def like_7_to_400(index: SampleIndex) -> float:
    return float(7 + index.sample**2 % 394)


@pytest.mark.parametrize("length", [None, like_7_to_400])
@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 2), (3, 4), (4, 1), (6, 2)])
def test_global_batches_do_not_depend_on_ranks(world, micro, length):
    assert global_batches(world, length=length, micro_batch_size=micro) == global_batches(1, micro_batch_size=12)


@pytest.mark.parametrize(("world", "tokens"), [(1, 800), (2, 500), (3, 1), (5, 300), (16, 300)])
def test_global_batches_do_not_depend_on_a_budget_in_tokens(world, tokens):
    cut = global_batches(world, length=like_7_to_400, micro_batch_tokens=tokens)
    assert cut == global_batches(1, micro_batch_size=12)


def test_updates_differ_in_their_number_of_micro_steps():
    training = Training(steps=9, batch_size=12, micro_batch_tokens=800)
    order = DataOrder(30, seed=5)
    steps = {len(update) for update in micro_batches(order, training, like_7_to_400, 0, 9, Ranks(0, 1))}
    assert len(steps) > 1


def test_resuming_sees_the_same_remaining_batches_also_on_other_ranks():
    assert global_batches(3, first=2, micro_batch_size=2) == global_batches(1, micro_batch_size=12)[2:]


def test_every_epoch_is_a_permutation_of_its_own():
    order = DataOrder(30, seed=5)
    places = [[order[e * 30 + i] for i in range(30)] for e in range(3)]
    assert all(place.epoch == e for e, epoch in enumerate(places) for place in epoch)
    epochs = [[place.sample for place in epoch] for epoch in places]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [DataOrder(30, seed=6)[i].sample for i in range(30)] != epochs[0]
    assert order[3] == places[0][3], "going back gives the same"


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_and_rejecting(tiny_models, tmp_path, workers):
    folder = ShardFolder(write_data(tmp_path / "train", 10))
    short = ChatEncoder(load_processor(tiny_models["qwen2_vl", "student"]), max_length=42)
    chats = ChatDataset(
        folder, {"student": short}, attach=lambda place, encoded: (encoded, (place.sample, len(encoded.response_ids)))
    )
    loaded = list(load(chats, [[SampleIndex(i) for i in some] for some in ([0, 1, 2], [3, 4], [9, 8])], workers, "cpu"))
    assert [len(one.attached) + len(one.rejected) for one in loaded] == [3, 2, 2], "read = used + rejected"
    for one in loaded:
        batch = one.batches["student"]
        assert one.tokens() == sum(batch.counts) == sum(count for _, count in one.attached)
        assert [folder.keys[index] for index, _ in one.attached] == list(batch.keys)
    whole = ChatEncoder(short.processor, 512)
    nothing = ChatEncoder(short.processor, 5)
    (one,) = load(ChatDataset(folder, {"a": whole, "b": nothing}), [[SampleIndex(0), SampleIndex(1)]], workers, "cpu")
    assert [r.key for r in one.rejected] == folder.keys[:2] and one.tokens() == 0
    assert one.rejected[0].shard == "000000.tar" and "max_length=5" in one.rejected[0].reason
    assert one.batches["a"].inputs["input_ids"].shape[0] == 1, "the filler row alone: the rank still takes part"


@pytest.fixture
def encoder(tiny_models):
    return ChatEncoder(load_processor(tiny_models["qwen2_vl", "student"]), max_length=512)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_read_as_it_was_raised(encoder, tmp_path, workers):
    def refuse(place, encoded):
        raise CacheError(f"cache/000000.tar: damaged. Run: deepspeed launch/cache.py (asked for {place.sample})")

    data = write_data(tmp_path / "train", 4)
    with pytest.raises(CacheError) as raised:
        next(load(ChatDataset(ShardFolder(data), {"student": encoder}, refuse), [[SampleIndex(2)]], workers, "cpu"))
    assert str(raised.value) == "cache/000000.tar: damaged. Run: deepspeed launch/cache.py (asked for 2)"
    (data / "000001.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"^.*000001.tar: cannot read sample 's00003': the file ends \d+ bytes early"):
        next(
            load(
                ChatDataset(ShardFolder(data), {"student": encoder}), [[SampleIndex(0), SampleIndex(3)]], workers, "cpu"
            )
        )


def test_a_flipped_bit_costs_one_sample_and_names_its_shard(encoder, tmp_path):
    data = write_data(tmp_path / "train", 4)
    shard, folder = data / "000001.tar", ShardFolder(data)
    (_, entry) = folder.manifest["shards"]
    flipped = bytearray(shard.read_bytes())
    flipped[entry["offsets"][1] + 1500] ^= 4
    shard.write_bytes(flipped)
    (one,) = load(ChatDataset(folder, {"student": encoder}), [[SampleIndex(i) for i in range(4)]], 0, "cpu")
    assert one.batches["student"].keys == ("s00000", "s00001", "s00002")
    (bad,) = one.rejected
    assert (bad.key, bad.shard) == ("s00003", "000001.tar") and "do not match their checksum" in bad.reason


def test_a_response_token_beyond_the_head_costs_the_sample(encoder, tmp_path):
    folder, end = ShardFolder(write_data(tmp_path / "train", 4)), encoder.processor.tokenizer.eos_token_id
    for ids, used in ((end + 1, 4), (end, 0)):
        dataset = ChatDataset(folder, {"student": encoder}, ids={"student": ids})
        (one,) = load(dataset, [[SampleIndex(i) for i in range(4)]], 0, "cpu")
        assert (len(one.batches["student"].keys), len(one.rejected)) == (used, 4 - used)
    assert one.rejected[0].reason == f"the response has token {end}; teacher and student share the first {end} alone"


def test_models_with_one_encoder_share_a_batch(encoder, tmp_path):
    chats = ChatDataset(ShardFolder(write_data(tmp_path / "train", 4)), {"teacher": encoder, "student": encoder})
    for workers in (0, 1):
        (one,) = load(chats, [[SampleIndex(0), SampleIndex(1)]], workers, "cpu")
        assert one.batches["teacher"] is one.batches["student"] and one.batches["student"].keys == ("s00000", "s00001")


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_fit_in_memory_are_read_once_and_give_the_same_batches(encoder, tmp_path, workers, monkeypatch):
    folder = ShardFolder(write_data(tmp_path / "train", 4))
    indices = [[SampleIndex(i, epoch) for i in range(4)] for epoch in range(3)]
    plain = list(load(ChatDataset(folder, {"a": encoder}), indices, workers, "cpu"))
    size = max(encoder(raw.key, raw.record["messages"], raw.images).nbytes() for raw in map(folder.read, range(4)))
    read = []
    monkeypatch.setattr(ShardFolder, "read", lambda self, i, whole=ShardFolder.read: read.append(i) or whole(self, i))
    kept = list(load(ChatDataset(folder, {"a": encoder}, memory=2 * size), indices, workers, "cpu"))
    for ours, theirs in zip(kept, plain, strict=True):
        mine, other = ours.batches["a"], theirs.batches["a"]
        assert mine.inputs.keys() == other.inputs.keys() and mine.keys == other.keys
        assert all(torch.equal(mine.inputs[name], other.inputs[name]) for name in mine.inputs)
    if workers == 0:
        assert sorted(read) == [0, 1, 2, 2, 2, 3, 3, 3], "two fit; the others are read in each epoch"


def test_a_sample_that_cannot_be_used_is_not_kept_and_counted_in_each_epoch(encoder, tmp_path):
    folder, short = ShardFolder(write_data(tmp_path / "train", 2)), ChatEncoder(encoder.processor, 5)
    chats = ChatDataset(folder, {"a": short}, memory=2**30)
    loaded = load(chats, [[SampleIndex(0, epoch), SampleIndex(1, epoch)] for epoch in range(2)], 0, "cpu")
    assert [len(one.rejected) for one in loaded] == [2, 2]


def test_a_batch_is_pinned_where_the_loader_looks_for_it(encoder, tmp_path, monkeypatch):
    """What DataLoader does with pin_memory=True, but for the memory itself: that needs a GPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    chats = ChatDataset(ShardFolder(write_data(tmp_path / "train", 4)), {"teacher": encoder, "student": encoder})
    ((one,),) = load_by_length(chats, [[SampleIndex(0), SampleIndex(1)]], 512, 0, "cpu")
    (again,) = pin_memory([one])
    batch, copied = one.batches["teacher"], again.batches["teacher"]
    expected = [*batch.inputs.values(), batch.positions, batch.labels]
    assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in expected} and len(pinned) == len(expected)
    assert copied is again.batches["student"] and copied.labels is not batch.labels
    assert torch.equal(copied.labels, batch.labels) and copied.keys == batch.keys


def test_a_worker_is_one_window_ahead(encoder, tmp_path):
    asked = []

    def windows():
        for index in range(8):
            asked.append(index)
            yield [SampleIndex(index)]

    loaded = load_by_length(
        ChatDataset(ShardFolder(write_data(tmp_path / "train", 8)), {"a": encoder}), windows(), 512, 2, "cpu"
    )
    next(loaded)
    assert len(asked) == 3, "one in hand, and one each of two workers"
    assert len(list(loaded)) == 7


def test_learning_rate_is_warm_up_then_cosine():
    training = Training(steps=11, batch_size=1, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=2)
    rates = [learning_rate(training, update, 11) for update in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(0.1)
    assert rates[6] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
