"""Matching: order, range and draw probabilities, against a literal transcription of the paper's Algorithm 1."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from pipeline.loss.matching import STRATEGIES, draw_probabilities, matching_rule, search_ranges, uniform_columns

ORDERED = ["adaptive", "uniform", "random", "ordered_argmin", "earliest", "latest"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kl_values(students, teachers, seed=0):
    return torch.rand(students, teachers, dtype=torch.float64, generator=generator(seed)) * 3


def paper_algorithm(kl, uniform_number):
    """Algorithm 1, line by line, in plain Python. It draws by the inverse cumulative distribution."""
    t_s, t_l = len(kl), len(kl[0])
    start, match = 0, []
    for i in range(t_s):
        candidates = list(range(start, t_l - t_s + i + 1))
        divergences = [kl[i][j] for j in candidates]
        temperature = 2 / (max(divergences) - min(divergences) + 1e-6)
        weights = [math.exp(-k / temperature) for k in divergences]
        number, drawn = uniform_number() * sum(weights), 0
        while drawn < len(weights) - 1 and number > weights[drawn]:
            number -= weights[drawn]
            drawn += 1
        match.append(candidates[drawn])
        start = match[-1] + 1
    return match


def paper_probability(kl, match):
    """The probability that Algorithm 1 draws this whole match."""
    t_s, t_l = len(kl), len(kl[0])
    start, probability = 0, 1.0
    for i, j in enumerate(match):
        candidates = range(start, t_l - t_s + i + 1)
        if j not in candidates:
            return 0.0
        row = [kl[i][c] for c in candidates]
        temperature = 2 / (max(row) - min(row) + 1e-6)
        weights = [math.exp(-k / temperature) for k in row]
        probability *= weights[j - start] / sum(weights)
        start = j + 1
    return probability


def test_adaptive_draws_each_match_as_often_as_the_paper_s_algorithm():
    kl, draws, g = kl_values(3, 6), 4000, generator(5)
    counted = Counter(tuple(STRATEGIES["adaptive"].match(kl, g)) for _ in range(draws))
    rng = random.Random(6)
    transcribed = Counter(tuple(paper_algorithm(kl.tolist(), rng.random)) for _ in range(draws))
    matches = list(itertools.combinations(range(6), 3))
    probabilities = {match: paper_probability(kl.tolist(), match) for match in matches}
    assert sum(probabilities.values()) == pytest.approx(1.0)
    assert set(counted) <= set(matches)
    for match, p in probabilities.items():
        allowed = 5 * math.sqrt(draws * p * (1 - p)) + 1  # five standard deviations of a binomial count
        assert abs(counted[match] - draws * p) <= allowed
        assert abs(transcribed[match] - draws * p) <= allowed


def test_draw_probabilities_follow_the_formula():
    row = [0.3, 1.7, 0.9]
    weights = [math.exp(-k * (1.7 - 0.3 + 1e-6) / 2) for k in row]
    expected = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
    torch.testing.assert_close(draw_probabilities(torch.tensor(row, dtype=torch.float64)), expected)


def test_equal_candidates_are_equally_likely_and_a_single_candidate_is_certain():
    assert draw_probabilities(torch.full((4,), 1.5)).tolist() == pytest.approx([0.25] * 4)
    assert draw_probabilities(torch.tensor([7.0])).tolist() == [1.0]


def test_the_paper_s_temperature_is_nearly_uniform_below_a_nat_and_greedy_above_three():
    """Best against worst: exp(D^2 / 2), as the docstring says."""
    for spread, odds in ((0.5, math.exp(0.125)), (1.0, math.exp(0.5)), (3.0, math.exp(4.5))):
        p = draw_probabilities(torch.tensor([1.0, 1.0 + spread / 3, 1.0 + spread], dtype=torch.float64))
        assert p[0] / p[-1] == pytest.approx(odds, rel=1e-5)


def test_a_fixed_temperature_replaces_the_paper_s_rule():
    row = torch.tensor([0.3, 0.4, 0.9], dtype=torch.float64)
    torch.testing.assert_close(draw_probabilities(row, 0.05), torch.softmax(-row / 0.05, 0))
    cold, kl = matching_rule("adaptive", 1e-6), kl_values(3, 7)
    greedy, start = [], 0
    for i in range(3):
        greedy.append(start + int(kl[i, start : 7 - 3 + i + 1].argmin()))
        start = greedy[-1] + 1
    assert all(cold.match(kl, generator(seed)) == greedy for seed in range(20))
    assert matching_rule("adaptive") is STRATEGIES["adaptive"] and matching_rule("random", 0.5) is STRATEGIES["random"]


def test_entropies_are_those_of_the_distributions_that_were_drawn_from():
    kl = kl_values(3, 6)
    match = [1, 2, 4]
    expected = []
    for i, start in enumerate((0, 2, 3)):
        p = draw_probabilities(kl[i, start : 6 - 3 + i + 1])
        expected.append(-sum(x * math.log(x) for x in p.tolist()))
    assert STRATEGIES["adaptive"].entropies(kl, match) == pytest.approx(expected)
    assert STRATEGIES["random"].entropies(kl, match) == pytest.approx([math.log(4), math.log(3), math.log(3)])
    assert STRATEGIES["random"].entropies(kl, [3, 4, 5]) == pytest.approx([math.log(4), 0.0, 0.0])
    for name in ("uniform", "ordered_argmin", "earliest", "last_only"):
        assert STRATEGIES[name].entropies(kl, match) is None


def test_earliest_and_latest_are_the_ends_of_the_search_ranges():
    assert STRATEGIES["earliest"].match(kl_values(3, 7), generator()) == [0, 1, 2]
    assert STRATEGIES["latest"].match(kl_values(3, 7), generator()) == [4, 5, 6]


def test_random_draws_all_candidates_equally_often():
    kl, draws, g = kl_values(2, 5), 3000, generator(3)
    first = Counter(STRATEGIES["random"].match(kl, g)[0] for _ in range(draws))
    for column in range(4):
        assert abs(first[column] - draws / 4) <= 5 * math.sqrt(draws * 3 / 16)
    assert set(first) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize(("students", "teachers"), [(1, 1), (1, 9), (4, 4), (3, 7), (7, 20), (5, 6)])
def test_ordered_strategies_keep_order_and_window(name, students, teachers):
    strategy = STRATEGIES[name]
    for seed in range(20):
        kl = kl_values(students, teachers, seed)
        match = strategy.match(kl, generator(seed))
        assert all(a < b for a, b in itertools.pairwise(match))
        assert all(j in columns for j, columns in zip(match, strategy.window(students, teachers), strict=True))


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_entries_outside_the_window_are_not_read(name):
    strategy, kl = STRATEGIES[name], kl_values(3, 7)
    masked = torch.full_like(kl, torch.inf)
    for row, columns in enumerate(strategy.window(3, 7)):
        masked[row, columns.start : columns.stop] = kl[row, columns.start : columns.stop]
    assert strategy.match(masked, generator(1)) == strategy.match(kl, generator(1))


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_the_same_seed_gives_the_same_match_and_the_matrix_is_unchanged(name):
    kl = kl_values(4, 9)
    before = kl.clone()
    assert STRATEGIES[name].match(kl, generator(7)) == STRATEGIES[name].match(kl.float().double(), generator(7))
    assert torch.equal(kl, before)


def test_search_ranges_leave_layers_for_the_rest():
    assert search_ranges(4, 8) == [range(0, 5), range(1, 6), range(2, 7), range(3, 8)]  # the paper's Figure 2
    assert search_ranges(3, 3) == [range(i, i + 1) for i in range(3)]


def test_uniform_reaches_the_last_teacher_layer():
    assert uniform_columns(7, 20) == [1, 4, 7, 10, 13, 16, 19]
    assert uniform_columns(3, 3) == [0, 1, 2]
    for students in range(1, 12):
        for teachers in range(students, 40):
            columns = uniform_columns(students, teachers)
            steps = [b - a for a, b in itertools.pairwise([-1, *columns])]
            assert columns[-1] == teachers - 1 and max(steps) - min(steps) <= 1


@pytest.mark.parametrize(("students", "teachers"), [(1, 5), (3, 3), (3, 7), (4, 8)])
def test_ordered_argmin_is_the_best_of_all_ordered_matches(students, teachers):
    for seed in range(10):
        kl = kl_values(students, teachers, seed)
        best = min(
            itertools.combinations(range(teachers), students),
            key=lambda m: sum(kl[i, j].item() for i, j in enumerate(m)),
        )
        assert STRATEGIES["ordered_argmin"].match(kl, generator()) == list(best)


def test_argmin_takes_the_least_kl_in_any_order():
    kl = torch.tensor([[3.0, 2.0, 1.0], [0.0, 2.0, 1.0], [5.0, 4.0, 3.0], [5.0, 4.0, 3.0]])
    assert STRATEGIES["argmin"].match(kl, generator()) == [2, 0, 2, 2]
    assert STRATEGIES["argmin"].window(4, 3) == [range(3)] * 4


def test_last_only_matches_nothing_and_needs_no_kl():
    assert STRATEGIES["last_only"].match(kl_values(3, 7), generator()) == [None] * 3
    assert [len(columns) for columns in STRATEGIES["last_only"].window(3, 7)] == [0, 0, 0]


@pytest.mark.parametrize("name", ORDERED)
def test_more_student_than_teacher_layers_is_an_error_with_the_numbers(name):
    for call in (lambda: STRATEGIES[name].window(4, 3), lambda: STRATEGIES[name].match(kl_values(4, 3), generator())):
        with pytest.raises(ValueError, match=r"4 student target layers.*3 teacher.*name more teacher layers"):
            call()


@pytest.mark.parametrize("name", ["adaptive", "argmin", "ordered_argmin"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_divergence_that_is_not_finite_is_an_error(name, broken):
    kl = kl_values(2, 4)
    kl[0, 1] = broken
    with pytest.raises(ValueError, match=r"not finite.*metrics\.jsonl"):
        STRATEGIES[name].match(kl, generator())
