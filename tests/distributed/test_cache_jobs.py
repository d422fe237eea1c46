"""Cache jobs: alone, in ranges, again after damage; the same bytes on any number of ranks; and what stage 2 refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from running import ROOT, cache_folder, deepspeed, tiny_recipe
from safetensors.torch import load_file, save_file
from tiny import write_data

from data_prep.shards import ShardFolder
from pipeline.loss.sparse_kl import column_kl
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime.data.batches import DataOrder, derived_seed
from pipeline.runtime.folder import done, trained_verb_ffns
from pipeline.signal import HiddenSignal
from pipeline.vlm.assemble import encoders, load_trained, shared_vocabulary
from pipeline.vlm.backbone import run_backbone
from pipeline.vlm.processing import collate

KIND = "qwen2_vl"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "train", 24, shards=3)


@pytest.fixture(scope="module")
def verbalized_run(tmp_path_factory, tiny_models, data) -> tuple[Path, Path]:
    """(recipe, run) with verbalizers and a cache of the exact codec, all by stage 1."""
    folder = tmp_path_factory.mktemp("cache")
    codec = {"name": "hidden", "dtype": "float32"}
    recipe = tiny_recipe(folder, tiny_models, KIND, data, cache={"codec": codec})
    deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    return recipe, folder / "run"


def copy(run: Path, to: Path, *parts: str) -> list[str]:
    for part in parts:
        shutil.copytree(run / part, to / part)
    return ["--set", f"run={to}"]


def shards(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache_folder(run).glob("*.tar"))}


def test_jobs_over_ranges_fill_one_cache_with_the_same_bytes(verbalized_run, tmp_path):
    recipe, run = verbalized_run
    where = copy(run, tmp_path / "run", "verbalize")
    said = deepspeed(1, "cache.py", "--recipe", recipe, "--shards", "1-2", *where)
    assert "2 of 3 shards are there" in said and not (cache_folder(tmp_path / "run") / "manifest.json").exists()
    assert re.search(r"cache: 2 of 3 shards to make, about (\S+ KB) .*; the whole cache lacks (?!\1)\S+ KB", said)
    said = deepspeed(1, "cache.py", "--recipe", recipe, "--shards", "0", *where)
    assert "cache: complete, 3 shards" in said
    assert shards(tmp_path / "run") == shards(run), "two ranks and one, one engine with a student and one without"


def test_a_damaged_shard_is_named_and_made_again(verbalized_run, tmp_path):
    recipe, run = verbalized_run
    where = copy(run, tmp_path / "run", "verbalize", "cache")
    shard = cache_folder(tmp_path / "run") / "000001.tar"
    flipped = bytearray(shard.read_bytes())
    flipped[3000] ^= 1
    shard.write_bytes(flipped)
    said = deepspeed(2, "cache.py", "--recipe", recipe, "--only-missing", *where)
    assert "cache: 000001.tar: changed: expected SHA-256 " in said and "1 of 3 shards to make" in said
    assert re.search(r"cache  8/8 .* tokens/s", said) and "cache  16/8" not in said, "the other rank makes nothing"
    assert shards(tmp_path / "run") == shards(run)
    said = deepspeed(1, "cache.py", "--recipe", recipe, "--shards", "1-7", *where, check=1)
    assert "has shards 0-2" in said


def test_a_job_that_is_killed_loses_no_more_than_the_shard_in_hand(verbalized_run, tmp_path, survived):
    recipe, run = verbalized_run
    where = [*copy(run, tmp_path / "run", "verbalize"), f"data.train={tmp_path / 'data'}"]
    write_data(tmp_path / "data", 96, shards=48)
    with alone("cache.py", "--recipe", recipe, *where) as job:
        made: list[Path] = []
        while len(made) < 3:
            assert job.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
            made = list((tmp_path / "run" / "cache").glob("*/0*.json"))
        job.send_signal(signal.SIGKILL)
    folder = cache_folder(tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.json")}
    tars = {path.stem for path in folder.glob("0*.tar")}
    assert 3 <= len(before) < 48 and {Path(name).stem for name in before} <= tars
    assert len(tars) <= len(before) + 1, "killed between a shard and its sidecar, at most"
    said = deepspeed(1, "cache.py", "--recipe", recipe, *where)
    assert f"{48 - len(before)} of 48 shards to make" in said and "cache: complete, 48 shards" in said
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}, "what was whole is not touched"
    assert said.count("% of the time of the last 20 batches was spent on waiting for data") >= 1, "it loads by itself"
    said = deepspeed(1, "cache.py", "--recipe", recipe, "--only-missing", *where)
    assert "to make" not in said and "cache: complete, 48 shards" in said, "every shard's bytes are what they should be"
    survived(kills=1)


@contextmanager
def alone(script: str, *arguments: object) -> Iterator[subprocess.Popen]:
    """A program of launch/ as the one rank of a job, without a launcher: the process itself can be killed."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, f"launch/{script}", *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **rank, "PATH": path}) as job:
        try:
            yield job
        finally:
            job.kill()


