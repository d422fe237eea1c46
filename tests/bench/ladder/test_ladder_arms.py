"""The table of arms: every arm is a recipe that the product takes, and equal stages 1 are one."""

import importlib.util
import sys

import pytest
import torch
import yaml
from running import ROOT

from bench.ladder.arms import ARMS, BY_NAME, MAIN, MATCHINGS, Arm, arms_of
from bench.ladder.cells import SCALES, TASKS, Cell
from bench.ladder.jobs import settings
from bench.ladder.plan import SeedFolder, Tried
from bench.ladder.run import main as ladder
from data_prep.__main__ import main as data_prep
from data_prep.shards import ShardFolder
from demo.plans import batches_for
from demo.sizes import SIZES
from demo.training import TrainingPlan, train
from demo.vocabulary import INPUTS, build_tokenizer, write_processor
from pipeline.errors import RecipeError
from pipeline.recipe.checks import check_recipe
from pipeline.recipe.resolve import leaves, load_recipe

CELL = SCALES["smoke"].cells[0]


def recipe_of(folder, values):
    (folder / "manifest.json").touch()
    values = {
        "run": str(folder / "run"),
        "data.train": str(folder),
        "data.held_out": str(folder),
        **CELL.task.common,
        **values,
    }
    return load_recipe(ROOT / CELL.task.recipe, settings(values)[1:]).recipe


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # the recipe's paths are relative to it


def test_the_wide_pair_trains_and_every_arm_of_the_gpu_scale_is_a_recipe_of_it(tmp_path):
    for role, command in TASKS["puzzles-wide"].made_by.items():
        assert command[:2] == ("-m", "demo.build_models") and role in command
        plan = TrainingPlan(tower_steps=1, steps=1, rate=1e-3, tower_rate=1e-3, batch=4)
        tokenizer = build_tokenizer(INPUTS["puzzles"].words)
        model = train(SIZES["wide"][role], batches_for("puzzles", role), tokenizer, plan, "cpu", 0)
        model.save_pretrained(tmp_path / role)
        write_processor(tmp_path / role, INPUTS["puzzles"])
    (tmp_path / "manifest.json").touch()
    for cell in SCALES["gpu"].cells:
        common = dict(cell.task.common) | {f"{role}.path": str(tmp_path / role) for role in ("teacher", "student")}
        data = {"run": str(tmp_path / "run"), "data.train": str(tmp_path), "data.held_out": str(tmp_path)}
        for arm in arms_of(cell.arms, cell.also):
            values = common | data | arm.settings(cell.updates, 3e-3, 1.0)
            recipe = load_recipe(ROOT / cell.task.recipe, settings(values)[1:]).recipe
            check_recipe(recipe, ("verbalize", "cache", "interact", "reinforce"))
            assert len(recipe.teacher.layers) == 11 and len(recipe.student.layers) == 5


def test_the_gpu_scale_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ladder", "--scale", "gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        ladder()


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
        "longer_stage_1": "stage-1-longer_stage_1",
        "logit_lens": "stage-1-logit_lens",
        "sparser_layers": "stage-1-sparser_layers",
        "topk_cache": "stage-1-topk_cache",
        "hidden_cache": "stage-1-hidden_cache",
        "features_l2": "stage-1-features_l2",
        "distil_lens": "stage-1-features_l2",
    }
    others = {arm.name: arm.stage_1_name for arm in ARMS if not arm.stage_1 and arm.stage_1_name != "stage-1"}
    assert others == {"wrong_verbalizers": "stage-1-wrong_verbalizers"}
    assert Arm("new", "", "", stage_1={"verbalize.steps": 1}).stage_1_name == "stage-1-new"


def test_verbalizers_of_wrong_answers_learn_from_data_of_their_own_and_the_cache_is_of_the_cell_s(tmp_path):
    cell = Cell("small", "", "puzzles", 0.0, samples=5, held_out=4)
    arms = [Tried(BY_NAME[name], 3e-3) for name in ("interaction", "wrong_verbalizers")]
    jobs = {job.path.name: job for job in SeedFolder(tmp_path, cell, 0, other_task=False).jobs(arms)}
    noise = {
        name: job.command[job.command.index("--noise") + 1] for name, job in jobs.items() if "--noise" in job.command
    }
    assert noise == {"data": "0.0", "data-40": "0.4"}
    stage_1 = jobs["stage-1-wrong_verbalizers"]
    assert {path.name for path in stage_1.needs} == {"data", "data-40"}
    own = [value for value in stage_1.command if value.startswith("verbalize.train=")]
    assert own and own[0].endswith('data-40/train"') and set(stage_1.command) - set(jobs["stage-1"].command) > set(own)
    assert not any("data-40" in value for value in jobs["wrong_verbalizers-0.003"].command)


def test_a_program_takes_the_place_of_stage_2_alone(tmp_path):
    jobs = SeedFolder(tmp_path, CELL, 0, other_task=False).jobs([Tried(BY_NAME["distil_lens"], 3e-3)])
    commands = {job.path.name: list(job.command) for job in jobs}
    ours, stage_1 = commands["distil_lens-0.003"], commands["stage-1-features_l2"]
    assert ours[:6] == ["-m", "bench.ladder.distil_lens", "--stage", "2", "--recipe", CELL.task.recipe]
    assert stage_1[:5] == ["launch/train.py", "--stage", "1", "--recipe", CELL.task.recipe]
    assert {"verbalize.steps=0", 'interact.matching="uniform"', "reinforce.steps=0"} <= set(ours)


def test_a_cell_of_matchings_has_the_main_arms_and_those_that_match_otherwise():
    names = {arm.name for arm in arms_of(MATCHINGS)}
    others = {"cold", "random", "uniform", "argmin", "ordered_argmin", "earliest", "latest"}
    assert names == {arm.name for arm in arms_of(MAIN)} | others
    assert all(BY_NAME[name].stage_1_name == "stage-1" for name in others)


@pytest.mark.parametrize("cell", SCALES["cpu"].cells, ids=lambda cell: cell.name)
def test_a_cell_s_recipe_is_about_its_models(cell):
    recipe = yaml.safe_load((ROOT / cell.task.recipe).read_text())
    for role in ("teacher", "student"):
        assert recipe[role]["path"] == f"demo/models/{cell.data}/{role}"


def test_further_arms_of_a_cell_are_arms():
    named = {name for scale in SCALES.values() for cell in scale.cells for name in cell.also}
    assert named and named <= set(BY_NAME)
    assert [arm.name for arm in arms_of(MAIN, ("heavier_last",)) if not arm.main] == ["heavier_last"]


def test_a_deep_cell_asks_deep_questions(tmp_path):
    cell = Cell("small", "", "puzzles-deep", 0.4, samples=5, held_out=4)
    jobs = SeedFolder(tmp_path, cell, 0, other_task=True).jobs([Tried(BY_NAME["finetune"], 3e-3)])
    asked = {}
    for job in jobs:
        if job.path.name in ("data", "other"):
            assert data_prep(job.command[2:]) == 0
            shards = ShardFolder(job.path / "held_out")
            records = [shards.read(index).record for index in range(len(shards))]
            asked[job.path.name] = {record["question_type"] for record in records}
            assert all(record["provenance"]["rule"]["colour"]["follows"] == "shape" for record in records)
    assert asked == {"data": {"next"}, "other": {"tile"}}
