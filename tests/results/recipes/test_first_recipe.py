"""A first recipe from two folders: what it chooses, that it passes a run's checks, and goes through plan."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import yaml
from tiny_families import write_family

from data_prep.shards import write_manifest
from pipeline.__main__ import main
from pipeline.errors import RecipeError
from pipeline.recipe.checks import check_recipe, target_layers
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import STEPS
from pipeline.recipe.shipped import CONFIGS
from pipeline.results.plan.machine import Machine
from pipeline.results.recipes import first
from pipeline.results.recipes.first import first_recipe
from pipeline.results.recipes.target_layers import choose_targets


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "train", 16, shards=2)


def models_of(kind: str, folder: Path) -> tuple[Path, Path]:
    write = tiny.write_vlm if kind in (*tiny.KINDS, *tiny.MORE_KINDS) else write_family
    teacher, student = (write(folder / role, kind, depth, 32) for role, depth in (("teacher", 6), ("student", 3)))
    return teacher, student


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava_onevision", "internvl"])
def test_a_tiny_pair_gets_a_recipe_that_a_run_and_plan_take(kind, data, tmp_path, capsys):
    teacher, student = models_of(kind, tmp_path)
    out = tmp_path / "recipe.yaml"
    asked = ["--data", str(data), "--gpus", "4", "--gpu-memory", "8", "--out", str(out)]
    assert main(["recipes", "--for", str(teacher), str(student), *asked]) == 0
    recipe = load_recipe(out, [f"run={tmp_path / 'run'}"]).recipe
    check_recipe(recipe, STEPS, world=4)
    assert yaml.safe_load(out.read_text())["run"] == "runs/recipe" and recipe.data.held_out is None
    assert target_layers(recipe.student) == (2,) and target_layers(recipe.teacher) == (1, 4)
    assert recipe.precision == "fp32" and recipe.interact.lora_rank == 64
    assert recipe.interact.batch_size == 4, "16 samples, at least 50 updates, 4 GPUs"
    assert main(["plan", "--recipe", str(out), "--gpus", "4", "--gpu-memory", "8"]) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_every_choice_has_its_reason_and_the_paper_s_pair_gets_the_paper_s_values():
    text = first_recipe(CONFIGS / "qwen2_vl_72b", CONFIGS / "qwen2_vl_7b")
    values = yaml.safe_load(text)
    assert values["student"]["layers"] == list(range(2, 28, 4)) and values["teacher"]["layers"] == list(range(2, 80, 4))
    assert values["verbalize"]["batch_size"] == 256 and values["interact"]["batch_size"] == 512
    assert values["precision"] == "bf16" and values["gradient_checkpointing"]
    above = ""
    for line in text.splitlines():
        if re.match(r"\s*\w+: \S", line):
            assert " # " in line or above.strip().startswith("# "), line
        above = line


def test_micro_batches_are_budgets_of_tokens_that_fit_and_leave_little_padding():
    pair = CONFIGS / "qwen2_vl_72b", CONFIGS / "qwen2_vl_7b"
    alone = yaml.safe_load(first_recipe(*pair))
    assert alone["interact"]["micro_batch_tokens"] == alone["data"]["max_length"]
    text = first_recipe(*pair, machine=Machine(64, 80))
    found = {
        step: section["micro_batch_tokens"]
        for step, section in yaml.safe_load(text).items()
        if step in first.PAPER_BATCH
    }
    assert found == {"verbalize": 8192, "interact": 16384, "reinforce": 16384}
    assert "10 of 74 GiB, 1 micro-steps an update, 88% real tokens, by plan" in text


def test_of_data_without_sizes_micro_batches_have_a_number_of_samples(tmp_path):
    data = tiny.write_data(tmp_path / "train", 16)
    manifest = json.loads((data / "manifest.json").read_text())
    for shard in manifest["shards"]:
        del shard["sizes"]
    write_manifest(data, manifest["shards"], format=manifest["format"], version=1, split="train")
    text = first_recipe(CONFIGS / "smolvlm_500m", CONFIGS / "smolvlm_256m", data, Machine(1, 80))
    assert "micro_batch_tokens" not in yaml.safe_load(text)["interact"] and "micro_batch_size" in text


def test_what_data_prep_held_out_is_found_beside_the_data(tmp_path):
    data = tiny.write_data(tmp_path / "train", 16)
    held_out = tiny.write_data(tmp_path / "held_out", 4)
    text = first_recipe(CONFIGS / "smolvlm_500m", CONFIGS / "smolvlm_256m", data)
    assert yaml.safe_load(text)["data"]["held_out"] == str(held_out)


def test_on_a_small_gpu_it_says_what_made_a_step_fit_or_that_nothing_does(tmp_path):
    text = first_recipe(CONFIGS / "smolvlm_500m", CONFIGS / "smolvlm_256m", machine=Machine(1, 3))
    assert re.search(r"without it (verbalize|interact|reinforce) does not fit \(plan\)", text), text
    with pytest.raises(RecipeError, match="does not fit 1 GPUs of 0.0001 GiB, whatever is changed; give more --gpus"):
        first_recipe(*models_of("qwen2_vl", tmp_path), machine=Machine(1, 0.0001))


@pytest.mark.parametrize(
    ("depths", "sparse", "teacher", "student"),
    [
        ((80, 28), False, range(2, 80, 4), range(2, 28, 4)),
        ((28, 28), False, range(1, 28, 3), range(2, 28, 4)),
        ((80, 28), True, (10, 30, 50, 70), (4, 12, 20)),
        ((80, 24), True, (10, 30, 50, 70), (4, 12, 20)),
        ((24, 32), False, range(1, 24, 2), range(2, 32, 4)),
        ((3, 2), False, (1, 2), (1,)),
        ((4, 30), False, (1, 2, 3), (6, 18)),
    ],
)
def test_target_layers_are_the_paper_s_where_its_spacing_serves(depths, sparse, teacher, student):
    found = choose_targets(*depths, sparse)
    assert (found.teacher, found.student) == (tuple(teacher), tuple(student))
    assert len(found.teacher) > len(found.student)


def test_a_teacher_too_shallow_for_any_targets_is_refused():
    with pytest.raises(RecipeError, match="a teacher of 2 layers and a student of 2: expected at least 3 and 2"):
        choose_targets(2, 2, sparse=False)


def test_data_counts_also_where_its_lengths_cannot_be_measured(data):
    """A student's config.json alone: the number of samples is data.train's, the lengths are assumed, and said to be."""
    text = first_recipe(CONFIGS / "smolvlm_500m", CONFIGS / "smolvlm_256m", data)
    assert yaml.safe_load(text)["interact"]["batch_size"] == 1 and "16 samples in at least 50 updates" in text
    assert "900 tokens a sample" in text and "(assumed: no --data, or no tokenizer of the student)" in text


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava_onevision"])
def test_samples_of_mostly_image_tokens_get_sparse_targets(kind, data, tmp_path, monkeypatch):
    """Whether the processor tells the kinds of tokens (Qwen2-VL's) or not."""
    teacher, student = (tiny.write_vlm(tmp_path / r, kind, d, 32) for r, d in (("teacher", 24), ("student", 10)))
    assert yaml.safe_load(first_recipe(teacher, student, data))["student"]["layers"] == [2, 6]
    monkeypatch.setattr(first, "MANY_IMAGE_TOKENS", 2)  # of a tiny picture there are few
    text = first_recipe(teacher, student, data)
    found = yaml.safe_load(text)
    assert found["student"]["layers"] == [4] and found["teacher"]["layers"] == [7, 22]
    assert "image tokens a sample (paper, appendix D, has sparse targets then)" in text


def test_other_tokenizers_are_refused_before_anything_is_written(tmp_path, data, capsys):
    teacher, student = models_of("qwen2_vl", tmp_path)
    path = student / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"\\u4e00":', 1))
    out = tmp_path / "recipe.yaml"
    assert main(["recipes", "--for", str(teacher), str(student), "--data", str(data), "--out", str(out)]) == 2
    assert "do not share a tokenizer" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "2", "--gpu-memory", "8"], "are for a new recipe; add --for TEACHER STUDENT"),
        (["--for", "a", "b", "--gpus", "2"], "expected --gpus N and --gpu-memory GIB together"),
        (["demo", "--for", "a", "b"], "expected one of NAME and --for"),
        (["--out", "x.yaml"], "name the recipe to write"),
        (["--for", "a", "b"], "expected a Hugging Face config"),
    ],
)
def test_options_that_contradict(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", *arguments]) == 2
    assert said in capsys.readouterr().err