def test_interaction_from_the_exact_codec(verbalized_run, tiny_models, tmp_path):
    recipe, run = verbalized_run
    where = copy(run, tmp_path / "run", "verbalize", "cache")
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe, *where, "interact.cross_entropy_weight=0.5")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    interact = [line for line in lines if line["step"] == "interact"]
    assert interact[-1]["last"] < interact[0]["last"]
    assert interact[-1]["cross_entropy"] < interact[0]["cross_entropy"]
    assert torch.isfinite(torch.tensor([line["layer/1"] for line in interact])).all()


@pytest.mark.parametrize("matching", ["last_only", "ordered_argmin"])
def test_other_strategies_run_from_the_same_cache(verbalized_run, tmp_path, matching):
    recipe, run = verbalized_run
    where = copy(run, tmp_path / "run", "verbalize", "cache")
    also = [
        f"interact.matching={matching}",
        "interact.steps=2",
        f"interact.train_verbalizers={matching != 'last_only'}",
    ]
    deepspeed(1, "train.py", "--stage", 2, "--only", "interact", "--recipe", recipe, *where, *also)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [None, None] if matching == "last_only" else sorted(lines[-1]["match"])
    assert lines[-1]["match"] == expected and (tmp_path / "run" / "interact" / "student" / "config.json").is_file()
    assert trained_verb_ffns(tmp_path / "run").is_file() == (matching != "last_only")


def test_verb_ffns_that_interaction_trains_are_saved_as_they_end(verbalized_run, tmp_path):
    """On two ranks under ZeRO-3, in the form of stage 1's; each of their tensors has moved from there."""
    recipe, run = verbalized_run
    where = copy(run, tmp_path / "run", "verbalize", "cache")
    also = ["interact.steps=2", "interact.train_verbalizers=true"]
    deepspeed(2, "train.py", "--stage", 2, "--only", "interact", "--recipe", recipe, *where, *also)
    begun, ended = load_file(run / "verbalize" / "student.safetensors"), load_file(trained_verb_ffns(tmp_path / "run"))
    assert ended.keys() == begun.keys()
    for name, value in ended.items():
        assert value.shape == begun[name].shape and value.dtype == begun[name].dtype, name
        assert not torch.equal(value, begun[name]), f"{name} has not moved"


def live_losses(recipe, run: Path) -> dict[str, float]:
    """The first update's interaction losses under the uniform match, with a live teacher in this one process."""
    data = ShardFolder(recipe.data.train)
    encoder = encoders(recipe, ["teacher", "student"])["student"]
    order = DataOrder(len(data), derived_seed(recipe.seed, "interact"))
    raw = [data.read(order[position].sample) for position in range(recipe.interact.batch_size)]
    encoded = [encoder(one.key, one.record["messages"], one.images) for one in raw]
    batch = collate(encoded, encoder.filler(), encoder.processor.tokenizer.pad_token_id)
    vocab = shared_vocabulary(recipe, encoders(recipe, ["teacher", "student"])).size
    verbalized, heads = {}, {}
    for role in ("teacher", "student"):
        verb_ffns = run / "verbalize" / f"{role}.safetensors"
        side = load_trained(getattr(recipe, role), recipe, vocab, torch.float32, verb_ffns).eval()
        with torch.no_grad():
            verbalized[role] = side.verbalize_states(
                run_backbone(side.backbone, batch.inputs, side.all_layers(), batch.positions)
            )
        heads[role] = side.head(lambda hidden, unembedding: unembedding, None)
    live = HiddenSignal(verbalized["teacher"].transpose(0, 1), heads["teacher"])
    pairs = {"layer/1": (0, 1), "layer/2": (1, 3), "last": (2, 4)}  # uniform: 2 students of 4 teachers take 1 and 3
    return {
        name: column_kl(verbalized["student"][i], heads["student"], live, j).item() / len(batch.labels)
        for name, (i, j) in pairs.items()
    }


def test_from_the_exact_codec_the_losses_are_those_of_a_live_teacher(verbalized_run, tmp_path):
    recipe, run = verbalized_run
    where = copy(run, tmp_path / "run", "verbalize", "cache")
    also = ["interact.matching=uniform", "interact.steps=2"]
    deepspeed(2, "train.py", "--stage", 2, "--only", "interact", "--recipe", recipe, *where, *also)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    expected = live_losses(load_recipe(recipe).recipe, run)
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=2e-6)


