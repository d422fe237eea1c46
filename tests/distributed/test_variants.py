"""What real models and recipes bring along: bfloat16, tied heads, padded vocabularies, recomputation, empty steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from running import cache_folder, deepspeed, tiny_recipe
from safetensors.torch import load_file, save_file

from pipeline.cache.hashes import file_sha256
from pipeline.vlm.backbone import load_vlm

KIND = "qwen2_vl"
SHORT = {"steps": 2, "batch_size": 8, "micro_batch_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "train", 16, shards=2)


@pytest.fixture(scope="module")
def tied_models(tmp_path_factory) -> dict:
    """Like Qwen2-VL's small and large: the small one's head is its embedding, the large one's has more padding rows."""
    root = tmp_path_factory.mktemp("tied")
    return {
        (KIND, "teacher"): tiny.write_vlm(root / "teacher", KIND, 6, 32, seed=6, rows=320),
        (KIND, "student"): tiny.write_vlm(root / "student", KIND, 3, 32, seed=3, tie=True, rows=280),
    }


def lines(run: Path, step: str) -> list[dict]:
    return [x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if x["step"] == step]


def test_bfloat16_with_a_tied_student_and_unequal_vocabularies(tied_models, data, tmp_path):
    recipe = tiny_recipe(
        tmp_path, tied_models, KIND, data, precision="bf16", verbalize=SHORT, interact=SHORT, reinforce=SHORT
    )
    deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    run = tmp_path / "run"
    assert json.loads((cache_folder(run) / "manifest.json").read_text())["vocab"] == 280
    ours, original = load_file(run / "student" / "model.safetensors"), tied_models[KIND, "student"]
    assert set(ours) == set(load_file(original / "model.safetensors")) and "lm_head.weight" not in ours
    assert {w.dtype for w in ours.values()} == {torch.bfloat16}
    student = load_vlm(run / "student", torch.float32)
    assert student.lm_head.weight is student.model.language_model.embed_tokens.weight
    assert lines(run, "interact")[-1]["last"] < lines(run, "interact")[0]["last"]


def test_verbalizers_may_learn_from_other_samples_than_the_cache_is_of(tiny_models, data, tmp_path):
    other = tiny.write_data(tmp_path / "other", 12, seed=1)
    mixed = tiny_recipe(tmp_path / "mixed", tiny_models, KIND, data, verbalize={**SHORT, "train": str(other)})
    alike = tiny_recipe(tmp_path / "alike", tiny_models, KIND, other, verbalize=SHORT)
    for recipe in (mixed, alike):
        deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    ours, theirs = (tmp_path / name / "run" for name in ("mixed", "alike"))
    for role in ("teacher", "student"):
        trained, same = (load_file(run / "verbalize" / f"{role}.safetensors") for run in (ours, theirs))
        assert all(torch.equal(trained[name], same[name]) for name in trained)
    samples = [json.loads((cache_folder(run) / "manifest.json").read_text())["samples"] for run in (ours, theirs)]
    assert samples == [16, 12]
    deepspeed(2, "train.py", "--stage", 2, "--recipe", mixed)
    assert (ours / "student" / "model.safetensors").is_file()


def test_recomputed_layers_and_a_trained_tower_change_no_loss_of_the_first_update(tiny_models, data, tmp_path):
    plain = {"interact": {"steps": 0}, "reinforce": SHORT}
    found = []
    more = "gradient_checkpointing: true\ntrain: [decoder, projector, vision, head]\n"
    for name, options in (("a", ""), ("b", more)):
        recipe = tiny_recipe(tmp_path / name, tiny_models, KIND, data, **plain)
        recipe.write_text(recipe.read_text() + options)
        deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
        found.append(lines(tmp_path / name / "run", "reinforce"))
    assert found[0][0]["cross_entropy"] == pytest.approx(found[1][0]["cross_entropy"], rel=1e-6)
    start = load_file(tiny_models[KIND, "student"] / "model.safetensors")
    towers = [load_file(tmp_path / n / "run" / "student" / "model.safetensors") for n in ("a", "b")]
    frozen = [name for name in start if name.startswith("visual.") and "merger" not in name]
    assert frozen and all(torch.equal(towers[0][name], start[name]) for name in frozen)
    assert any(not torch.equal(towers[1][name], start[name]) for name in frozen)


