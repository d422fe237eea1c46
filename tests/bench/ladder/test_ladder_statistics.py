"""Intervals and paired differences over seeds, against scipy's own and against numbers computed by hand."""

import math

import pytest
from scipy import stats

from bench.ladder.statistics import detectable, holm, interval, paired

OURS, THEIRS = [0.91, 0.88, 0.95, 0.90, 0.86], [0.80, 0.83, 0.86, 0.79, 0.84]


def test_an_interval_is_student_s():
    found = interval(OURS)
    low, high = stats.t.interval(0.95, len(OURS) - 1, loc=sum(OURS) / len(OURS), scale=stats.sem(OURS))
    assert (found.mean, found.low, found.high) == pytest.approx((0.9, low, high))


def test_an_interval_by_hand():
    found = interval([1.0, 3.0])  # mean 2, deviation sqrt 2, t(97.5 %, 1) = 12.7062
    assert (found.low, found.high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)


def test_one_seed_has_no_interval_and_none_no_mean():
    assert (interval([0.5]).mean, interval([0.5]).low, interval([0.5]).high) == (0.5, None, None)
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_a_paired_difference_is_scipy_s():
    found, theirs = paired(OURS, THEIRS), stats.ttest_rel(OURS, THEIRS)
    low, high = theirs.confidence_interval(0.95)
    assert (found.interval.mean, found.interval.low, found.interval.high) == pytest.approx((0.076, low, high))
    assert found.p == pytest.approx(theirs.pvalue)
    assert found.p != pytest.approx(stats.ttest_ind(OURS, THEIRS).pvalue)


def test_equal_differences_have_a_certain_p():
    assert paired([0.5, 0.25], [0.5, 0.25]).p == 1.0
    assert paired([0.75, 0.5], [0.5, 0.25]).p is None  # no spread, no test
    rounded = [0.3, 0.4], [0.2, 0.3]
    assert len({a - b for a, b in zip(*rounded, strict=True)}) == 2, "equal but for the rounding of floats"
    assert paired(*rounded).p is None
    assert paired([0.1 + 0.2, 0.4], [0.3, 0.4]).p == 1.0


def test_holm_multiplies_the_smallest_by_all_and_keeps_the_order():
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []
    assert paired([0.5], [0.25]).p is None
    with pytest.raises(ValueError):
        paired([0.5, 0.25], [0.5])


def test_a_detectable_difference_is_found_as_often_as_asked():
    assert detectable(0.02, 5) == pytest.approx((2.776445 + 0.940965) * 0.02 / math.sqrt(5), rel=1e-6)
    for seeds in (5, 10, 30):
        shift = detectable(1.0, seeds, power=0.8) * math.sqrt(seeds)
        power = stats.nct.sf(stats.t.ppf(0.975, seeds - 1), seeds - 1, shift)
        assert power == pytest.approx(0.8, abs=0.05)
    assert detectable(1.0, 5, power=0.9) > detectable(1.0, 5, power=0.8)
