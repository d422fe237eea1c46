"""The cache's random numbers depend only on (seed, purpose, sample, layer, token), and never change."""

import numpy as np
import pytest

from pipeline.codec.random import uniform

GOLDEN = [[0.41121464400757934, 0.6000561346228649], [0.47462132481216013, 0.46678014019828384]]


def test_they_are_the_same_on_every_machine_and_version():
    """If these numbers change, every cache must be built again: raise the format version too."""
    drawn = uniform(0, "draw", "k000", (2, 28), 2)
    assert drawn.tolist() == GOLDEN


def test_a_draw_does_not_depend_on_other_tokens_or_layers():
    whole = uniform(3, "draw", "k", (2, 6, 9), 50)
    assert whole.shape == (50, 3) and whole.dtype == np.float64
    assert np.array_equal(uniform(3, "draw", "k", (9, 2), 50), whole[:, [2, 0]])
    assert np.array_equal(uniform(3, "draw", "k", (2, 6, 9), 7), whole[:7])
    assert uniform(3, "draw", "k", (2,), 0).shape == (0, 1) and uniform(3, "draw", "k", (), 4).shape == (4, 0)


@pytest.mark.parametrize("other", [(4, "draw", "k"), (3, "measure", "k"), (3, "draw", "k1")])
def test_another_seed_purpose_or_sample_gives_other_numbers(other):
    assert not np.intersect1d(uniform(3, "draw", "k", range(1, 20), 20), uniform(*other, range(1, 20), 20)).size


def test_they_are_uniform_and_independent_over_samples_layers_and_tokens():
    drawn = np.stack([uniform(0, "draw", f"k{i:03d}", range(1, 21), 10) for i in range(100)])
    assert (drawn >= 0).all() and (drawn < 1).all() and np.unique(drawn).size == drawn.size
    # Kolmogorov-Smirnov test: chance exceeds 1.95 / sqrt(n) once in a thousand.
    edge = np.sort(drawn.ravel()) - np.arange(drawn.size) / drawn.size
    assert np.abs(edge).max() < 1.95 / drawn.size**0.5
    for axis in range(3):
        neighbours = np.moveaxis(drawn, axis, 0)
        pairs = neighbours[:-1].ravel(), neighbours[1:].ravel()
        assert abs(np.corrcoef(*pairs)[0, 1]) < 4 / pairs[0].size ** 0.5
