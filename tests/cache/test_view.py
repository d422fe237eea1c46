"""The view of a cache for stage 2: some layers, and in each epoch other points and tokens, deterministically."""

import pickle

import numpy as np
import pytest
import torch
from random_cache import LAYERS, D, V, fill, finished_cache, identity, teacher_outputs, write_data

from pipeline.cache.reader import TeacherCache
from pipeline.cache.view import CacheView
from pipeline.cache.writer import CacheFolder
from pipeline.codec.random import uniform
from pipeline.errors import CacheError, SampleError

LONG = 600


def long_outputs(key, layers=LAYERS):
    generator = torch.Generator().manual_seed(int(key[1:]))
    return np.arange(LONG), torch.randn(LONG, len(layers), D, generator=generator)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One shard of four samples of 600 tokens, 64 points each."""
    root = tmp_path_factory.mktemp("view")
    data = write_data(root / "data", shards=1)
    folder = CacheFolder(root / "cache", identity("sampled", points=64), data)
    assert fill(folder, data, outputs=long_outputs)
    return TeacherCache(folder.path, data)


def counts(arrays):
    """Number of points at each rank: [T, J, V]."""
    found = np.zeros((*arrays["ranks"].shape[:2], V), int)
    rows = np.indices(arrays["ranks"].shape)
    np.add.at(found, (rows[0], rows[1], arrays["ranks"].astype(int)), arrays["counts"].astype(int))
    return found


def record_of(view, epoch, index=1):
    record, kept = view.record(index, epoch, np.arange(LONG))
    return record, kept


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_the_default_view_is_the_whole_record(cache):
    record, kept = record_of(CacheView(cache, LAYERS), epoch=3)
    assert kept.all() and same(record.arrays, cache.read(1).arrays) and record.key == "k001"


@pytest.mark.parametrize("layers", [(2, 6), (6, 2), (4,)])
def test_fewer_layers_come_in_the_requested_order(cache, layers):
    view = CacheView(cache, layers)
    record, _ = record_of(view, epoch=0)
    signal, whole = view.signal([record], "cpu", None), cache.signal([cache.read(1)], layers)
    assert signal.ids.shape[1] == len(layers)
    for name in ("ids", "probs", "tail", "neg_entropy"):
        assert torch.equal(getattr(signal, name), getattr(whole, name))


def test_a_layer_that_was_not_cached_is_an_error(cache):
    with pytest.raises(CacheError, match=r"asked for teacher layers \[2, 5\], cached are \[2, 4, 6\]: \[5\] missing"):
        record_of(CacheView(cache, (2, 5)), epoch=0)


def test_every_point_is_used_once_over_n_epochs(cache):
    whole = counts(cache.read(1).arrays)
    view = CacheView(cache, LAYERS, points=16)
    epochs = [counts(record_of(view, epoch)[0].arrays) for epoch in range(8)]
    assert all((epoch.sum(2) == 16).all() for epoch in epochs)
    assert np.array_equal(sum(epochs[:4]), whole) and np.array_equal(sum(epochs[2:6]), whole)
    assert all(np.array_equal(epochs[i], epochs[i + 4]) for i in range(4))
    assert (epochs[0] != epochs[1]).any((1, 2)).mean() > 0.9, "each epoch uses other points"


def test_a_single_epoch_is_unbiased(cache):
    """The first point of each distribution is drawn, so the mean error of one epoch is zero within its spread."""
    whole = counts(cache.read(1).arrays) / 64
    error = counts(record_of(CacheView(cache, LAYERS, points=16), 0)[0].arrays) / 16 - whole
    mean, spread = error.mean((0, 1)), error.std((0, 1)) / (LONG * len(LAYERS)) ** 0.5
    assert (np.abs(mean) < 4 * spread + 1e-12).all()


def test_a_layers_points_do_not_depend_on_the_other_layers(cache):
    all_layers, some = (record_of(CacheView(cache, layers, points=16), 1)[0].arrays for layers in (LAYERS, (6, 2)))
    assert np.array_equal(counts(all_layers)[:, [2, 0]], counts(some))


def test_probabilities_of_fewer_points_sum_to_one_and_the_entropy_stays(cache):
    view = CacheView(cache, LAYERS, points=16)
    signal = view.signal([record_of(view, 2, i)[0] for i in (0, 3)], "cpu", None)
    assert torch.equal(signal.probs.sum(-1), torch.ones(2 * LONG, len(LAYERS)))
    whole = cache.signal([cache.read(0), cache.read(3)], LAYERS)
    assert torch.equal(signal.neg_entropy, whole.neg_entropy)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_the_tokens_is_drawn_in_each_epoch(cache, share):
    view = CacheView(cache, LAYERS, token_share=share)
    masks = [record_of(view, epoch, index)[1] for epoch in range(5) for index in range(4)]
    expected, spread = share * LONG, (share * (1 - share) * LONG) ** 0.5
    assert all(abs(mask.sum() - expected) < 4 * spread for mask in masks)
    for one in range(20):
        for other in range(one):
            both = (masks[one] & masks[other]).sum()
            assert abs(both - share**2 * LONG) < 4.5 * (share**2 * (1 - share**2) * LONG) ** 0.5


def test_another_seed_draws_other_tokens_and_the_same_points(cache):
    """All layers share one random stream for the tokens, that of layer 0. Layers are counted from 1, so it is free."""
    one, other = (record_of(CacheView(cache, LAYERS, 16, 0.5, seed), epoch=3) for seed in (7, 8))
    drawn = uniform(7, "tokens of epoch 3", "k001", (0,), LONG)[:, 0]
    assert np.array_equal(one[1], drawn < 0.5) and 0.4 < (one[1] == other[1]).mean() < 0.6
    both = np.flatnonzero(one[1] & other[1])
    points = [counts(record.arrays)[np.searchsorted(np.flatnonzero(kept), both)] for record, kept in (one, other)]
    assert np.array_equal(*points)


def test_tokens_and_arrays_are_selected_alike(cache):
    whole, (record, kept) = cache.read(1), record_of(CacheView(cache, LAYERS, token_share=0.3), epoch=2)
    assert record.tokens.tolist() == np.flatnonzero(kept).tolist()
    assert same(record.arrays, {name: array[kept] for name, array in whole.arrays.items()})


def test_points_and_tokens_are_drawn_independently(cache):
    both, kept = record_of(CacheView(cache, LAYERS, points=16, token_share=0.3), epoch=1)
    alone, _ = record_of(CacheView(cache, LAYERS, points=16), epoch=1)
    assert np.array_equal(counts(both.arrays), counts(alone.arrays)[kept])


def test_a_pickled_view_gives_the_same_records(cache):
    view = CacheView(cache, LAYERS, points=16, token_share=0.5)
    worker = pickle.loads(pickle.dumps(view))
    (one, kept), (two, kept_too) = record_of(view, 7), record_of(worker, 7)
    assert np.array_equal(kept, kept_too) and same(one.arrays, two.arrays)


def test_other_response_tokens_are_an_error_even_if_only_a_share_is_used(cache):
    with pytest.raises(SampleError, match="expected 599 tokens, found 600"):
        CacheView(cache, LAYERS, token_share=0.1).record(0, 0, np.arange(LONG - 1))


def test_skipped_samples_and_other_codecs(tmp_path):
    data = write_data(tmp_path / "data", shards=1)
    folder = CacheFolder(tmp_path / "skips", identity("sampled"), data)
    fill(folder, data, skip={"k002"})
    with pytest.raises(SampleError, match="image is broken"):
        CacheView(TeacherCache(folder.path, data), LAYERS).record(2, 0, np.arange(3))
    cache = TeacherCache(finished_cache(tmp_path / "topk", data, k=4), data)
    record, _ = CacheView(cache, (6,)).record(1, 0, teacher_outputs("k001")[0])
    assert np.array_equal(record.arrays["ids"], cache.read(1).arrays["ids"][:, [2]])