def test_samples_are_the_same_on_any_ranks_and_lie_beside_another_codec(verbalized_run, tmp_path):
    recipe, run = verbalized_run
    sampled = ["cache.codec={name: sampled, points: 32}"]
    one = copy(run, tmp_path / "one", "verbalize", "cache")
    exact = shards(tmp_path / "one")
    assert done(tmp_path / "one" / "cache")
    deepspeed(1, "cache.py", "--recipe", recipe, "--shards", "2", *one, *sampled)
    assert done(tmp_path / "one" / "cache") is None, "the cache of these values is not complete"
    told = (tmp_path / "one" / "metrics.jsonl").read_text()
    deepspeed(1, "cache.py", "--recipe", recipe, *one, *sampled)
    both = (tmp_path / "one" / "metrics.jsonl").read_text()
    assert both.startswith(told) and len(both) > len(told) > 0, "the lines of one job and then of the other"
    beside = {path.name.split("-")[0]: path for path in (tmp_path / "one" / "cache").glob("*-*")}
    assert sorted(beside) == ["hidden", "sampled"]
    assert {path.name: path.read_bytes() for path in beside["hidden"].glob("*.tar")} == exact, "left as it was"
    two = copy(run, tmp_path / "two", "verbalize")
    deepspeed(2, "cache.py", "--recipe", recipe, *two, *sampled)
    assert shards(tmp_path / "two") == {
        path.name: path.read_bytes() for path in sorted(beside["sampled"].glob("*.tar"))
    }
    manifest = json.loads((beside["sampled"] / "manifest.json").read_text())
    assert manifest["codec"] == {"name": "sampled", "points": 32, "seed": 0} and manifest["layers"] == [1, 2, 3, 4, 6]
    less = ["interact.points=16", "interact.token_share=0.5", "interact.teacher_layers=[1, 3, 4]", "interact.steps=2"]
    deepspeed(2, "train.py", "--stage", 2, "--only", "interact", "--recipe", recipe, *one, *sampled, *less)
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    interact = [line for line in lines if line["step"] == "interact"]
    assert all(set(line["match"]) < {1, 3, 4} for line in interact)
    assert 0 < interact[0]["tokens"] < 0.8 * manifest["tokens"] * 8 / 24, "half of the tokens of a batch of 8 of 24"


def test_more_data_goes_on_in_the_same_cache(verbalized_run, tmp_path):
    recipe, run = verbalized_run
    where = [*copy(run, tmp_path / "run", "verbalize"), f"data.train={tmp_path / 'data'}"]
    write_data(tmp_path / "data", 24, shards=3)
    deepspeed(1, "cache.py", "--recipe", recipe, *where)
    before = {name: (cache_folder(tmp_path / "run") / name).stat().st_mtime_ns for name in shards(tmp_path / "run")}
    write_data(tmp_path / "more", 32, shards=4)
    for name in ("000003.tar", "manifest.json"):
        shutil.copy(tmp_path / "more" / name, tmp_path / "data" / name)
    said = deepspeed(1, "train.py", "--stage", 2, "--recipe", recipe, *where, check=1)
    assert "has 3 of 4 shards, 24 of 32 keys" in said and "launch/cache.py" in said and "--only-missing" in said
    said = deepspeed(1, "cache.py", "--recipe", recipe, *where)
    assert "1 of 4 shards to make" in said and "cache: complete, 4 shards" in said
    after = {name: (cache_folder(tmp_path / "run") / name).stat().st_mtime_ns for name in before}
    assert before == after, "what was there is not touched"


def test_stage_2_refuses_a_cache_of_other_verbalizers(verbalized_run, tmp_path):
    recipe, run = verbalized_run
    where = copy(run, tmp_path / "run", "verbalize", "cache")
    path = tmp_path / "run" / "verbalize" / "teacher.safetensors"
    weights = load_file(path)
    save_file({name: w + 1 for name, w in weights.items()}, path)
    said = deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe, *where, check=1)
    assert "was made from something else (verbalizers)" in said and "expected" in said and "launch/cache.py" in said
    copy(run, tmp_path / "flipped", "verbalize", "cache")
    student = tmp_path / "flipped" / "verbalize" / "student.safetensors"
    student.write_bytes(student.read_bytes()[:-1] + b"\x55")
    flipped = ["--set", f"run={tmp_path / 'flipped'}"]
    said = deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe, *flipped, check=1)
    assert f"{student} is damaged: expected SHA-256" in said and "Traceback" not in said
    said = deepspeed(1, "train.py", "--stage", 2, "--recipe", recipe, "--set", f"run={tmp_path / 'none'}", check=1)
    assert "no verbalizers in" in said and "deepspeed launch/train.py --stage 1" in said
