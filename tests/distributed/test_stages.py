"""Both stages through the real programs, on two processes: what they leave, and that they go on where they stopped."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from running import cache_folder, deepspeed, mpirun, python, tiny_recipe, torchrun
from s3 import s3_server
from safetensors.torch import load_file
from tiny import KINDS, chats, write_data

from data_prep import storage
from pipeline.results.cache import on_disk
from pipeline.results.cache.info import run as cache_info
from pipeline.results.status import status
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.processing import ChatEncoder, collate, load_processor


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "train", 24, shards=3)


HELD_OUT = chats(7, seed=5)
"""An odd number: on two ranks the last micro-batch of one has nothing to measure."""


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("held_out") / "held_out", len(HELD_OUT), shards=1, seed=5)


def comparable(folder: Path) -> dict:
    """A config without the number format, which transformers writes anew into each part."""

    def strip(value):
        return {k: strip(v) for k, v in value.items() if k != "dtype"} if isinstance(value, dict) else value

    return strip(json.loads((folder / "config.json").read_text()))


def metrics(run: Path, step: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] == step]


def exported_loss(student: Path, samples) -> float:
    """Cross-entropy of an exported student's responses, by transformers' own forward."""
    model, encoder = load_vlm(student, torch.float32).eval(), ChatEncoder(load_processor(student), 512)
    batch = collate([encoder(k, r["messages"], i) for k, r, i in samples], encoder.filler(), 0)
    with torch.no_grad():
        logits = model(**batch.inputs).logits.double().flatten(0, 1)[batch.positions]
    return float(torch.nn.functional.cross_entropy(logits, batch.labels))


@pytest.fixture(scope="module", params=KINDS)
def finished(request, tmp_path_factory, tiny_models, data):
    """A whole run of one family, under another launcher; the teacher's folder is gone before stage 2."""
    folder = tmp_path_factory.mktemp(request.param)
    models = {**tiny_models, (request.param, "teacher"): folder / "teacher"}
    shutil.copytree(tiny_models[request.param, "teacher"], folder / "teacher")
    reported = request.param == KINDS[0]
    recipe = tiny_recipe(folder, models, request.param, data, verbalize={"steps": 12}, report=reported)
    own = partial(deepspeed, launcher=True)
    stage_1, stage_2 = (own, own) if request.param == KINDS[0] else (mpirun, torchrun)  # the recipe is the same
    said = stage_1(2, "train.py", "--stage", 1, "--recipe", recipe)
    shutil.rmtree(folder / "teacher")
    said += stage_2(2, "train.py", "--stage", 2, "--recipe", recipe)
    return request.param, folder, recipe, said


def test_verbalization_losses_fall_and_only_verb_ffns_are_kept(finished):
    _, folder, _, _ = finished
    lines = metrics(folder / "run", "verbalize")
    assert [line["update"] for line in lines] == list(range(1, 13))
    for layer in (1, 2, 3, 4):
        assert lines[-1][f"teacher/{layer}"] < lines[0][f"teacher/{layer}"] - 0.2
    assert all(lines[-1][f"student/{layer}"] < lines[0][f"student/{layer}"] - 0.2 for layer in (1, 2))
    # The model's own loss is logged beside them and no part of it trains.
    assert abs(lines[-1]["teacher/6"] - lines[0]["teacher/6"]) < 0.2
    names = set(load_file(folder / "run" / "verbalize" / "teacher.safetensors"))
    assert names == {f"{n}.{w}.weight" for n in (1, 2, 3, 4) for w in ("gate", "up", "down", "norm")}


def test_metrics_say_how_well_data_kept_up_in_every_step(finished):
    """Two ranks, samples of unlike lengths: some of what is computed is padding, or waiting for the other rank."""
    _, folder, _, _ = finished
    for step in ("verbalize", "cache", "interact", "reinforce"):
        lines = metrics(folder / "run", step)
        assert lines and all(0.3 < line["real_share"] < 1 and line["loader_workers"] == 0 for line in lines), step
        assert all(0 < line["data_wait"] <= 1 for line in lines), step


def test_lines_of_progress_are_short_and_those_of_one_rank(finished):
    _, _, _, said = finished
    for step, updates in (("verbalize", 12), ("interact", 4), ("reinforce", 4)):
        shown = [line for line in said.splitlines() if line.startswith(f"{step}  ")]
        ends = [line for line in shown if line.startswith(f"{step}  {updates}/{updates}  eta 0:00:00  ")]
        assert len(ends) == 1 and all(len(line) <= 160 and "tokens/s  data " in line for line in shown), shown
    assert "teacher 1 " in said and ", mean " in said and "\x1b" not in said, "no terminal, nothing that moves"


