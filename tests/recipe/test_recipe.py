"""Recipes: loading, errors, their messages, and where each value came from."""

from __future__ import annotations

import pytest
from recipe_file import STEPS, write

from pipeline.errors import RecipeError
from pipeline.recipe.checks import number_of_steps
from pipeline.recipe.resolve import leaves, load_recipe, refuse_changes
from pipeline.recipe.schema import Recipe, Section, Training


def test_every_field_has_a_description():
    def check(section: type[Section]):
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from check(field.annotation)
            assert field.description, f"{section.__name__}.{name} has no description"
            assert len(field.description.split()) >= 4
            yield name

    assert len(list(check(Recipe))) > 40


def test_unknown_keys_are_errors_with_a_hint_and_all_are_reported(tmp_path, values):
    values["techer"] = values.pop("teacher")
    values["interact"]["stesp"] = 3
    values["reinforce"]["learning_rate"] = -1
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, values))
    message = str(error.value)
    assert "unknown key 'techer'; did you mean 'teacher'?" in message
    assert "unknown key 'interact.stesp'; did you mean 'steps'?" in message
    assert "teacher: missing" in message
    assert "reinforce.learning_rate: Input should be greater than 0, found -1" in message


@pytest.mark.parametrize("key", ["use_dora", "lora_use_dora", "dora"])
def test_dora_is_refused_with_its_reason(tmp_path, values, key):
    with pytest.raises(
        RecipeError, match=rf"unknown key 'interact\.{key}': DoRA is not offered: .* ZeRO-3 .*lora_rank"
    ):
        load_recipe(write(tmp_path, values), [f"interact.{key}=true"])


def test_overrides_and_origins(tmp_path, values):
    resolved = load_recipe(write(tmp_path, values), ["interact.steps=3", "seed=7"])
    assert resolved.recipe.interact.steps == 3 and resolved.recipe.seed == 7
    assert resolved.origins["interact.steps"] == "command line"
    assert resolved.origins["interact.batch_size"] == "recipe"
    assert resolved.origins["precision"] == "default"
    with pytest.raises(RecipeError, match="expected KEY=VALUE"):
        load_recipe(write(tmp_path, values), ["interact.steps"])
    with pytest.raises(RecipeError, match=r"unknown key 'interact\.step'; did you mean 'steps'"):
        load_recipe(write(tmp_path, values), ["interact.step=3"])


def test_the_resolved_recipe_loads_again_to_the_same(tmp_path, values):
    resolved = load_recipe(write(tmp_path, values), ["seed=3"])
    again = tmp_path / "again.yaml"
    again.write_text(resolved.to_yaml())
    assert leaves(load_recipe(again).recipe) == leaves(resolved.recipe)
    assert "seed: 3  # command line" in resolved.to_yaml()


def test_stage_2_reports_inherited_values_and_refuses_changed_ones(tmp_path, values):
    path = write(tmp_path, values)
    first = load_recipe(path, ["seed=3", "verbalize.steps=5"])
    first.recipe.run.mkdir()
    (first.recipe.run / "recipe.yaml").write_text(first.to_yaml())
    second = load_recipe(path)
    assert second.recipe.seed == 3
    assert second.inherited() == ["seed = 3 (from stage 1)"]
    # verbalize.steps is 10 in the file and 5 in the run. The file wins, and the run refuses the change.
    with pytest.raises(RecipeError, match="verbalize.steps: the run has 5, now 10") as error:
        refuse_changes(second, ["verbalize"])
    assert "--recipe" in str(error.value) and "seed" not in str(error.value)
    refuse_changes(second, [])
    changeable = load_recipe(path, ["verbalize.steps=5", "verbalize.micro_batch_size=1", "interact.steps=2"])
    refuse_changes(changeable, ["verbalize"])  # interact has not started, and a micro-batch size changes no result
    with pytest.raises(RecipeError, match="interact.steps: the run has 10, now 2"):
        refuse_changes(changeable, ["verbalize", "interact"])


def test_a_run_that_an_older_version_began_goes_on(tmp_path, values):
    """Its recipe.yaml has no line for a field that is new since: the field has its default."""
    path = write(tmp_path, values)
    run = tmp_path / "run"
    run.mkdir()
    lines = load_recipe(path).to_yaml().splitlines()
    new = ("max_pixels", "min_pixels", "micro_batch_tokens")
    older = [line for line in lines if not line.strip().startswith(new) and not line.startswith("train:")]
    assert len(lines) - len(older) == 6
    (run / "recipe.yaml").write_text("\n".join(older))
    refuse_changes(load_recipe(path), STEPS)
    refuse_changes(load_recipe(run / "recipe.yaml"), STEPS)
    with pytest.raises(
        RecipeError, match=r"train: the run has \['decoder', 'projector', 'head'\], now \['decoder', 'head'\]"
    ):
        refuse_changes(load_recipe(path, ["train=[decoder,head]"]), STEPS)


def test_steps_from_epochs():
    assert number_of_steps(Training(epochs=2, batch_size=32), samples=1000) == 62
    assert number_of_steps(Training(steps=5, batch_size=32), samples=1000) == 5


def test_a_missing_recipe_and_broken_yaml_are_errors(tmp_path):
    with pytest.raises(RecipeError, match="no recipe at .*; the shipped ones are in .*recipes$"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "broken.yaml")
