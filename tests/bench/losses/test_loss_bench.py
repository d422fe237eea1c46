"""The parts of the loss benchmark: the compared forms compute the same values."""

import pytest
import torch

from bench.losses.problem import Case, Problem, interaction
from bench.losses.run import NAIVE, agreement, dense_form, products, tried

CASE = Case(tokens=24, width=16, vocab=600, students=1, teachers=4, kept=8)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(CASE)


@pytest.mark.parametrize("name", NAIVE)
def test_dense_forms_have_the_same_values_and_gradient(problem, name):
    problem.clear()
    values = dense_form(problem, NAIVE[name])
    gradient = problem.h.grad[0].clone()
    problem.clear()
    torch.testing.assert_close(values, dense_form(problem, NAIVE["naive_shared"]))
    torch.testing.assert_close(gradient, problem.h.grad[0])


def test_ours_agrees_with_them_within_bfloat16(problem):
    problem.clear()
    found = agreement(problem)
    assert found["value_difference"] < 1e-3 and found["gradient_difference"] < 3e-2


def test_the_floor_is_the_products_of_the_problem(problem):
    products(problem, 1)()  # fits, and needs no gradient
    values, match = interaction(problem)
    assert values.shape == (1, 4) and len(match) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("No module named 'peer'"), "not installed: No module named 'peer'"),
        (RuntimeError("no kernel image\nmore"), "RuntimeError: no kernel image"),
    ],
)
def test_another_packages_failure_is_a_reason_and_ends_nothing(error, reason):
    def make():
        def run():
            raise error

        return run

    assert tried(make) == (None, reason)
    assert tried(lambda: dict) == (dict, "")
