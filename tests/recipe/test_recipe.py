"""Recipes: errors, their messages, and where each value came from."""

from __future__ import annotations

import json
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import get_args

import pytest
import yaml

from pipeline.errors import RecipeError
from pipeline.recipe.checks import check_recipe, number_of_steps, target_layers
from pipeline.recipe.presets import PRESETS
from pipeline.recipe.resolve import SHIPPED, load_recipe, refuse_another_student, refuse_another_teacher, refuse_changes
from pipeline.recipe.schema import Model, Recipe, Section, Training, leaves

STEPS = ("verbalize", "cache", "interact", "reinforce")


@pytest.fixture
def values(tmp_path: Path) -> dict:
    for role, depth in (("teacher", 8), ("student", 4)):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": depth}}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    (tmp_path / "zero.json").write_text('{"gradient_clipping": "auto", "zero_optimization": {"stage": 2}}')
    training = {"steps": 10, "batch_size": 8, "micro_batch_size": 2}
    return {
        "run": str(tmp_path / "run"),
        "deepspeed": str(tmp_path / "zero.json"),
        "data": {"train": str(tmp_path / "data")},
        "teacher": {"path": str(tmp_path / "teacher"), "layers": [1, 2, 3, 4, 5, 6, 7]},
        "student": {"path": str(tmp_path / "student"), "layers": [1, 2, 3]},
        "verbalize": dict(training),
        "interact": dict(training),
        "reinforce": dict(training),
    }


def write(tmp_path: Path, values: dict) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


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


def test_all_cross_field_problems_are_reported_at_once(tmp_path, values):
    values["data"]["train"] = str(tmp_path / "nowhere")
    values["student"]["path"] = str(tmp_path / "nobody")
    values["verbalize"] |= {"batch_size": 9, "epochs": 2}
    values["interact"] |= {"final_learning_rate": 1.0}
    values["reinforce"].pop("steps")
    config = {"gradient_clipping": 0.5, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError) as error:
        check_recipe(load_recipe(write(tmp_path, values)).recipe, STEPS, world=2)
    message = str(error.value)
    assert message.startswith("8 problem(s)")
    assert "data.train: no" in message and "python -m data_prep shard" in message
    assert "student.path: no" in message
    assert "verbalize.batch_size: 9 is no multiple of verbalize.micro_batch_size x ranks = 2 x 2 = 4" in message
    assert "verbalize: expected one of steps and epochs, found steps: 10 and epochs: 2.0" in message
    assert "reinforce: expected one of steps and epochs, found neither" in message
    assert "interact.final_learning_rate: 1.0 is above interact.learning_rate" in message
    assert "gradient_clipping is 0.5 in" in message and "bf16.enabled is True in" in message
    assert "the recipe owns it" in message


def test_a_budget_in_tokens_takes_any_batch_size_and_may_change(tmp_path, values):
    odd = ["verbalize.batch_size=9", "verbalize.micro_batch_tokens=4096"]
    path = write(tmp_path, values)
    with pytest.raises(RecipeError, match="verbalize.batch_size: 9 is no multiple"):
        check_recipe(load_recipe(path, odd[:1]).recipe, ["verbalize"], world=2)
    check_recipe(load_recipe(path, odd).recipe, ["verbalize"], world=2)
    first = load_recipe(path, odd)
    first.recipe.run.mkdir()
    (first.recipe.run / "recipe.yaml").write_text(first.to_yaml())
    refuse_changes(load_recipe(path, [odd[0], "verbalize.micro_batch_tokens=2048"]), ["verbalize"])


def test_teacher_targets_must_outnumber_student_targets(tmp_path, values):
    values["teacher"]["layers"] = [2, 4, 6]
    with pytest.raises(RecipeError, match="3 teacher targets for 3 student targets") as error:
        check_recipe(load_recipe(write(tmp_path, values)).recipe, STEPS)
    assert "for example teacher.layers: [2, 4, 5, 7]" in str(error.value)


def test_target_layers_must_be_below_the_last(tmp_path, values):
    values["student"]["layers"] = [2, 4]
    with pytest.raises(RecipeError, match=r"expected increasing layers from 1 to 3 .*found \[2, 4\]"):
        check_recipe(load_recipe(write(tmp_path, values)).recipe, STEPS)
    assert target_layers(Model(path=tmp_path / "teacher")) == (2, 6)


