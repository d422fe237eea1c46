"""The shipped recipes: listed, shown, valid for their models' configs, planned, and each as a tiny twin."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from running import ROOT, deepspeed
from tiny_families import FAMILIES, write_family

from pipeline.__main__ import main
from pipeline.recipe.checks import check_recipe, number_of_layers, target_layers
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import STEPS, Recipe
from pipeline.recipe.shipped import shipped_recipe, shipped_recipes
from pipeline.results.plan.knobs import fits
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.run import Planned
from pipeline.results.plan.samples import Given, describe_samples

PAIRS = [one.name for one in shipped_recipes() if "_to_" in one.name]
DEFAULT = ((7, None), (4, None))
"""(depth, layers) of a twin's teacher and student: 2, 6 and 2, as in a real pair 2, ..., 78 and 2, ..., 26."""
SPARSE = ((8, [1, 3, 5, 7]), (7, [1, 3, 5]))
"""10, 30, 50, 70 of 80 and 4, 12, 20 of 28."""
TWINS = {
    "qwen2_vl_72b_to_7b": ("qwen2_vl", *DEFAULT),
    "qwen2_vl_72b_to_2b": ("qwen2_vl", *DEFAULT),
    "qwen2_vl_7b_to_2b": ("qwen2_vl", (7, [2, 4, 6]), (7, None)),
    "llava_onevision_72b_to_7b": ("llava_onevision", *SPARSE),
    "llava_onevision_72b_to_0_5b": ("llava_onevision", *SPARSE),
    "qwen2_5_vl_72b_to_7b": ("qwen2_5_vl", *DEFAULT),
    "qwen3_vl_32b_to_8b": ("qwen3_vl", *DEFAULT),
    "qwen3_vl_8b_to_2b": ("qwen3_vl", *DEFAULT),
    "internvl3_8b_to_1b": ("internvl", *DEFAULT),
    "smolvlm_500m_to_256m": ("idefics3", (7, None), (6, None)),
}
ALWAYS = ("qwen3_vl_8b_to_2b",)
"""Whole runs of the other families are in tests/distributed; the other twins with -m families."""


def of_configs(name: str, train: Path) -> Recipe:
    """A shipped recipe with the shipped configs as its models, on data that is there."""
    shipped = shipped_recipe(name)
    folders = [f"{role}.path={folder}" for role, folder in shipped.configs().items()]
    assert len(folders) == 2, "both models' config.json are shipped"
    return load_recipe(
        shipped.path, [*folders, f"data.train={train}", f"data.held_out={train}", f"run={train.parent / 'run'}"]
    ).recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "train", 20, shards=2)


def test_they_are_listed_and_shown(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for one in shipped_recipes():
        assert one.name in listed and one.pair in listed and 20 < len(one.line) < 220 and one.line in listed
    assert main(["recipes", "qwen2_vl_72b_to_2b.yaml"]) == 0
    assert capsys.readouterr().out == shipped_recipe("qwen2_vl_72b_to_2b").text
    assert main(["recipes", "qwen2_vl_72_to_2b"]) == 2
    assert "did you mean 'qwen2_vl_72b_to_2b'?" in capsys.readouterr().err


def test_every_pair_has_a_twin():
    assert set(TWINS) == set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_valid_and_planned(name, data):
    """On 64 GPUs of 80 GiB each step fits, little is padding, and comments beside models' paths have their depths."""
    recipe = of_configs(name, data)
    check_recipe(recipe, STEPS, world=8)
    text = shipped_recipe(name).text
    for model in (recipe.teacher, recipe.student):
        assert f"{number_of_layers(model.path)} layers" in text
    assert len(target_layers(recipe.teacher)) > len(target_layers(recipe.student))
    lengths = (2850, 150, 2600) if "llava" in name else (900, 150, 650)
    samples = describe_samples(recipe, Given(2_900_000, *lengths), patches_per_token=4, patch_numbers=1176)
    planned, machine = Planned(recipe, replace(samples, shards=64)), Machine(64, 80)
    for step in planned.steps:
        plan = planned.plan(step, machine)
        assert not plan.problem and plan.memory.total < machine.usable, step
        if step != "cache":
            assert plan.time.micro_steps == 1, "each gathers all weights"
            assert plan.time.real_share > (0.65 if step == "verbalize" else 0.75), step


def test_finetuning_on_the_teachers_answers_needs_nothing_of_stage_1(data):
    folders = [f"{role}.path={folder}" for role, folder in shipped_recipe("teacher_answers").configs().items()]
    recipe = load_recipe(
        shipped_recipe("teacher_answers").path,
        [*folders, f"data.train={data}", "data.held_out=null", f"reinforce.train={data}"],
    ).recipe
    check_recipe(recipe, STEPS[2:], world=8)
    assert load_recipe(shipped_recipe("wrong_answers").path).recipe.interact.epochs == recipe.reinforce.epochs
    samples = describe_samples(recipe, Given(2_900_000, 900, 150, 650), patches_per_token=4, patch_numbers=1176)
    planned, machine = Planned(recipe, replace(samples, shards=64)), Machine(64, 80)
    assert planned.steps == ["reinforce"] and fits(planned.plan("reinforce", machine), machine)


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.families) for name in TWINS]
)
def test_its_twin_goes_through_both_stages(name, data, tmp_path):
    """The shipped file with tiny models, little data and few updates; its other values stay."""
    kind, *sides = TWINS[name]
    values = yaml.safe_load(shipped_recipe(name).text)
    write = write_family if kind in FAMILIES else tiny.write_vlm
    for role, (depth, layers) in zip(("teacher", "student"), sides, strict=True):
        assert (layers is None) == ("layers" not in values[role]), "the pattern is the recipe's"
        values[role] = {"path": str(write(tmp_path / role, kind, depth, 32)), "layers": layers}
    values["data"] = {"train": str(data), "workers": 0}
    values |= {"run": str(tmp_path / "run"), "precision": "fp32", "deepspeed": str(ROOT / "ds_configs/zero3_cpu.json")}
    for step in ("verbalize", "interact", "reinforce"):
        values[step] |= {"epochs": None, "steps": 3, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 3e-3}
    values["interact"]["lora_rank"] = 4
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["cross_entropy"] for line in lines if line["step"] == "reinforce"]
    assert losses[-1] < losses[0] and (tmp_path / "run" / "student" / "model.safetensors").is_file()
