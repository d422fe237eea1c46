"""The longest sample of the data: also where it is none of those that are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from running import tiny_recipe

from data_prep.shards import FORMAT, ShardFolder, shard_name, write_manifest, write_shard
from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.memory import Workload
from pipeline.results.plan.run import Planned
from pipeline.results.plan.samples import Given, Samples, describe_samples, own_samples
from pipeline.results.plan.show import show
from pipeline.vlm.assemble import chat_encoder

COUNT, MEASURED, LONG = 24, 12, 5
"""Every second sample is measured, and number 5 is the long one."""


def write_data(folder: Path, sizes: bool = True) -> Path:
    """Short chats with pictures, and one of them long."""
    samples = []
    for index, (key, record, images) in enumerate(tiny.chats(COUNT)):
        if index == LONG:
            record["messages"] = [tiny.turn("user", "<image>", "q" * 200), tiny.turn("assistant", "ab" * 150)]
        members = {"json": json.dumps(record).encode(), **{f"{i}.png": data for i, data in enumerate(images)}}
        samples.append((key, members))
    folder.mkdir()
    entry = write_shard(folder / shard_name(0), samples)
    if not sizes:
        del entry["sizes"]
    write_manifest(folder, [entry], format=FORMAT, version=1, split="train")
    return folder


def recipe_of(tmp_path, tiny_models, sizes: bool = True) -> Recipe:
    path = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", write_data(tmp_path / "data", sizes))
    return load_recipe(path, ["data.max_length=1024"]).recipe


def described(recipe: Recipe, most: int) -> Samples:
    return describe_samples(recipe, Given(), 4, 1176, most)


def test_the_longest_is_found_by_its_size_where_it_is_not_measured(tmp_path, tiny_models):
    recipe = recipe_of(tmp_path, tiny_models)
    part, whole = described(recipe, MEASURED), described(recipe, COUNT)
    raw = ShardFolder(tmp_path / "data").read(LONG)
    encoded = chat_encoder(recipe.student.path, recipe.data)(raw.key, raw.record["messages"], raw.images)
    assert whole.longest == encoded.inputs["input_ids"].numel() and len(set(whole.origins.values())) == 1
    assert whole.images == 20 / COUNT, "every fifth chat has no picture"
    assert max(part.lengths) < whole.longest / 2, "it is not among the measured"
    assert whole.longest <= part.longest <= 1.1 * whole.longest, "and is estimated, not cut at data.max_length"
    assert max(part.lengths) - part.longest < 0 < part.longest_response <= part.longest
    assert part.origins["longest"].startswith("the longest by the sizes of all, ")


def test_without_sizes_the_longest_is_what_data_max_length_lets_through(tmp_path, tiny_models):
    found = described(recipe_of(tmp_path, tiny_models, sizes=False), MEASURED)
    assert found.longest == 1024 and "data.max_length" in found.origins["longest"]


def test_memory_is_that_of_the_longest_and_a_smaller_max_length_lowers_it(tmp_path, tiny_models):
    """As `plan` advises it where a step does not fit."""
    recipe = recipe_of(tmp_path, tiny_models)

    def total(planned: Planned) -> int:
        work = Workload(planned.recipe, planned.zero("reinforce"), 2, planned.samples, planned.vocab)
        return planned.memory("reinforce", work).total

    part, whole = (Planned(recipe, described(recipe, most)) for most in (MEASURED, COUNT))
    assert total(part) == pytest.approx(total(whole), rel=0.2)
    shorter = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 256})})
    assert part.with_recipe(shorter).samples.longest == 256 and total(part.with_recipe(shorter)) < total(part)


def test_a_step_with_samples_of_its_own_is_planned_by_them(tmp_path, tiny_models, capsys):
    """Such as the teacher's answers, which may be of any length."""
    recipe = recipe_of(tmp_path, tiny_models)
    answers = tiny.write_data(tmp_path / "answers", 6)
    absent = tmp_path / "absent"
    sections = {"reinforce": {"train": answers}, "verbalize": {"train": absent}}
    changes = {name: getattr(recipe, name).model_copy(update=update) for name, update in sections.items()}
    recipe = recipe.model_copy(update=changes)
    samples, own = described(recipe, COUNT), own_samples(recipe, 4, 1176)
    assert list(own) == ["reinforce"] and own["reinforce"].count == 6
    assert own_samples(recipe, 4, 1176, steps=["verbalize"]) == {}
    plain, planned = Planned(recipe, samples), Planned(recipe, samples, own=own)
    assert planned.operations("reinforce") == Planned(recipe, own["reinforce"]).operations("reinforce")
    assert planned.operations("reinforce") != plain.operations("reinforce")
    assert planned.operations("interact") == plain.operations("interact")
    machine = Machine(2, 80)
    assert planned.plan("reinforce", machine).memory != plain.plan("reinforce", machine).memory
    show(planned, machine)
    said = capsys.readouterr().out
    assert f"reinforce.train: 6 samples of {own['reinforce'].tokens:.0f} tokens" in said
    assert f"verbalize.train: counted as if it were data.train: {absent} cannot be measured here" in said
    (answers / "manifest.json").write_text("{")
    with pytest.raises(RecipeError, match=r"^reinforce\.train: "):
        own_samples(recipe, 4, 1176)
