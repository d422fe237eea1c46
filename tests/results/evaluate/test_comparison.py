"""Intervals of shares and of paired differences, against numbers worked out elsewhere and against a simulation."""

import math
import random

import pytest

from pipeline.results.evaluate.comparison import (
    asked_otherwise,
    difference,
    mcnemar,
    perplexity_note,
    sentences,
    share_interval,
)


def result(wrong, read=10, rejected=()):
    return {"wrong": list(wrong), "read": read, "rejected": [{"key": key} for key in rejected]}


def test_wilson_s_interval_has_its_published_values():
    """Newcombe (1998), Table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, asked), interval in published.items():
        assert share_interval(right, asked) == pytest.approx(interval, abs=5e-5)
    assert share_interval(0, 0) == (0.0, 1.0)
    assert share_interval(7, 7)[1] == pytest.approx(1.0)


def test_a_paired_difference_by_hand():
    """Ours alone right: b c d; theirs alone right: e. (3 - 1) / 10, variance (4 - 10 x .04) / 100."""
    found = difference(result("aez"), result("abcdz"))
    assert (found.mean, found.samples) == (pytest.approx(0.2), 10)
    half = 1.959964 * math.sqrt(4 - 10 * 0.04) / 10
    assert (found.low, found.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert not found.is_sure
    opposite = difference(result("abcdz"), result("aez"))
    assert (opposite.mean, opposite.low) == (pytest.approx(-0.2), pytest.approx(-0.2 - half))


@pytest.mark.parametrize(
    ("alone", "theirs", "p", "sure"),
    [
        (4, 0, 0.125, False),
        (5, 0, 0.0625, False),
        (6, 0, 0.03125, True),
        (0, 6, 0.03125, True),
        (8, 1, 0.0390625, True),
    ],
)
def test_a_few_samples_that_differ_are_chance(alone, theirs, p, sure):
    """The normal interval of 4 against 0 of 200 leaves out zero; so many fall to one side in one of 8 tries."""
    found = difference(result(range(theirs), 200), result(range(100, 100 + alone), 200))
    assert found.low > 0 or found.high < 0
    assert (found.p, found.is_sure) == (pytest.approx(p), sure)
    naive = 2 * sum(math.comb(alone + theirs, k) for k in range(min(alone, theirs) + 1)) / 2 ** (alone + theirs)
    assert found.p == pytest.approx(naive)


def test_many_samples_that_differ_are_no_trouble():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(30_000, 30_000) == pytest.approx(1.0) and 0.0 <= mcnemar(30_000, 10_000) < 1e-9


def test_samples_that_either_rejected_are_left_out():
    found = difference(result("ab", rejected="c"), result("cd", rejected="e"))
    assert found.samples == 8 and found.mean == pytest.approx((1 - 2) / 8)
    nothing = difference(result("", read=1, rejected="a"), result("", read=1, rejected="a"))
    assert (nothing.mean, nothing.samples, nothing.is_sure) == (0.0, 0, False)


def test_the_interval_holds_the_true_difference_nineteen_times_in_twenty():
    rng, held, rounds, n = random.Random(3), 0, 1000, 300
    for _ in range(rounds):
        hard = [rng.random() for _ in range(n)]  # both models find the same samples hard
        ours = result([i for i, h in enumerate(hard) if rng.random() > 0.9 - 0.5 * h], n)
        theirs = result([i for i, h in enumerate(hard) if rng.random() > 0.8 - 0.5 * h], n)
        found = difference(ours, theirs)
        held += found.low <= 0.1 <= found.high
    assert 0.95 - 4 * math.sqrt(0.05 * 0.95 / rounds) < held / rounds < 0.95 + 4 * math.sqrt(0.05 * 0.95 / rounds)


def test_sentences_say_more_less_or_within_chance():
    results = {
        "plain": result(range(60), 100),
        "good": result(range(20), 100),
        "bad": result(range(100), 100),
        "same": result(range(1, 61), 100),
        "question_only": {"exact_match": 0.1},
    }
    good, bad, same = sentences(results, "plain")
    assert good == "good answers 40.0 points more than plain (95 %: 30.4 to 49.6)."
    assert bad.startswith("bad answers 40.0 points less than plain (95 %: 30.4 to 49.6)")
    assert same == "same and plain differ by 0.0 points: within chance on 100 samples."


def identified(wrong, read, **identity):
    return {**result(wrong, read), "data": "d", "identity": {"weights": str(wrong), "data": "d1", **identity}}


def test_perplexities_of_other_tokens_are_told_apart():
    results = {"teacher": {"response_tokens": 1300}, "student": {"response_tokens": 1411}, "question_only": {}}
    assert "unequally many response tokens (teacher 1,300, student 1,411)" in perplexity_note(results)
    assert perplexity_note(results | {"student": {"response_tokens": 1300}}) == ""


def test_models_that_were_not_asked_alike_are_not_compared():
    """With the missing samples counted as answered, one would answer 80 points more."""
    whole = identified(range(90), 100, samples="100", max_new_tokens="64")
    part = identified(range(9), 10, samples="10 evenly spaced", max_new_tokens="64")
    (said,) = sentences({"whole": whole, "part": part}, "whole")
    assert said.startswith("part and whole cannot be compared: they were evaluated with other samples (10 evenly")
    assert "(10 evenly spaced, 100). Evaluate both with the same --data, --limit and --max-new-tokens" in said
    assert asked_otherwise(whole, whole | {"data": "the same elsewhere"}) == [], "its fingerprint counts"
    pixels = identified(range(90), 100, samples="100", max_new_tokens="64", pixels="any to 9")
    assert asked_otherwise(pixels, whole) == ["pixels (any to 9, none)"]


def test_results_kept_without_an_identity_are_told_apart_by_path_and_number():
    old = result("ab", 10) | {"data": "d"}
    assert asked_otherwise(old, old) == asked_otherwise(old, identified("a", 10, samples="10")) == []
    assert asked_otherwise(old, result("ab", 20) | {"data": "e"}) == ["data (d, e)", "samples (10, 20)"]
