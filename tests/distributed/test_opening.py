"""Stage 2 opens the cache that fits and refuses all others: each thing that made it, changed alone, is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from running import deepspeed, tiny_recipe
from safetensors.torch import load_file, save_file

from data_prep.shards import ShardFolder
from pipeline.cache import fingerprint
from pipeline.errors import CacheError
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime.loop import Job
from pipeline.runtime.ranks import Ranks
from pipeline.steps.interact import open_cache_view
from pipeline.steps.teacher_cache import check_for_another_student

KIND = "qwen2_vl"


@pytest.fixture(scope="module")
def made(tiny_models, tmp_path_factory) -> Path:
    """A folder with models, data, and a run that stage 1 has been through."""
    root = tmp_path_factory.mktemp("opening")
    models = {(KIND, role): root / role for role in ("teacher", "student")}
    for key, folder in models.items():
        shutil.copytree(tiny_models[key], folder)
    data = tiny.write_data(root / "data", 8, shards=2)
    recipe = tiny_recipe(root, models, KIND, data, verbalize={"steps": 2, "batch_size": 4})
    deepspeed(1, "train.py", "--stage", 1, "--recipe", recipe)
    return root


@pytest.fixture
def root(made, tmp_path) -> Path:
    """A copy of it; the recipe names the copy."""
    root = tmp_path / "root"
    shutil.copytree(made, root)
    recipe = root / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(made), str(root)))
    return root


def opened(root: Path, *settings: str):
    recipe = load_recipe(root / "recipe.yaml", list(settings)).recipe
    return open_cache_view(Job(recipe, Ranks()), ShardFolder(recipe.data.train))


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path: Path) -> None:
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1
    save_file(weights, path, metadata={"format": "pt"})


CHANGES = {
    "weights": lambda root: change_weights(root / "teacher" / "model.safetensors"),
    "config": lambda root: edit_json(root / "teacher" / "config.json", added=1),
    "tokenizer": lambda root: edit_json(root / "teacher" / "tokenizer.json", padding=None),
    "processor": lambda root: edit_json(root / "teacher" / "processor_config.json", added=1),
    "chat_template": lambda root: (root / "teacher" / "chat_template.jinja").write_text(
        (root / "teacher" / "chat_template.jinja").read_text() + "{# changed #}"
    ),
    "verbalizers": lambda root: change_weights(root / "run" / "verbalize" / "teacher.safetensors"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_made_the_cache_is_named_when_it_has_changed(root, name):
    assert len(opened(root).cache) == 8
    CHANGES[name](root)
    with pytest.raises(CacheError) as raised:
        opened(root)
    said = str(raised.value)
    assert f"{name}: expected " in said and ", found " in said and "launch/cache.py --recipe" in said
    assert said.count("expected ") == 1


def test_the_length_that_the_data_was_cut_to_is_named(root):
    with pytest.raises(CacheError, match=r"max_length: expected 100, found 4096"):
        opened(root, "data.max_length=100")


def test_the_limits_on_images_are_named(root):
    with pytest.raises(CacheError, match=r"pixels: expected any to 3136, found any to any"):
        opened(root, "data.max_pixels=3136")


def test_a_cache_of_images_decoded_otherwise_is_refused(root, monkeypatch):
    monkeypatch.setattr(fingerprint, "DECODING", "upright RGB, in linear light")
    with pytest.raises(CacheError, match=r"decoding: expected upright RGB, in linear light, found upright RGB"):
        opened(root)


def test_a_teacher_without_weights_is_not_asked(root):
    change_weights(root / "teacher" / "model.safetensors")
    (root / "teacher" / "model.safetensors").unlink()
    assert len(opened(root).cache) == 8
    shutil.rmtree(root / "teacher")
    assert len(opened(root).cache) == 8


def test_layers_that_are_not_cached_are_named(root):
    with pytest.raises(
        CacheError, match=r"asked for teacher layers \[5, 6\], cached are \[1, 2, 3, 4, 6\]: \[5\] missing"
    ):
        opened(root, "interact.teacher_layers=[5]")


def checked(root: Path, *settings: str, common: int = 300) -> int:
    """What stage 1 of another student asks of this run's cache."""
    ours = [f"run={root / 'another'}", f"cache_from={root / 'run'}", *settings]
    recipe = load_recipe(root / "recipe.yaml", ours).recipe
    return check_for_another_student(Job(recipe, Ranks()), "verbalize", ShardFolder(recipe.data.train), common)


def test_another_student_may_use_the_cache_and_the_teacher_s_weights_may_be_gone(root):
    vocab = checked(root)
    assert vocab == opened(root).cache.identity.vocab
    (root / "teacher" / "model.safetensors").unlink()
    assert checked(root) == vocab == checked(root, common=vocab)


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "weights"])
def test_another_teacher_is_refused_to_another_student_also_without_its_weights(root, name):
    (root / "teacher" / "model.safetensors").unlink()
    CHANGES[name](root)
    with pytest.raises(CacheError, match=f"{name}: expected "):
        checked(root)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.max_length=100"], r"max_length: expected 100, found 4096"),
        (["seed=9"], r'codec: expected .*"seed": 9}, found .*"seed": 0}'),
        (
            ["teacher.layers=[1,2,3]"],
            r"has the teacher layers \[1, 2, 3, 4\], this recipe \[1, 2, 3\]. Set teacher.layers",
        ),
    ],
)
def test_a_recipe_that_the_cache_was_not_made_for_is_refused_to_another_student(root, settings, said):
    with pytest.raises(CacheError, match=said):
        checked(root, *settings)


def test_ids_of_the_cache_that_a_student_lacks_are_named_once_and_cut_off(root, capsys):
    """What stage 1 says, and over which ids stage 2 then compares, by what stage 1 has left of it."""
    vocab = opened(root).cache.identity.vocab
    assert opened(root).ids is None and checked(root, common=vocab - 1) == vocab - 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"is over {vocab} ids, of which this student has the first {vocab - 1}: the other 1 get no" in said
    edit_json(root / "run" / "verbalize" / "done.json", vocab=vocab - 1)
    assert opened(root).ids == vocab - 1


def test_another_student_s_data_must_be_the_cache_s(root):
    other = tiny.write_data(root / "other", 8, shards=2, seed=1)
    with pytest.raises(CacheError, match="made from other data"):
        checked(root, f"data.train={other}")
