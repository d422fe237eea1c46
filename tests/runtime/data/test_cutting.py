"""Sorted global batches: the same samples, cut so that what the ranks wait for is small."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe.schema import Training
from pipeline.runtime.data.cutting import counts_within, cut, needs_lengths

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=40).map(lambda lengths: sorted(lengths, reverse=True))


def by_tokens(batch: list, tokens: int, world: int, length=float) -> list:
    return cut(batch, length, Training(steps=1, batch_size=len(batch), micro_batch_tokens=tokens), world)


def padded(micro: list) -> float:
    return len(micro) * max(micro, default=0)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 1000), st.integers(1, 5))
def test_each_sample_once_and_every_rank_as_often(batch, tokens, world):
    steps = by_tokens(batch, tokens, world)
    assert all(len(step) == world for step in steps)
    assert sorted(sample for step in steps for micro in step for sample in micro) == sorted(batch)
    flat = [sample for step in steps for micro in step for sample in micro]
    assert flat == sorted(batch, reverse=True), "neighbours in length go together, the longest first"
    assert all(padded(micro) <= tokens or len(micro) == 1 for step in steps for micro in step)
    if len(batch) >= world * len(steps):
        assert all(micro for step in steps for micro in step), "no rank computes on nothing"


def cuts(lengths: list[int], parts: int):
    """All ways to cut a list into so many pieces."""
    for places in combinations(range(1, len(lengths)), parts - 1):
        bounds = [0, *places, len(lengths)]
        yield [lengths[start:end] for start, end in pairwise(bounds)]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 200), st.integers(1, 3))
def test_no_cut_has_fewer_micro_steps_and_none_as_many_has_a_smaller_largest(lengths, tokens, world):
    """By trying all."""
    lengths = sorted(lengths, reverse=True)
    allowed = [
        (parts, max(map(padded, pieces)))
        for parts in range(1, len(lengths) + 1)
        for pieces in cuts(lengths, parts)
        if all(padded(piece) <= tokens or len(piece) == 1 for piece in pieces)
    ]
    steps = by_tokens(lengths, tokens, world)
    fewest = min(-(-parts // world) for parts, _ in allowed)
    assert len(steps) == fewest
    smallest = min(largest for parts, largest in allowed if -(-parts // world) == fewest)
    assert max(padded(micro) for step in steps for micro in step) <= smallest


@given(LENGTHS, st.integers(1, 1000), st.integers(1, 5))
def test_counts_are_those_of_all_samples(lengths, tokens, world):
    counts = counts_within(lengths, tokens, world)
    assert sum(counts) == len(lengths) and len(counts) % world == 0


def test_without_a_budget_micro_batches_have_the_recipes_size():
    training = Training(steps=1, batch_size=12, micro_batch_size=2)
    batch = [5, 1, 9, 9, 2, 7, 3, 8, 4, 6, 1, 2]
    assert cut(batch, float, training, 2) == [[[9, 9], [8, 7]], [[6, 5], [4, 3]], [[2, 2], [1, 1]]]
    assert cut(batch, None, training, 3) == [[[5, 1], [9, 9], [2, 7]], [[3, 8], [4, 6], [1, 2]]], "as they come"


def test_equal_lengths_stay_in_the_order_of_the_data():
    training = Training(steps=1, batch_size=4, micro_batch_size=1)
    assert cut(list("abcd"), lambda _: 7.0, training, 2) == [[["a"], ["b"]], [["c"], ["d"]]]


def test_fewer_samples_than_ranks_leave_some_with_none():
    assert by_tokens([3, 5], 100, 4) == [[[5], [3], [], []]]


def test_lengths_matter_where_an_update_has_several_micro_steps():
    one = Training(steps=1, batch_size=8, micro_batch_size=4)
    assert not needs_lengths(one, 2) and needs_lengths(one, 1)
    assert needs_lengths(one.model_copy(update={"micro_batch_tokens": 512}), 2)


@pytest.mark.parametrize(("world", "micro"), [(8, 4), (64, 2)])
def test_sorting_computes_far_fewer_tokens(world, micro):
    """Lengths as of mixed instruction data, mean about 900: what ranks wait for, sorted against as they come."""
    draws = random.Random(0)
    lengths = [min(4096.0, draws.lognormvariate(6.5, 0.75)) for _ in range(world * micro * 8)]
    training = Training(steps=1, batch_size=len(lengths), micro_batch_size=micro)

    def share(steps: list) -> float:
        return sum(lengths) / sum(world * max(padded(part) for part in step) for step in steps)

    random_cut, sorted_cut = share(cut(lengths, None, training, world)), share(cut(lengths, float, training, world))
    by_budget = share(by_tokens(lengths, 4 * 4096, world))
    assert random_cut < 0.35 and sorted_cut > 2 * random_cut and by_budget > 0.8
