"""What a recipe's values must not contradict, before anything is loaded."""

from __future__ import annotations

import json
from importlib import metadata
from importlib.metadata import PackageNotFoundError

import pytest
from recipe_file import STEPS, write

from pipeline.errors import RecipeError
from pipeline.recipe import checks
from pipeline.recipe.checks import check_recipe, target_layers
from pipeline.recipe.resolve import leaves, load_recipe, refuse_changes
from pipeline.recipe.schema import Model


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
    values["verbalize"]["train"] = str(tmp_path / "others")
    with pytest.raises(RecipeError) as error:
        check_recipe(load_recipe(write(tmp_path, values)).recipe, STEPS)
    message = str(error.value)
    assert message.startswith("5 problem(s)")
    assert "interact.temperature: 0.1 is that of the draw of matching: adaptive; last_only has none" in message
    assert "interact: nothing to train: matching is last_only, and last_weight" in message
    assert "verbalize.train: no" in message and "data_prep shard" in message
    assert "reinforce.train: no" in message and "python -m pipeline answer" in message
    assert "expected one of label_smoothing and loss_power, found both" in message


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


@pytest.mark.parametrize(("stage", "device", "refused"), [(2, "cpu", True), (3, "cpu", False), (2, "none", False)])
def test_an_offloaded_optimizer_belongs_to_stage_3(tmp_path, values, stage, device, refused):
    config = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": device}}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    recipe = load_recipe(write(tmp_path, values)).recipe
    if not refused:
        return check_recipe(recipe, STEPS)
    with pytest.raises(RecipeError, match=r"offload_optimizer under ZeRO stage 2.*zero3_offload_optimizer.json"):
        check_recipe(recipe, STEPS)
    return None


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
    with pytest.raises(RecipeError, match=r"interact.evaluate_every: 5 needs data.held_out: a shard folder"):
        check_recipe(load_recipe(path, ["interact.evaluate_every=5"]).recipe, STEPS)
    check_recipe(load_recipe(path, ["reinforce.evaluate_every=5"]).recipe, ("interact",))
    there = ["reinforce.evaluate_every=5", f"data.held_out={tmp_path / 'data'}"]
    check_recipe(load_recipe(path, there).recipe, STEPS)
    first = load_recipe(path)
    first.recipe.run.mkdir()
    (first.recipe.run / "recipe.yaml").write_text(first.to_yaml())
    refuse_changes(load_recipe(path, ["reinforce.evaluate_every=5"]), STEPS)  # a run may begin to measure


def test_held_out_data_that_is_not_there_is_missed_before_all_is_trained(tmp_path, values):
    path = write(tmp_path, values)
    recipe = load_recipe(path, [f"data.held_out={tmp_path / 'none'}"]).recipe
    with pytest.raises(RecipeError, match=r"data.held_out: no .*none/manifest.json; .*or leave the field out"):
        check_recipe(recipe, ("verbalize",))
    check_recipe(recipe, ("cache",))  # a cache job has no need of it


def test_lora_without_peft_is_refused_before_stage_1(tmp_path, values, monkeypatch):
    path = write(tmp_path, values)
    asked = ["interact.lora_rank=4", "reinforce.lora_rank=4", "reinforce.steps=0"]
    recipe = load_recipe(path, asked).recipe
    monkeypatch.setattr(checks, "_is_installed", lambda package: package != "peft")
    with pytest.raises(RecipeError, match=r"^1 problem.*\n  interact.lora_rank: 4 needs the package peft: pip install"):
        check_recipe(recipe, STEPS)
    check_recipe(recipe, ("verbalize", "cache"))
    check_recipe(load_recipe(path).recipe, STEPS)


def test_a_logger_that_is_not_installed_is_refused_with_its_extra(tmp_path, values, monkeypatch):
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    path = write(tmp_path, values)
    check_recipe(load_recipe(path, ["log_to=[tensorboard]"]).recipe, STEPS)  # is always there
    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(RecipeError, match=r"log_to: wandb is not installed: pip install -e '.\[wandb\]'"):
        check_recipe(load_recipe(path, ["log_to=[wandb]"]).recipe, ("interact",))
    check_recipe(load_recipe(path, ["log_to=[wandb]"]).recipe, ("cache",))  # shows nothing there
    check_recipe(load_recipe(path, ["log_to=[]"]).recipe, STEPS)
    with pytest.raises(RecipeError, match=r"log_to.*'tensorboard', 'wandb' or 'trackio'"):
        load_recipe(path, ["log_to=[mlflow]"])


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
