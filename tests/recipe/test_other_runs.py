"""Recipes that take stage 1 or the cache from another run."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_file import write

from pipeline.errors import RecipeError
from pipeline.recipe.checks import check_recipe
from pipeline.recipe.resolve import caches_of, load_recipe, own_caches, refuse_another_student, refuse_another_teacher


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


def test_a_run_with_another_s_cache_names_no_folder_for_its_own(tmp_path, another):
    recipe = load_recipe(write(tmp_path, another), ["cache.folder=s3://bucket/caches"]).recipe
    with pytest.raises(RecipeError, match=r"cache.folder: s3://bucket/caches would never be used: .* of cache_from, "):
        check_recipe(recipe, ("verbalize", "cache"))
    left_out = load_recipe(write(tmp_path, {**another, "cache_from": None}), ["cache.folder=s3://bucket/caches"]).recipe
    assert str(own_caches(left_out)) == "s3://bucket/caches"
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "recipe.yaml").write_text(write(tmp_path, {**another, "cache_from": None}).read_text())
    assert caches_of(tmp_path / "moved") == tmp_path / "moved" / "cache"
