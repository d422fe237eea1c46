"""Presets: what they fill in, and what goes before them."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import get_args

import pytest
from recipe_file import STEPS, write

from pipeline.errors import RecipeError
from pipeline.recipe.checks import check_recipe
from pipeline.recipe.presets import PRESETS
from pipeline.recipe.resolve import SHIPPED, leaves, load_recipe, refuse_changes
from pipeline.recipe.schema import Recipe


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_what_is_not_set_and_says_so(tmp_path, values, name):
    values["preset"] = name
    if PRESETS[name].to_the_end:
        del values["reinforce"]
    resolved = load_recipe(write(tmp_path, values))
    found = leaves(resolved.recipe)
    for key, value in PRESETS[name].values.items():
        assert found[key] == value and resolved.origins[key] == f"preset {name}"
    check_recipe(resolved.recipe, STEPS)
    again = tmp_path / "again.yaml"
    again.write_text(resolved.to_yaml())
    assert leaves(load_recipe(again).recipe) == found


def test_a_value_of_the_recipe_or_the_command_line_goes_before_the_preset_s(tmp_path, values):
    del values["reinforce"]
    resolved = load_recipe(write(tmp_path, values | {"preset": "clean_answers"}), ["interact.cross_entropy_weight=0.5"])
    assert resolved.recipe.interact.cross_entropy_weight == 0.5
    assert resolved.origins["interact.cross_entropy_weight"] == "command line"


@pytest.mark.parametrize("reinforce", [{"steps": 10, "batch_size": 8}, {"epochs": 1, "batch_size": 8}])
def test_a_recipe_that_finetunes_against_its_preset_is_refused(tmp_path, values, reinforce):
    values |= {"preset": "wrong_answers", "reinforce": reinforce}
    with pytest.raises(RecipeError, match="preset: wrong_answers is interaction to the end.*set preset: paper"):
        load_recipe(write(tmp_path, values))


def test_without_a_preset_a_missing_reinforce_section_is_an_error(tmp_path, values):
    del values["reinforce"]
    with pytest.raises(RecipeError, match="reinforce: missing"):
        load_recipe(write(tmp_path, values))
    with pytest.raises(RecipeError, match="preset: Input should be 'paper'"):
        load_recipe(write(tmp_path, values | {"preset": "papper", "reinforce": values["interact"]}))


def test_every_preset_has_a_description_in_the_schema():
    assert set(PRESETS) == set(get_args(Recipe.model_fields["preset"].annotation))
    assert all(f"{name}:" in Recipe.model_fields["preset"].description for name in PRESETS)


@pytest.mark.parametrize("path", sorted((SHIPPED / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_recipe_loads_and_one_for_a_preset_uses_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that no run of this machine adds its values
    resolved = load_recipe(path)
    assert resolved.recipe.deepspeed.is_file()
    if path.stem in PRESETS:
        assert resolved.recipe.preset == path.stem and resolved.recipe.reinforce.steps == 0


def test_the_preset_may_still_be_chosen_after_stage_1_and_not_within_stage_2(tmp_path, values):
    """What the cache says of the answers (cache-info --suspects) is known only then."""
    first = load_recipe(write(tmp_path, values))
    first.recipe.run.mkdir()
    (first.recipe.run / "recipe.yaml").write_text(first.to_yaml())
    del values["reinforce"]
    second = load_recipe(write(tmp_path, values | {"preset": "clean_answers"}))
    refuse_changes(second, ["verbalize", "cache"])
    with pytest.raises(
        RecipeError, match=r"interact.cross_entropy_weight: the run has 0.0, now 1.0 \(preset clean_answers\)"
    ):
        refuse_changes(second, ["verbalize", "cache", "interact"])


FILLED_IN = {key for preset in PRESETS.values() for key in preset.values}


def with_preset(values: dict, name: str) -> dict:
    """The recipe for a preset: without the reinforce section where the preset needs none."""
    return {k: v for k, v in values.items() if k != "reinforce" or not PRESETS[name].to_the_end} | {"preset": name}


def begin(recipe: Path) -> Path:
    """The recipe.yaml that a run's first job leaves."""
    resolved = load_recipe(recipe)
    resolved.recipe.run.mkdir()
    path = resolved.recipe.run / "recipe.yaml"
    path.write_text(resolved.to_yaml())
    return path


@pytest.mark.parametrize(("before", "after"), permutations(PRESETS, 2))
def test_another_preset_after_stage_1_keeps_nothing_of_the_one_before(tmp_path, values, before, after):
    alone = leaves(load_recipe(write(tmp_path, with_preset(values, after))).recipe)
    begin(write(tmp_path, with_preset(values, before)))
    then = load_recipe(write(tmp_path, with_preset(values, after)))
    found = leaves(then.recipe)
    assert {key: found[key] for key in FILLED_IN} == {key: alone[key] for key in FILLED_IN}
    assert not any("stage 1" in then.origins[key] for key in FILLED_IN)


@pytest.mark.parametrize(("before", "after"), permutations([name for name in PRESETS if PRESETS[name].to_the_end], 2))
def test_nor_does_the_run_s_own_recipe_with_another_preset_on_the_command_line(tmp_path, values, before, after):
    alone = leaves(load_recipe(write(tmp_path, with_preset(values, after))).recipe)
    own = begin(write(tmp_path, with_preset(values, before)))
    found = leaves(load_recipe(own, [f"preset={after}"]).recipe)
    assert {key: found[key] for key in FILLED_IN} == {key: alone[key] for key in FILLED_IN}


def test_what_the_recipe_before_set_against_its_preset_stays(tmp_path, values):
    values = with_preset(values, "clean_answers")
    begin(write(tmp_path, {**values, "interact": {**values["interact"], "cross_entropy_weight": 0.5}}))
    then = load_recipe(write(tmp_path, with_preset(values, "wrong_answers")))
    assert then.recipe.interact.cross_entropy_weight == 0.5
    assert then.origins["interact.cross_entropy_weight"] == "stage 1"
