"""Presets: what they fill in, and what goes before them."""

from __future__ import annotations

from typing import get_args

import pytest
from recipe_file import STEPS, write

from pipeline.errors import RecipeError
from pipeline.recipe.checks import check_recipe
from pipeline.recipe.presets import PRESETS
from pipeline.recipe.resolve import SHIPPED, load_recipe, refuse_changes
from pipeline.recipe.schema import Recipe, leaves


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