def test_stage_2_needs_no_teacher_folder(tmp_path, values):
    values["teacher"]["path"] = str(tmp_path / "gone")
    recipe = load_recipe(write(tmp_path, values)).recipe
    check_recipe(recipe, ("interact", "reinforce"))
    with pytest.raises(RecipeError, match="teacher.path"):
        check_recipe(recipe, ("verbalize", "cache"))


def test_a_cache_job_needs_no_student_folder(tmp_path, values):
    values["student"] = {"path": str(tmp_path / "gone")}
    recipe = load_recipe(write(tmp_path, values)).recipe
    check_recipe(recipe, ("cache",))
    with pytest.raises(RecipeError, match="student.path"):
        check_recipe(recipe, ("verbalize", "cache"))


def test_steps_from_epochs():
    assert number_of_steps(Training(epochs=2, batch_size=32), samples=1000) == 62
    assert number_of_steps(Training(steps=5, batch_size=32), samples=1000) == 5


def test_a_missing_recipe_and_broken_yaml_are_errors(tmp_path):
    with pytest.raises(RecipeError, match="no recipe at .*; the shipped ones are in .*recipes$"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_a_mapped_vocabulary_is_refused_with_states_that_only_the_teachers_head_reads(tmp_path, values):
    shared = load_recipe(write(tmp_path, values)).recipe
    assert (shared.vocabulary, shared.cache.max_bucket_share) == ("shared", 0.1)
    values |= {"vocabulary": "mapped", "cache": {"codec": {"name": "hidden"}}}
    for steps in (["cache"], ["interact"]):
        with pytest.raises(RecipeError, match="mapped needs cache.codec.name: sampled or topk, found hidden"):
            check_recipe(load_recipe(write(tmp_path, values)).recipe, steps)
    values["cache"]["codec"]["name"] = "topk"
    with pytest.raises(RecipeError) as error:
        check_recipe(load_recipe(write(tmp_path, values), ["student.path=nowhere"]).recipe, ["cache"])
    assert str(error.value).startswith("1 problem(s)") and "student.path: no" in str(error.value)


def test_options_that_contradict_each_other_are_refused(tmp_path, values):
    values["interact"] |= {"matching": "last_only", "last_weight": 0, "temperature": 0.1}
    values["reinforce"] |= {"label_smoothing": 0.1, "loss_power": 0.5, "train": str(tmp_path / "answers")}
    with pytest.raises(RecipeError) as error:
        check_recipe(load_recipe(write(tmp_path, values)).recipe, STEPS)
    message = str(error.value)
    assert message.startswith("4 problem(s)")
    assert "interact.temperature: 0.1 is that of the draw of matching: adaptive; last_only has none" in message
    assert "interact: nothing to train: matching is last_only, and last_weight" in message
    assert "reinforce.train: no" in message and "python -m pipeline answer" in message
    assert "expected one of label_smoothing and loss_power, found both" in message


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


def test_another_run_s_stage_1_must_be_of_the_same_student(tmp_path, values):
    base, own = tmp_path / "base", str(tmp_path / "own")
    base.mkdir()
    (base / "recipe.yaml").write_text(load_recipe(write(tmp_path, values | {"run": str(base)})).to_yaml())
    recipe = load_recipe(write(tmp_path, values | {"run": own, "stage_1": str(base), "seed": 5})).recipe
    refuse_another_student(recipe)
    other = load_recipe(write(tmp_path, values | {"run": own, "stage_1": str(base)}), ["student.layers=[1,2]"]).recipe
    with pytest.raises(
        RecipeError, match=r"another student:\n  student.layers: .*base has \[1, 2, 3\], this recipe \[1, 2\]"
    ):
        refuse_another_student(other)
    nowhere = load_recipe(write(tmp_path, values | {"run": own, "stage_1": str(tmp_path / "nowhere")})).recipe
    with pytest.raises(RecipeError, match=r"stage_1: .*nowhere is no run: expected a run's folder"):
        refuse_another_student(nowhere)


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


def test_a_step_may_name_its_own_deepspeed_config(tmp_path, values):
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 1}}')
    values["interact"]["deepspeed"] = str(own)
    resolved = load_recipe(write(tmp_path, values), ["cache.deepspeed=ds_configs/zero3_offload.json"])
    recipe = resolved.recipe
    files = {step: recipe.deepspeed_of(getattr(recipe, step)).name for step in STEPS}
    assert files == dict(zip(STEPS, ("zero.json", "zero3_offload.json", "own.json", "zero.json"), strict=True))
    assert resolved.origins["interact.deepspeed"] == "recipe"
    check_recipe(recipe, STEPS)
    again = tmp_path / "again.yaml"
    again.write_text(resolved.to_yaml())
    assert leaves(load_recipe(again).recipe) == leaves(recipe)


