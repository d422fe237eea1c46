"""Data order is a function of (seed, position); ranks, micro-batches and loader workers only share it out."""

from __future__ import annotations

import math

import pytest
from tiny import write_data

from data_prep.shards import ShardFolder
from pipeline.errors import DataError
from pipeline.recipe import Training
from pipeline.runtime.batches import BadSamples, Chats, DataOrder, Place, Rejected, load, micro_batches
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.schedule import learning_rate
from pipeline.vlm.processing import ChatEncoder, load_processor


def global_batches(world: int, micro: int, first: int = 0, last: int = 5) -> list[list[int]]:
    """What all ranks together see in each update."""
    training = Training(steps=9, batch_size=12, micro_batch_size=micro)
    per_rank = [
        list(micro_batches(DataOrder(30, seed=5), training, first, last, Ranks(rank, world))) for rank in range(world)
    ]
    steps = 12 // (world * micro)
    assert all(len(batches) == steps * (last - first) for batches in per_rank)
    return [
        sorted(i for batches in per_rank for batch in batches[u * steps : (u + 1) * steps] for i in batch)
        for u in range(last - first)
    ]


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 2), (3, 4), (4, 1), (6, 2)])
def test_global_batches_do_not_depend_on_ranks(world, micro):
    assert global_batches(world, micro) == global_batches(1, 12)


def test_resuming_sees_the_same_remaining_batches_also_on_other_ranks():
    assert global_batches(3, 2, first=2) == global_batches(1, 12)[2:]


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
    chats = Chats(
        folder, {"student": short}, attach=lambda place, encoded: (encoded, (place.sample, len(encoded.response_ids)))
    )
    loaded = list(load(chats, [[Place(i) for i in some] for some in ([0, 1, 2], [3, 4], [9, 8])], workers, "cpu"))
    assert [len(one.attached) + len(one.rejected) for one in loaded] == [3, 2, 2], "read = used + rejected"
    for one in loaded:
        batch = one.batches["student"]
        assert one.tokens() == sum(batch.counts) == sum(count for _, count in one.attached)
        assert [folder.keys[index] for index, _ in one.attached] == list(batch.keys)
    whole = ChatEncoder(short.processor, 512)
    nothing = ChatEncoder(short.processor, 5)
    (one,) = load(Chats(folder, {"a": whole, "b": nothing}), [[Place(0), Place(1)]], workers, "cpu")
    assert [r.key for r in one.rejected] == folder.keys[:2] and one.tokens() == 0
    assert one.rejected[0].shard == "000000.tar" and "max_length=5" in one.rejected[0].reason
    assert one.batches["a"].inputs["input_ids"].shape[0] == 1, "the filler row alone: the rank still takes part"


def test_too_many_bad_samples_stop_the_run():
    bad = BadSamples(0.02)
    newest = [Rejected("k7", "000003.tar", "image cannot be decoded")]
    bad.count(32, newest)
    bad.count(32, newest)
    with pytest.raises(
        DataError, match=r"3 of 96 samples .* data.max_bad_share=0.02; the last: k7 in 000003.tar: image"
    ):
        bad.count(32, newest)
    calm = BadSamples(0.02)
    for _ in range(100):
        calm.count(100, newest)
    assert calm.rejected == 100 and calm.read == 10_000


def test_learning_rate_is_warm_up_then_cosine():
    training = Training(steps=11, batch_size=1, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=2)
    rates = [learning_rate(training, update, 11) for update in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(0.1)
    assert rates[6] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