def test_the_cache_mirrors_the_data(finished, data):
    _, folder, _, said = finished
    ours = json.loads((cache_folder(folder / "run") / "manifest.json").read_text())
    theirs = json.loads((data / "manifest.json").read_text())
    assert [s["name"] for s in ours["shards"]] == [s["name"] for s in theirs["shards"]]
    assert [s["keys"] for s in ours["shards"]] == [s["keys"] for s in theirs["shards"]]
    assert ours["layers"] == [1, 2, 3, 4, 6] and ours["tokens"] > 0
    assert "cache: complete, 3 shards" in said


def test_a_cache_in_a_bucket_changes_no_number(finished, tiny_models, tmp_path, capsys):
    """Made by two ranks and read by stage 2 behind a URL, with faults on the way: as the run with its own folder."""
    kind, folder, recipe, _ = finished
    if kind != KINDS[0]:
        pytest.skip("one family is enough")
    run = tmp_path / "run"
    shutil.copytree(folder / "run" / "verbalize", run / "verbalize")
    with s3_server() as server:
        server.every(5, "busy", "cut")
        where = ["--recipe", recipe, "--set", f"run={run}", "cache.folder=s3://bucket/caches", "report=false"]
        where.append(f"teacher.path={tiny_models[kind, 'teacher']}")
        assert "cache: complete, 3 shards" in deepspeed(2, "cache.py", *where)
        made = len(server.injected)
        deepspeed(2, "train.py", "--stage", 2, *where)
        assert 0 < made < len(server.injected), "both have met faults"
        far, near = on_disk.find_caches(run), cache_folder(folder / "run")
        assert far == [storage.location(f"s3://bucket/caches/{near.name}")] and not list(run.glob("cache/*/*"))
        assert on_disk.inspect_cache(far[0], run).complete and status(run)[0][1].progress == "3 of 3 shards"
        cache_info(run, True, None, None)  # hashes and decodes all
        assert "verified 3 shards" in capsys.readouterr().out
        names = {file.name for file in near.iterdir() if not file.name.startswith(".")}
        assert {file.name for file in storage.listed(far[0], "*")} == names
        assert all(storage.read_bytes(far[0] / name) == (near / name).read_bytes() for name in names)
    students = [(root / "student" / "model.safetensors").read_bytes() for root in (run, folder / "run")]
    assert students[0] == students[1]


def test_interaction_draws_ordered_matches_and_its_losses_fall(finished):
    _, folder, _, _ = finished
    lines = metrics(folder / "run", "interact")
    assert len(lines) == 4
    for line in lines:
        first, second = line["match"]
        assert first < second and first in (1, 2, 3) and second in (2, 3, 4)
        assert min(line["layer/1"], line["layer/2"], line["last"]) >= 0
    assert lines[-1]["last"] < lines[0]["last"]


def test_the_student_is_a_plain_folder_with_its_own_names(finished, tiny_models):
    kind, folder, _, _ = finished
    original, student = tiny_models[kind, "student"], folder / "run" / "student"
    ours, theirs = load_file(student / "model.safetensors"), load_file(original / "model.safetensors")
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert comparable(student) == comparable(original)
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json"):
        assert (student / name).read_bytes() == (original / name).read_bytes()
    card = (student / "README.md").read_text()
    assert "| interact | 4 updates of 8 samples |" in card and "* 2 ranks on cpu" in card
    assert not (folder / "run" / "interact" / "student" / "README.md").exists()
    kept = [path.stem for path in sorted((folder / "run" / "environment").iterdir())]
    assert kept == ["cache", "interact", "reinforce", "verbalize"]


def test_each_step_writes_the_runs_report_where_the_recipe_wants_one(finished):
    kind, folder, _, said = finished
    page = folder / "run" / "report.html"
    assert page.is_file() == (kind == KINDS[0]) and "was not written" not in said
    if kind == KINDS[0]:
        text = page.read_text()
        assert all(f"<td>{step}</td><td>done</td>" in text for step in ("verbalize", "cache", "interact", "reinforce"))
        assert "What ran it" in text


