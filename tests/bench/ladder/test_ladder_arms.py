"""The table of arms: every arm is a recipe that the product takes, and equal stages 1 are one."""

import importlib.util

import pytest
from running import ROOT

from bench.ladder.arms import ARMS, BY_NAME, Arm
from bench.ladder.cells import SCALES
from bench.ladder.jobs import settings
from bench.ladder.plan import COMMON, SeedFolder, Tried
from pipeline.errors import RecipeError
from pipeline.recipe.checks import check_recipe
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import leaves

CELL = SCALES["smoke"].cells[0]


def recipe_of(folder, values):
    (folder / "manifest.json").touch()
    values = {"run": str(folder / "run"), "data.train": str(folder), **COMMON, **values}
    return load_recipe(ROOT / CELL.recipe, settings(values)[1:]).recipe


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # the recipe's paths are relative to it


def test_names_are_unique():
    assert len(BY_NAME) == len(ARMS)


def test_a_borrowed_learning_rate_comes_from_an_arm_with_a_sweep_of_its_own():
    borrowing = [arm for arm in ARMS if arm.rate_of]
    assert borrowing and all(BY_NAME[arm.rate_of].rate_of is None for arm in borrowing)
    assert all(BY_NAME[arm.rate_of].main for arm in borrowing)  # where the borrower runs, the lender has


@pytest.mark.parametrize("name", BY_NAME)
def test_every_arm_is_a_recipe_that_the_product_takes(tmp_path, name):
    arm = BY_NAME[name]
    recipe = recipe_of(tmp_path, arm.settings(CELL.updates, 3e-3, 1.0))
    check_recipe(recipe, ("interact", "reinforce"))
    found = leaves(recipe)
    for key, value in {**arm.options, **arm.stage_1}.items():
        inner = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        assert {k: found[k] for k in inner} == inner
    assert found["interact.steps"] + found["reinforce.steps"] == (arm.interact + arm.reinforce) * CELL.updates
    check_recipe(recipe_of(tmp_path, arm.stage_1), ("verbalize", "cache"))


def test_a_misspelled_option_would_be_found(tmp_path):
    wrong = Arm("wrong", "", "", interact=1, options={"interact.matchin": "uniform"})
    with pytest.raises(RecipeError, match=r"did you mean .*matching"):
        recipe_of(tmp_path, wrong.settings(CELL.updates, 3e-3, 1.0))


def test_programs_exist():
    for arm in ARMS:
        start, *rest = arm.program.split()
        assert importlib.util.find_spec(*rest) if start == "-m" else (ROOT / start).is_file(), arm.name


def test_stage_1_is_named_after_the_first_arm_with_its_settings():
    assert {arm.name: arm.stage_1_name for arm in ARMS if arm.stage_1} == {
        "logit_lens": "stage-1-logit_lens",
        "sparser_layers": "stage-1-sparser_layers",
        "topk_cache": "stage-1-topk_cache",
        "hidden_cache": "stage-1-hidden_cache",
        "features_l2": "stage-1-features_l2",
        "distil_lens": "stage-1-features_l2",
    }
    assert {arm.stage_1_name for arm in ARMS if not arm.stage_1} == {"stage-1"}
    assert Arm("new", "", "", stage_1={"verbalize.steps": 1}).stage_1_name == "stage-1-new"


def test_a_program_takes_the_place_of_stage_2_alone(tmp_path):
    jobs = SeedFolder(tmp_path, CELL, 0, other_task=False).jobs([Tried(BY_NAME["distil_lens"], 3e-3)])
    commands = {job.path.name: list(job.command) for job in jobs}
    ours, stage_1 = commands["distil_lens-0.003"], commands["stage-1-features_l2"]
    assert ours[:6] == ["-m", "bench.ladder.distil_lens", "--stage", "2", "--recipe", CELL.recipe]
    assert stage_1[:5] == ["launch/train.py", "--stage", "1", "--recipe", CELL.recipe]
    assert {"verbalize.steps=0", 'interact.matching="uniform"', "reinforce.steps=0"} <= set(ours)
