"""Real tokens over computed ones: by hand, as a run counts them, and in the hours."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from planning import BY_NUMBER, paper_plan, paper_recipe, paper_samples

from pipeline.recipe.schema import Training
from pipeline.results.plan.cuts import cache_cuts, training_cuts
from pipeline.results.plan.lengths import assumed_lengths
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.run import Planned
from pipeline.runtime.data.loader import WINDOW

COUNTED = json.loads((Path(__file__).resolve().parents[3] / "bench/results/batches.json").read_text())["real_share"]
LENGTHS = tuple(assumed_lengths(random.Random(1), 4096, 899, 4096))


def training(**values):
    return Training(steps=1, batch_size=512, **values)


def test_samples_of_one_length_are_all_real():
    assert training_cuts(training(micro_batch_size=4), 8, (300,)).real_share == 1
    assert cache_cuts(9600, 32, 8, (300,)).real_share == 1


def test_one_micro_step_waits_for_its_longest_sample():
    """512 samples on 512 ranks: nearly all updates have a sample of 400, so 100 or 400 of 400 are real."""
    cuts = training_cuts(training(micro_batch_size=1), 512, (100, 400))
    assert cuts.micro_steps == 1 and cuts.real_share == pytest.approx(250 / 400, rel=0.05)


@pytest.mark.parametrize(("ranks", "micro"), [(8, 4), (8, 8), (64, 1), (64, 4)])
def test_shares_are_those_of_the_benchmark(ranks, micro):
    """Other draws, the same lengths; 64 x 4 is 37 % sorted and 88 % under a budget."""
    counted = COUNTED[f"{ranks} ranks x {micro}"]
    for name, values in {
        "sorted": {"micro_batch_size": micro},
        "micro_batch_tokens": {"micro_batch_tokens": micro * 4096},
    }.items():
        cuts = training_cuts(training(**values), ranks, LENGTHS)
        assert cuts.real_share == pytest.approx(counted[name]["real_share"], rel=0.03), name
        assert cuts.micro_steps == pytest.approx(counted[name]["micro_steps"], abs=0.3), name


def test_hours_are_those_of_all_computed_tokens():
    """The operations are the samples' own."""
    recipe, machine = paper_recipe(*BY_NUMBER), Machine(64, 80)
    plans = [
        Planned(recipe, paper_samples(recipe, lengths=lengths)).plan("interact", machine).time
        for lengths in ((900,), (4096, *[100] * 1023))
    ]
    alike, mixed = plans
    assert alike.real_share == 1 and mixed.real_share < 0.2 and mixed.operations == alike.operations
    assert mixed.computing == pytest.approx(alike.computing / mixed.real_share)


def test_batches_of_the_cache_form_inside_windows():
    """32 samples of 900 tokens do not fit into 16,384: a window takes two batches, the second half full."""
    planned, machine = paper_plan(), Machine(64, 80)
    samples = replace(planned.samples, lengths=(900,))
    time = Planned(planned.recipe, samples).plan("cache", machine).time
    windows = -(-samples.shards // 64) * -(-1000 // WINDOW)
    assert time.updates == 2 * windows
    assert planned.plan("cache", machine).time.updates > 3 * windows, "and lengths that differ take three"


def test_gpus_with_a_shard_fewer_wait_for_the_others():
    recipe = paper_recipe()
    samples = paper_samples(recipe, lengths=(900,), shards=65)
    full, part = (
        Planned(recipe, replace(samples, shards=shards)).plan("cache", Machine(64, 80)).time for shards in (64, 65)
    )
    assert full.real_share == 1 and part.real_share == pytest.approx(65 / 128)


def test_measured_lengths_take_the_place_of_assumed_ones(tmp_path, tiny_models):
    import tiny
    from running import tiny_recipe

    from pipeline.recipe.resolve import load_recipe
    from pipeline.results.plan.samples import Given, describe_samples

    data = tiny.write_data(tmp_path / "data", 12)
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_models, "qwen2_vl", data)).recipe
    measured = describe_samples(recipe, Given(), 4, 1176)
    assert len(measured.lengths) == 12 and max(measured.lengths) == measured.longest
    assert sum(measured.lengths) / 12 == pytest.approx(measured.tokens) and "lengths" not in measured.origins
    told = describe_samples(recipe, Given(tokens=measured.tokens + 1), 4, 1176)
    assert told.origins["lengths"] == "spread as assumed, log-normal" and len(set(told.lengths)) > 12
