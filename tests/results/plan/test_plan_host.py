"""Batches on a node's CPU side: those at hand, and what the loader keeps ahead of them within its bound."""

import pytest
from planning import BY_NUMBER, paper_recipe, paper_samples

from pipeline.results.plan.host import host_memory
from pipeline.results.plan.run import deepspeed_of, read_zero
from pipeline.runtime.data.loader import WAITING_BYTES, WINDOW

PINNED = 1.5  # half of what waits is there once more, pinned


def batches(step, ranks, *overrides, **changes):
    recipe = paper_recipe(*overrides)
    samples = paper_samples(recipe, **changes)
    zero = read_zero(deepspeed_of(recipe, step)[1])
    sample = samples.pixel_bytes / 2 + samples.tokens * 24  # pixels in bfloat16
    return host_memory(recipe, step, [], zero, ranks, 1, samples).batches / PINNED, sample


UPDATE = (*BY_NUMBER, "reinforce.batch_size=256")


@pytest.mark.parametrize("workers", [1, 3])
def test_an_update_is_at_hand_and_another_and_two_micro_batches_wait(workers):
    """32 samples a rank, in micro-batches of 4: 8 at hand, 10 ahead, as whole micro-batches of each worker."""
    found, sample = batches("reinforce", 8, f"data.workers={workers}", *UPDATE)
    ahead = workers * -(-10 // workers)
    assert found == pytest.approx(sample * (32 + 4 * ahead), rel=1e-6)


def test_large_pictures_wait_within_the_loaders_bound():
    found, sample = batches("reinforce", 8, "data.workers=6", *UPDATE, pixel_bytes=400 * 2**20)
    at_hand = 32 * sample
    assert 6 * 4 * sample > 2 * WAITING_BYTES, "a micro-batch a worker would not be within it"
    assert at_hand < found <= at_hand + WAITING_BYTES * (1 + 1e-6)
    found, sample = batches("cache", 8, "data.workers=6", pixel_bytes=400 * 2**20)
    assert found == pytest.approx(sample * WINDOW * 2, rel=1e-6), "of a window larger than it one waits"


def test_without_workers_nothing_waits():
    found, sample = batches("reinforce", 8, "data.workers=0", *UPDATE)
    assert found == pytest.approx(32 * sample, rel=1e-6)


def test_the_cache_job_has_a_window_at_hand_and_one_a_worker():
    found, sample = batches("cache", 8, "data.workers=3")
    assert found == pytest.approx(sample * WINDOW * 4, rel=1e-6)