def test_lora_trains_adapters_alone_and_exports_merged_weights(tiny_models, data, tmp_path):
    """And keeps the adapters where it is asked to: of each step, on the model that the step began with."""
    lora = {**SHORT, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1}
    recipe = tiny_recipe(tmp_path, tiny_models, KIND, data, verbalize=SHORT, interact=lora, reinforce=lora)
    recipe.write_text(recipe.read_text() + "export: {adapter: true}\n")
    deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    start = load_file(tiny_models[KIND, "student"] / "model.safetensors")
    half = load_file(tmp_path / "run" / "interact" / "student" / "model.safetensors")
    ours = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert set(ours) == set(start)
    for before, after in ((start, half), (half, ours)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {n for n in before if ".layers." in n and n.endswith("_proj.weight")}
        for name in moved:
            change = torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4)
            assert change <= 4, f"{name} changed by more than a rank of lora_rank"
    for folder, before, after in (("interact", start, half), (".", half, ours)):
        kept = load_file(tmp_path / "run" / folder / "adapter" / "adapter_model.safetensors")
        stem = "model.language_model.layers.0.self_attn.q_proj"
        up, down = (kept[f"base_model.model.{stem}.lora_{side}.weight"] for side in "BA")
        (name,) = (name for name in before if name.endswith("layers.0.self_attn.q_proj.weight"))
        torch.testing.assert_close(before[name] + up @ down * 2, after[name])


def test_too_many_bad_samples_stop_the_run_with_one_error(tiny_models, data, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_models, KIND, data, interact={"steps": 0}, reinforce=SHORT)
    said = deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe, "--set", "data.max_length=8", check=1)
    assert said.count("samples could not be used, more than data.max_bad_share=0.01") == 1
    assert "no response token within max_length=8" in said and "Traceback" not in said
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 8 and {"key", "shard", "reason"} == set(rejects[0])


def test_steps_of_zero_updates(tiny_models, data, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_models, KIND, data, interact={"steps": 0}, reinforce={"steps": 0})
    deepspeed(1, "train.py", "--stage", 2, "--recipe", recipe)
    weights = (tmp_path / "run" / "student" / "model.safetensors").read_bytes()
    assert weights == (tiny_models[KIND, "student"] / "model.safetensors").read_bytes()


def test_interaction_and_verbalization_do_not_depend_on_ranks(tiny_models, data, tmp_path):
    """One rank with micro-batches of 8 and two with 4 form the same global micro-batches and draw the same matches."""
    found = []
    for ranks, micro, zero in ((1, 8, "zero0"), (2, 4, "zero3_cpu")):
        folder = tmp_path / zero
        short = {"steps": 3, "batch_size": 16, "micro_batch_size": micro}
        recipe = tiny_recipe(
            folder, tiny_models, KIND, data, zero, verbalize=short, interact=short, reinforce={"steps": 0}
        )
        deepspeed(ranks, "train.py", "--stage", 1, "--recipe", recipe)
        deepspeed(ranks, "train.py", "--stage", 2, "--recipe", recipe)
        found.append(folder / "run")
    for step in ("verbalize", "interact"):
        for one, two in zip(lines(found[0], step), lines(found[1], step), strict=True):
            assert one.get("match") == two.get("match") and one["tokens"] == two["tokens"]
            losses = [k for k in one if "/" in k or k == "last"]
            assert losses
            for name in losses:
                assert two[name] == pytest.approx(one[name], rel=2e-4), name


