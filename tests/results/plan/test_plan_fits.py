"""Which step does not fit, and the field that makes it fit: named, and tried."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from planning import BY_NUMBER, CONFIGS, paper_plan, paper_recipe

from pipeline.__main__ import main
from pipeline.recipe.resolve import SHIPPED
from pipeline.results.plan.knobs import applied, fits, remedy
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.speed import faster, largest_micro_batch, token_budget

COMMAND = [
    "plan", "--recipe", str(SHIPPED / "recipes" / "qwen2_vl_72b_to_7b.yaml"), "--gpus", "64", "--gpu-memory", "80",
    "--samples", "2900000", "--tokens-per-sample", "900", "--image-tokens", "650", "--response-tokens", "150",
    "--set", f"teacher.path={CONFIGS / 'qwen2_vl_72b'}", f"student.path={CONFIGS / 'qwen2_vl_7b'}",
]  # fmt: skip


def keys(changes):
    return [change.key for change in changes]


def fits_after(planned, step, machine, changes):
    return fits(planned.with_recipe(applied(planned.recipe, changes)).plan(step, machine), machine)


def test_without_checkpointing_the_students_step_does_not_fit_and_checkpointing_is_named():
    planned, machine = paper_plan("gradient_checkpointing=false"), Machine(64, 80)
    plan = planned.plan("reinforce", machine)
    assert not fits(plan, machine) and plan.memory.kept > plan.memory.total / 2  # what does not fit is activations
    changes = remedy(planned, "reinforce", machine)
    assert keys(changes) == ["gradient_checkpointing"] and fits_after(planned, "reinforce", machine, changes)


def test_a_micro_batch_that_is_too_large_is_halved_until_it_fits():
    planned, machine = paper_plan(*BY_NUMBER, "reinforce.micro_batch_size=8"), Machine(64, 16)
    (change,) = remedy(planned, "reinforce", machine)
    assert change.key == "reinforce.micro_batch_size" and change.before == 8
    assert fits_after(planned, "reinforce", machine, [change])
    assert not fits_after(planned, "reinforce", machine, [replace(change, value=change.value * 2)])


def test_72b_on_eight_small_gpus_needs_its_weights_on_the_cpu():
    planned, machine = paper_plan("cache.batch_tokens=4096"), Machine(8, 20)
    plan = planned.plan("cache", machine)
    assert not fits(plan, machine) and plan.memory.weights > machine.usable * 0.7
    changes = remedy(planned, "cache", machine)
    assert "cache.deepspeed" in keys(changes) and fits_after(planned, "cache", machine, changes)


def test_where_nothing_helps_it_says_so():
    assert remedy(paper_plan(), "verbalize", Machine(8, 2)) is None


def test_a_global_batch_that_the_gpus_do_not_divide_names_the_field():
    """256 samples on 512 GPUs: no micro-batch is small enough, so the batch itself binds."""
    planned, machine = paper_plan(*BY_NUMBER), Machine(512, 80)
    plan = planned.plan("verbalize", machine)
    assert plan.problem == (
        "verbalize.batch_size: 256 is no multiple of verbalize.micro_batch_size x GPUs = 4 x 512 = 2048"
    )
    assert keys(remedy(planned, "interact", machine)) == ["interact.micro_batch_size"]
    changes = remedy(planned, "verbalize", machine)
    assert {c.key: c.value for c in changes} == {"verbalize.micro_batch_size": 1, "verbalize.batch_size": 512}


def test_the_largest_micro_batch_moves_fewest_bytes():
    planned, machine = paper_plan(*BY_NUMBER, "verbalize.micro_batch_size=1"), Machine(64, 80)
    change = largest_micro_batch(planned, "verbalize", machine)
    assert change.value == 4  # 256 samples / 64 GPUs: one micro-step
    better = planned.with_recipe(applied(planned.recipe, [change])).plan("verbalize", machine)
    assert better.time.received == pytest.approx(planned.plan("verbalize", machine).time.received / 4, rel=0.01)


def test_a_limit_in_tokens_takes_the_place_of_a_number_of_samples():
    """16,384 tokens hold 4 of the longest samples and 18 mean ones, so 8 of 900 tokens take one micro-step."""
    machine = Machine(64, 80)
    limited, four = (paper_plan(*changes).plan("reinforce", machine) for changes in ((), BY_NUMBER))
    assert four.memory == limited.memory and (limited.time.micro_steps, four.time.micro_steps) == (1, 2)


def test_the_smallest_budget_of_tokens_with_fewest_micro_steps_is_found():
    """On 64 GPUs two of the longest are enough for 256 samples at once, four for 512; 8 GPUs of 45 GiB have a limit."""
    planned, machine = paper_plan(), Machine(64, 80)
    assert token_budget(planned, "verbalize", machine).value == 8192
    assert token_budget(planned, "interact", machine).value == 16384
    small = Machine(8, 45)
    change = token_budget(planned, "verbalize", small)
    doubled = replace(change, value=change.value * 2)
    assert fits_after(planned, "verbalize", small, [change]) and not fits_after(planned, "verbalize", small, [doubled])


def test_where_few_tokens_are_real_a_budget_of_tokens_is_named_and_saves_what_it_says(capsys):
    planned, machine = paper_plan(*BY_NUMBER), Machine(64, 80)
    for step in ("verbalize", "interact", "reinforce"):
        plan, changes = planned.plan(step, machine), faster(planned, step, machine)
        assert plan.time.real_share < 0.4 and keys(changes)[0] == f"{step}.micro_batch_tokens"
        better = planned.with_recipe(applied(planned.recipe, changes)).plan(step, machine)
        assert better.time.real_share > 0.8 and better.time.seconds < plan.time.seconds / 2 and fits(better, machine)
    assert main([*COMMAND, *BY_NUMBER]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "interact: 38% of its tokens are real; it fits with interact.micro_batch_tokens: 16384 (now left out)" in said
    )


def test_where_frozen_weights_bind_over_slow_links_the_partitioning_in_each_node_is_named(capsys):
    planned, machine = paper_plan(), Machine(64, 80)
    plan = planned.plan("verbalize", machine)
    (change,) = faster(planned, "verbalize", machine)
    assert plan.time.bound == "network" and change.key == "verbalize.deepspeed"
    assert change.value.name == "zero3_hpz.json" and fits_after(planned, "verbalize", machine, [change])
    assert main(COMMAND) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "verbalize: waits for the network; it fits with verbalize.deepspeed: ds_configs/zero3_hpz.json" in said
    for other in (Machine(8, 80), Machine(64, 80, network=400), Machine(64, 80, gpus_per_node=4), Machine(64, 28)):
        assert "verbalize.deepspeed" not in keys(faster(planned, "verbalize", other)), other
    assert "reinforce.deepspeed" not in keys(faster(planned, "reinforce", machine)), "all of its weights train"


def test_the_command_prints_the_field(capsys):
    assert main([*COMMAND, "--set", "gradient_checkpointing=false"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4.0B in verbalizers on 20 layers" in said and "269.8M in verbalizers on 7 layers" in said
    assert "it fits with gradient_checkpointing: true (now false)" in said


def test_json_has_every_step_and_size(capsys):
    assert main([*COMMAND, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in plan["steps"]] == ["verbalize", "cache", "interact", "reinforce"]
    assert plan["parameters"]["teacher_verbalizers"] == 4_026_695_680
    assert set(plan["gpus"]) == {"8", "64", "512"} and all(step["fits"] for step in plan["steps"])
    for step in plan["steps"]:
        causes = {name: size for name, size in step["memory"].items() if name not in ("total", "update")}
        assert step["memory"]["total"] == sum(causes.values())


def test_lengths_that_nothing_tells_are_asked_for(capsys):
    assert main([*COMMAND[:7], *COMMAND[-3:]]) == 2
    said = capsys.readouterr().err
    assert "Give --samples N --tokens-per-sample N --response-tokens N --image-tokens N" in said


def test_a_measured_speed_takes_the_place_of_the_stated_utilisation():
    """5664 updates of 512 samples with 150 response tokens, at 100 a second on each of 64 GPUs."""
    planned = paper_plan()
    time = planned.plan("interact", Machine(64, 80, measured={"interact": 100.0})).time
    assert time.seconds == pytest.approx(5664 * 512 * 150 / 6400) and time.bound == "measured"
    assert planned.plan("reinforce", Machine(64, 80, utilisation=0.2)).time.computing == pytest.approx(
        2 * planned.plan("reinforce", Machine(64, 80)).time.computing
    )


def test_steps_that_a_recipe_leaves_out_are_not_planned():
    assert paper_plan("reinforce.epochs=null", "reinforce.steps=0").steps == ["verbalize", "cache", "interact"]
    assert paper_plan("stage_1=runs/other").steps == ["interact", "reinforce"]
    assert paper_plan("interact.epochs=null", "interact.steps=0").steps == ["reinforce"]
    machine = Machine(64, 80)
    whole, part = (paper_plan(*more).plan("reinforce", machine).memory for more in ((), ("train=[decoder]",)))
    assert part.optimizer < whole.optimizer, "a frozen head and projector have no optimizer states"
    alone, both = paper_plan("cache_from=runs/other"), paper_plan()
    assert alone.steps == ["verbalize", "interact", "reinforce"]
    shares = [one.plan("verbalize", machine).memory.weights for one in (alone, both)]
    assert shares[0] < shares[1] / 8, "of a teacher that is 10 times the student"
    assert paper_recipe().gradient_checkpointing
