"""The commands that messages advise can be typed as they stand."""

import shlex

import pytest

from launch import cache, train
from pipeline import commands


@pytest.mark.parametrize(("checkout", "start"), [(True, ["deepspeed", "launch/{}.py"]), (False, ["vlsi-{}"])])
def test_what_is_advised_can_be_typed(monkeypatch, checkout, start):
    monkeypatch.setattr(commands, "CHECKOUT", checkout)
    recipe = "my runs/recipe.yaml"
    for program, module, advised in (
        ("train", train, commands.train_command(2, recipe, "--set", "teacher.layers=[1, 2]")),
        ("cache", cache, commands.cache_command(recipe, "--only-missing")),
    ):
        typed = shlex.split(advised)
        assert typed[: len(start)] == [word.format(program) for word in start]
        assert str(module.parse(typed[len(start) :]).recipe) == recipe


def test_this_is_a_checkout():
    assert commands.CHECKOUT and commands.train_command(1, "R") == "deepspeed launch/train.py --stage 1 --recipe R"