def test_each_step_s_deepspeed_config_is_checked_and_the_same_file_once(tmp_path, values):
    own = tmp_path / "own.json"
    own.write_text('{"gradient_clipping": 2, "zero_optimization": {"stage": 1}}')
    values["interact"]["deepspeed"] = values["reinforce"]["deepspeed"] = str(own)
    values["verbalize"]["deepspeed"] = str(tmp_path / "none.json")
    recipe = load_recipe(write(tmp_path, values)).recipe
    with pytest.raises(RecipeError, match=f"gradient_clipping is 2 in {own}") as error:
        check_recipe(recipe, STEPS)
    assert str(error.value).startswith("2 problem(s)") and f"no file {tmp_path}/none.json" in str(error.value)
    check_recipe(recipe, ("cache",))  # uses none of the two


def test_bfloat16_gradients_without_zero_are_refused(tmp_path, values):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(RecipeError, match="ZeRO stage 0.*use ds_configs/zero1.json, which does, or precision: fp32"):
        check_recipe(load_recipe(write(tmp_path, values)).recipe, STEPS)
    check_recipe(load_recipe(write(tmp_path, values)).recipe, ("cache",))  # forwards have no gradients
    check_recipe(load_recipe(write(tmp_path, values), ["precision=fp32"]).recipe, STEPS)
    (tmp_path / "zero.json").write_text('{"data_types": {"grad_accum_dtype": "bf16"}}')
    check_recipe(load_recipe(write(tmp_path, values)).recipe, STEPS)


def test_a_run_may_go_on_with_another_deepspeed_config(tmp_path, values):
    first = load_recipe(write(tmp_path, values))
    first.recipe.run.mkdir()
    (first.recipe.run / "recipe.yaml").write_text(first.to_yaml())
    other = load_recipe(write(tmp_path, values), ["interact.deepspeed=other.json"])
    refuse_changes(other, STEPS)  # raises nothing
    assert str(other.recipe.interact.deepspeed) == "other.json"
    with pytest.raises(RecipeError, match="interact.clip"):
        refuse_changes(load_recipe(write(tmp_path, values), ["interact.clip=0.5"]), STEPS)


def test_measuring_on_held_out_data_needs_held_out_data(tmp_path, values):
    path = write(tmp_path, values)
    with pytest.raises(
        RecipeError, match=r"interact.evaluate_every: 5 needs data.held_out: .*; found no data.held_out"
    ):
        check_recipe(load_recipe(path, ["interact.evaluate_every=5"]).recipe, STEPS)
    other = ["reinforce.evaluate_every=5", f"data.held_out={tmp_path / 'none'}"]
    with pytest.raises(RecipeError, match="found data.held_out: .*none, without manifest.json"):
        check_recipe(load_recipe(path, other).recipe, STEPS)
    check_recipe(load_recipe(path, other).recipe, ("interact",))
    check_recipe(load_recipe(path, [*other[:1], f"data.held_out={tmp_path / 'data'}"]).recipe, STEPS)
    first = load_recipe(path)
    first.recipe.run.mkdir()
    (first.recipe.run / "recipe.yaml").write_text(first.to_yaml())
    refuse_changes(load_recipe(path, ["reinforce.evaluate_every=5"]), STEPS)  # a run may begin to measure