def test_the_student_answers_through_transformers_own_pipeline(finished):
    from transformers import pipeline

    _, folder, _, _ = finished
    student = folder / "run" / "student"
    ask = pipeline(
        "image-text-to-text", model=load_vlm(student, torch.float32), processor=load_processor(student), device="cpu"
    )
    (_, record, _) = chats(1)[0]
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (56, 56))}, *record["messages"][0]["content"][1:]]
    answer = ask(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def test_the_exported_logits_are_the_trained_engines(finished, data, tmp_path):
    """Loaded again by transformers, the export has the loss that the engine computes from it before its next update."""
    kind, folder, _, _ = finished
    student = folder / "run" / "student"
    models = {(kind, "teacher"): student, (kind, "student"): student}
    recipe = tiny_recipe(
        tmp_path,
        models,
        kind,
        data,
        interact={"steps": 0},
        reinforce={"steps": 1, "batch_size": 24, "micro_batch_size": 3},
    )
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    (line,) = metrics(tmp_path / "run", "reinforce")
    assert line["cross_entropy"] == pytest.approx(exported_loss(student, chats(24)), rel=1e-6)


def test_a_failed_export_loses_no_update(tiny_models, data, tmp_path):
    """The last update has a checkpoint: the same command exports what was trained and trains nothing anew."""
    recipe = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", data, interact={"steps": 0}, reinforce={"steps": 2})
    run = tmp_path / "run"
    run.mkdir()
    (run / "student.partial").write_text("a file where the export's folder is to be")
    said = deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe, check=1)
    assert "student.partial" in said and not (run / "student").exists()
    before = metrics(run, "reinforce")
    assert not (run / "student.partial").exists(), "nothing unfinished is left in the way"
    said = deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe, "--log-format", "json", "--quiet")
    objects = [json.loads(line) for line in said.splitlines() if line.startswith('{"time": ')]
    assert "reinforce: resumed after update 2 of 2" in [one["message"] for one in objects]
    assert metrics(run, "reinforce") == before and len(before) == 2
    assert (run / "student" / "model.safetensors").is_file() and not (run / "reinforce" / "checkpoints").exists()


def test_a_complete_run_says_so(finished):
    _, folder, recipe, _ = finished
    before = (folder / "run" / "student" / "model.safetensors").read_bytes()
    said = deepspeed(1, "train.py", "--stage", 2, "--recipe", recipe)
    assert "interact: already done" in said and "reinforce: already done" in said
    assert (folder / "run" / "student" / "model.safetensors").read_bytes() == before


def test_status_finds_every_step_done(finished):
    _, folder, _, _ = finished
    said = python("-m", "pipeline", "status", folder / "run")
    assert said.count(" done ") == 4 and "begun" not in said
    assert "python -m pipeline trace" in said.split("next:")[1], "no held-out data, so no evaluation"


def test_a_changed_recipe_is_refused_with_the_differing_keys(finished):
    _, _, recipe, _ = finished
    said = deepspeed(
        2, "train.py", "--stage", 2, "--recipe", recipe, "--set", "interact.steps=9", "seed=4", check=1, launcher=True
    )
    assert "interact.steps: the run has 4, now 9 (command line)" in said
    assert "seed: the run has 0, now 4 (command line)" in said
    assert said.count("was begun with another recipe") == 1, "one error, read once"


@pytest.mark.parametrize("finished", [KINDS[0]], indirect=True)
def test_a_stopped_run_ends_bitwise_where_the_uninterrupted_one_does(finished, tiny_models, data, held_out, tmp_path):
    _, folder, recipe, _ = finished
    shutil.copytree(folder / "run" / "verbalize", tmp_path / "run" / "verbalize")
    shutil.copytree(folder / "run" / "cache", tmp_path / "run" / "cache")
    arguments = ["--stage", 2, "--recipe", recipe, "--set", f"run={tmp_path / 'run'}", "interact.checkpoint_every=1"]
    # Measuring between updates, which the uninterrupted run does not, changes nothing.
    arguments += [f"data.held_out={held_out}", "interact.evaluate_every=2", "reinforce.evaluate_every=3"]
    said = deepspeed(2, "train.py", *arguments, "--stop-after", 3)
    assert "interact: stopped after update 3 of 4" in said
    kept = sorted(p.name for p in (tmp_path / "run" / "interact" / "checkpoints").glob("update_*"))
    assert kept == ["update_000000002", "update_000000003"], "the newest keep_checkpoints stay"
    said = deepspeed(2, "train.py", *arguments, "--stop-after", 1)
    assert "interact: resumed after update 3 of 4" in said
    assert "stopped after 1 updates, before reinforce" in said
    said = deepspeed(2, "train.py", *arguments, "--stop-after", 2)
    assert "reinforce: stopped after update 2 of 4" in said
    deepspeed(2, "train.py", *arguments)
    ours = load_file(tmp_path / "run" / "student" / "model.safetensors")
    for name, expected in load_file(folder / "run" / "student" / "model.safetensors").items():
        assert torch.equal(ours[name], expected), name
    numbers = ("cross_entropy", "last", "layer/1", "match", "tokens", "gradient_norm")
    for step in ("interact", "reinforce"):
        pairs = zip(metrics(folder / "run", step), metrics(tmp_path / "run", step), strict=True)
        for whole, resumed in pairs:
            assert {k: whole.get(k) for k in numbers} == {k: resumed.get(k) for k in numbers}
    measured = {
        step: {
            line["update"]: line["held_out_loss"] for line in metrics(tmp_path / "run", step) if "held_out_s" in line
        }
        for step in ("interact", "reinforce")
    }
    assert {step: list(found) for step, found in measured.items()} == {"interact": [2, 4], "reinforce": [3, 4]}
    for step, folder in (("interact", "interact/student"), ("reinforce", "student")):
        assert measured[step][4] == pytest.approx(exported_loss(tmp_path / "run" / folder, HELD_OUT), rel=1e-6)