@pytest.fixture(scope="module")
def stage_1(tiny_models, data, tmp_path_factory) -> Path:
    """A recipe whose stage 1 is done."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("base"), tiny_models, KIND, data, verbalize=SHORT)
    deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    return recipe


def second_run(recipe: Path, folder: Path, **changed) -> Path:
    """Another run on the same stage 1. None removes a section."""
    values = yaml.safe_load(recipe.read_text())
    values |= {"run": str(folder / "run"), "stage_1": values["run"]} | changed
    folder.mkdir(exist_ok=True)
    path = folder / "second.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def followed(stage_1, tmp_path_factory) -> Path:
    """A second run on that stage 1, after its interaction, with which it ends."""
    folder = tmp_path_factory.mktemp("followed")
    recipe = second_run(stage_1, folder, preset="wrong_answers", reinforce=None)
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    return folder / "run"


def test_a_second_run_uses_the_first_one_s_stage_1_and_a_preset_ends_it_with_interaction(followed):
    run = followed
    said = deepspeed(2, "train.py", "--stage", 1, "--recipe", run / "recipe.yaml", check=2)
    assert "has this run's verbalizers and cache, so cache and verbalize cannot run here" in said
    assert not (run / "verbalize").exists() and not (run / "cache").exists()
    ours = load_file(run / "student" / "model.safetensors")
    left = load_file(run / "interact" / "student" / "model.safetensors")
    assert all(torch.equal(ours[name], left[name]) for name in left)
    followed = lines(run, "interact")
    assert not lines(run, "reinforce") and all(len(line["draw_entropy"]) == 2 for line in followed)
    assert ["kl" in line for line in followed] == [True, *[False] * (len(followed) - 1)]
    pairs = {(student, teacher): value for student, teacher, value in followed[0]["kl"]}
    assert set(pairs) == {(1, teacher) for teacher in (1, 2, 3)} | {(2, teacher) for teacher in (2, 3, 4)}
    one_micro_step = followed[0]["micro_steps"] == 1
    for place, student in enumerate((1, 2)):
        matched = pairs[student, followed[0]["match"][place]]
        assert not one_micro_step or matched == pytest.approx(followed[0][f"layer/{student}"], abs=1e-4)


def test_an_interaction_goes_on_with_the_verbalizers_that_it_began_with_or_says_why_not(stage_1, tmp_path):
    run = Path(yaml.safe_load(stage_1.read_text())["run"])
    other = shutil.copytree(run, tmp_path / "other")
    weights, summary = other / "verbalize" / "student.safetensors", other / "verbalize" / "done.json"
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights)
    found = {"old": json.loads(summary.read_text())["sha256"]["student"], "new": file_sha256(weights)}
    summary.write_text(summary.read_text().replace(found["old"], found["new"]))
    recipe = second_run(stage_1, tmp_path, preset="wrong_answers", reinforce=None)
    program = ["train.py", "--stage", 2, "--recipe", recipe]
    deepspeed(1, *program, "--stop-after", 1)
    said = " ".join(deepspeed(1, *program, "--set", f"stage_1={other}", check=2).split())
    expected = f"made with another student's verbalizers: expected SHA-256 {found['old']}, found {found['new']}."
    assert f"interact: the step's checkpoint was {expected}" in said
    deepspeed(1, *program, "--stop-after", 1)


def test_a_cache_made_with_another_student_trains_this_one_as_its_own_would(stage_1, followed, tiny_models, tmp_path):
    """Stage 1 with a wider student, then this student on that run's cache: bitwise the run that makes its own.

    It needs no weights of the teacher.
    """
    own, values = stage_1.parent / "run", yaml.safe_load(stage_1.read_text())
    wide = tiny.write_vlm(tmp_path / "wide", KIND, 3, 64, seed=9)
    first = second_run(stage_1, tmp_path / "first", stage_1=None, student={"path": str(wide), "layers": [1, 2]})
    deepspeed(2, "train.py", "--stage", 1, "--recipe", first)
    folders = {"first": tmp_path / "first" / "run", "second": tmp_path / "second" / "run"}
    caches = [cache_folder(run) for run in (folders["first"], own)]
    for name in ("000000.tar", "000001.tar"):
        assert (caches[0] / name).read_bytes() == (caches[1] / name).read_bytes(), "whoever the student was"
    weightless = tmp_path / "teacher"
    shutil.copytree(tiny_models[KIND, "teacher"], weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    recipe = second_run(
        stage_1, tmp_path / "second", stage_1=None, cache_from=str(folders["first"]), preset="wrong_answers",
        teacher=values["teacher"] | {"path": str(weightless)}, reinforce=None,
    )  # fmt: skip
    said = deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    run = folders["second"]
    assert f"cache: that of {folders['first']}" in said and not (run / "cache").exists()
    assert {path.name for path in (run / "verbalize").glob("*.safetensors")} == {"student.safetensors"}
    assert not any(name.startswith("teacher/") for line in lines(run, "verbalize") for name in line)
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    for name, maker in (("verbalize/student.safetensors", own), ("student/model.safetensors", followed)):
        assert (run / name).read_bytes() == (maker / name).read_bytes(), name


def test_deep_supervision_without_the_teacher_trains_up_to_the_last_target_layer_alone(stage_1, tiny_models, tmp_path):
    """The layers above it get no gradient, on any rank, and that is no error: nothing of the loss depends on them."""
    options = {"matching": "last_only", "last_weight": 0, "deep_supervision_weight": 1}
    values = yaml.safe_load(stage_1.read_text())
    recipe = second_run(
        stage_1, tmp_path, interact=values["interact"] | options, preset="wrong_answers", reinforce=None
    )
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    found = lines(tmp_path / "run", "interact")
    assert found[-1]["supervised/2"] < found[0]["supervised/2"] and found[0]["layer/1"] == found[0]["layer/2"] == 0
    assert "draw_entropy" not in found[0]
    start = load_file(tiny_models[KIND, "student"] / "model.safetensors")
    ours = load_file(tmp_path / "run" / "student" / "model.safetensors")
    moved = {name for name in start if not torch.equal(start[name], ours[name])}
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in moved if "layers." in name}
    assert layers == {0, 1}, "of three layers; targets are 1 and 2"
    assert "lm_head.weight" not in moved


def test_finetuning_on_other_shards_with_a_robust_loss(tiny_models, data, tmp_path):
    other = tiny.write_data(tmp_path / "answers", 8)
    robust = {**SHORT, "train": str(other), "loss_power": 0.7}
    recipe = tiny_recipe(tmp_path, tiny_models, KIND, data, interact={"steps": 0}, reinforce=robust)
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    run = tmp_path / "run"
    found = lines(run, "reinforce")
    assert all(0 < line["generalised_cross_entropy"] < 1 / 0.7 for line in found)
    plain = tiny_recipe(tmp_path / "plain", tiny_models, KIND, other, interact={"steps": 0}, reinforce=SHORT)
    deepspeed(2, "train.py", "--stage", 2, "--recipe", plain)
    theirs = lines(tmp_path / "plain" / "run", "reinforce")
    assert [line["tokens"] for line in found] == [line["tokens"] for line in theirs], "the same samples in each update"