def test_a_logger_that_is_not_installed_is_refused_with_its_extra(tmp_path, values, monkeypatch):
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    path = write(tmp_path, values)
    check_recipe(load_recipe(path, ["log_to=[tensorboard]"]).recipe, STEPS)  # is always there
    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(RecipeError, match=r"log_to: wandb is not installed: pip install 'vlsi\[wandb\]'"):
        check_recipe(load_recipe(path, ["log_to=[wandb]"]).recipe, ("interact",))
    check_recipe(load_recipe(path, ["log_to=[wandb]"]).recipe, ("cache",))  # shows nothing there
    check_recipe(load_recipe(path, ["log_to=[]"]).recipe, STEPS)
    with pytest.raises(RecipeError, match=r"log_to.*'tensorboard', 'wandb' or 'trackio'"):
        load_recipe(path, ["log_to=[mlflow]"])


@pytest.fixture
def another(tmp_path, values) -> dict:
    """The values of a recipe that takes the cache of another run, which has a recipe of its own."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "recipe.yaml").write_text(load_recipe(write(tmp_path, values | {"run": str(base)})).to_yaml())
    return values | {"run": str(tmp_path / "own"), "cache_from": str(base)}


def test_a_cache_of_another_run_must_be_that_run_s_own_and_of_the_same_teacher(tmp_path, another):
    base = another["cache_from"]
    recipe = load_recipe(write(tmp_path, another), ["student.layers=[1,2]"]).recipe
    refuse_another_teacher(recipe)
    assert recipe.left_to_another_run() == {"cache": ("cache_from", Path(base))}
    assert (recipe.teacher_stage_1, recipe.student_stage_1) == (Path(base), tmp_path / "own")
    paper = load_recipe(write(tmp_path, another), ["verbalizer.form=paper"]).recipe
    with pytest.raises(
        RecipeError, match="another teacher:\n  verbalizer.form: .*base has residual, this recipe paper"
    ):
        refuse_another_teacher(paper)
    third = tmp_path / "third"
    third.mkdir()
    (third / "recipe.yaml").write_text(load_recipe(write(tmp_path, another | {"run": str(third)})).to_yaml())
    borrowed = load_recipe(write(tmp_path, another), [f"cache_from={third}"]).recipe
    with pytest.raises(
        RecipeError, match=f"third has no cache of its own, but uses that of {base}. Set cache_from: {base}"
    ):
        refuse_another_teacher(borrowed)
    # Stage 2 once more, on that run's verbalizers: they were trained beside the same cache.
    again = [f"stage_1={third}"]
    refuse_another_student(load_recipe(write(tmp_path, another), again).recipe)
    alone = load_recipe(write(tmp_path, {**another, "cache_from": None}), again).recipe
    with pytest.raises(RecipeError, match=r"cache_from: .*third has .*base, this recipe None"):
        refuse_another_student(alone)


def test_a_run_with_another_s_cache_has_no_cache_job(tmp_path, another):
    recipe = load_recipe(write(tmp_path, another)).recipe
    check_recipe(recipe, ("verbalize", "cache"))
    with pytest.raises(
        RecipeError, match=r"cache_from: .*base has this run's cache, .* cache job of .*base/recipe.yaml"
    ):
        check_recipe(recipe, ("cache",))


def test_what_trains_is_one_field_and_contradicts_no_adapter(tmp_path, values):
    path = write(tmp_path, values)
    with pytest.raises(RecipeError, match="unknown key 'train_vision'; did you mean 'train'"):
        load_recipe(path, ["train_vision=true"])
    with pytest.raises(RecipeError, match="train: "):
        load_recipe(path, ["train=[]"])
    recipe = load_recipe(path, ["interact.lora_rank=4", "train=[projector]"]).recipe
    with pytest.raises(RecipeError, match=r"leaves out the decoder, but interact.lora_rank puts adapters on it"):
        check_recipe(recipe, ("interact", "reinforce"))
    idle = load_recipe(path, ["reinforce.lora_dropout=0.1", "export.adapter=true"]).recipe
    with pytest.raises(RecipeError) as raised:
        check_recipe(idle, ("interact", "reinforce"))
    said = str(raised.value)
    assert "reinforce.lora_dropout is set, but reinforce.lora_rank is 0" in said
    assert "export.adapter: no step has adapters" in said
    both = load_recipe(path, ["interact.lora_rank=4", "export.adapter=true", "interact.lora_targets=[q_proj]"]).recipe
    check_recipe(both, ("interact", "reinforce"))
    assert not both.trains(both.interact, "head") and both.trains(both.reinforce, "head")
