"""Samples as people have them, on two ranks through both stages: each odd one is counted and named, and no job ends."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image
from running import ROOT, cache_folder, deepspeed, free_port, python, run, tiny_recipe
from tiny import png, turn

from data_prep.shards import FORMAT, ShardFolder, write_manifest, write_shard
from pipeline.recipe.schema import Training
from pipeline.runtime.data.batches import DataOrder, derived_seed, micro_batches
from pipeline.runtime.ranks import Ranks

KIND = "qwen2_vl"
ASK, ANSWER = turn("user", "<image>", "what?"), turn("assistant", "a red star")
HUMAN, GPT = {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a red star"}
NOT_WRITTEN = {
    "video": ({"video": "b.mp4"}, "video_or_audio"),
    "audio": ({"audio": "b.wav"}, "video_or_audio"),
    "no-file": ({"image": "nowhere.png"}, "missing_image"),
    "half-a-file": ({"image": "half.png"}, "broken_image"),
    "other-part": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "?"}]},
                      {"role": "assistant", "content": "b"}], "image": "a.png"},
        "conflicting_image",
    ),
}  # fmt: skip
"""{id: (changes of a good record, why `shard` leaves it out)}."""
WRITTEN = {
    "null-field": {"image": None, "images": ["a.png"]},
    "system-field": {"system": "be brief"},
    "sideways": {"image": "sideways.jpg"},
    "sixteen-bit": {"image": "deep.png"},
    "no-image": {"image": "", "conversations": [{"from": "human", "value": "hi"}, GPT]},
}
"""Odd, and used."""
NOT_USED = {
    "long-picture": ({"image": "long.png"}, "absolute aspect ratio must be smaller than 200"),
    "opens-with-an-answer": ({"conversations": [GPT, HUMAN, GPT]}, "begins with an assistant turn"),
    "control-token": ({"conversations": [{"from": "human", "value": "<image> hi<|im_end|>"}, GPT]}, "control token"),
    "no-room": ({"conversations": [{"from": "human", "value": "<image>" + "x" * 600}, GPT]}, "within max_length=256"),
}
"""{id: (changes of a good record, why training rejects it)}."""


def write(folder: Path, samples, shards: int = 2) -> Path:
    """(key, record, images) as a shard folder."""
    members = [
        (key, {"json": json.dumps(record).encode(), **{f"{i}.png": data for i, data in enumerate(images)}})
        for key, record, images in samples
    ]
    size = -(-len(members) // shards)
    folder.mkdir(parents=True)
    parts = [members[start : start + size] for start in range(0, len(members), size)]
    entries = [write_shard(folder / f"{number:06d}.tar", part) for number, part in enumerate(parts)]
    write_manifest(folder, entries, format=FORMAT, version=1, split=folder.name)
    return folder


def write_source(folder: Path) -> Path:
    """A LLaVA file in which every tenth record is odd, with its images."""
    folder.mkdir()
    (folder / "a.png").write_bytes(png(seed=1))
    (folder / "b.png").write_bytes(png(seed=2))
    (folder / "half.png").write_bytes(png(seed=3)[:200])
    (folder / "long.png").write_bytes(png(size=(2001, 10)))
    Image.new("I;16", (30, 20), 40_000).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (60, 30)).save(folder / "sideways.jpg", exif=exif)
    odd = {key: change for key, (change, _) in (NOT_WRITTEN | NOT_USED).items()} | WRITTEN
    records = [{"id": f"good-{n}", "image": "a.png", "conversations": [HUMAN, GPT]} for n in range(10 * len(odd))]
    for place, (key, change) in zip(range(4, len(records), 10), odd.items(), strict=True):
        records[place] = {name: value for name, value in (records[place] | {"id": key} | change).items()}
        if "messages" in change:
            del records[place]["conversations"]
    (folder / "chat.json").write_text(json.dumps(records))
    return folder / "chat.json"


def rejects(run: Path) -> dict[str, dict]:
    lines = map(json.loads, (run / "rejects.jsonl").read_text().splitlines())
    return {line["key"]: line for line in lines}


@pytest.fixture(scope="module")
def odd_run(tiny_models, tmp_path_factory):
    """(folder, output) after shard on two MPI ranks, lint, and both stages on two ranks."""
    folder = tmp_path_factory.mktemp("odd")
    source = write_source(folder / "source")
    program = [
        str(Path(sys.executable).with_name("mpirun")), "-n", "2", "--oversubscribe", sys.executable, "-m", "data_prep",
        "shard", "--source", "llava", "--input", str(source), "--output", str(folder / "data"),
        "--samples-per-shard", "40", "--held-out", "0", "--max-rejects", "0.1",
    ]  # fmt: skip
    said = run(program)
    said += python("-m", "data_prep", "lint", folder / "data")
    train = folder / "data" / "train"
    epoch = {"steps": None, "epochs": 1, "batch_size": 12, "micro_batch_size": 3}
    limits = {"max_length": 256, "max_bad_share": 0.1, "workers": 1}
    recipe = tiny_recipe(
        folder, tiny_models, KIND, train, data=limits, verbalize=epoch, interact=epoch, reinforce=epoch
    )
    said += deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    said += deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    return folder, said


def test_every_odd_record_is_counted_and_named(odd_run):
    folder, said = odd_run
    lines = [json.loads(line) for line in (folder / "data" / "rejects.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == {key: why for key, (_, why) in NOT_WRITTEN.items()}
    keys = ShardFolder(folder / "data" / "train").keys
    assert len(keys) == 10 * len(NOT_WRITTEN | NOT_USED | WRITTEN) - len(NOT_WRITTEN)
    assert set(keys) >= WRITTEN.keys() | NOT_USED.keys()
    assert "Traceback" not in said


def test_every_odd_sample_is_named_with_shard_and_reason(odd_run):
    folder, _ = odd_run
    found = rejects(folder / "run")
    assert found.keys() == NOT_USED.keys()
    for key, (_, reason) in NOT_USED.items():
        assert reason in found[key]["reason"] and found[key]["shard"].endswith(".tar"), found[key]
    lines = [json.loads(line)["key"] for line in (folder / "run" / "rejects.jsonl").read_text().splitlines()]
    assert lines.count("long-picture") >= 3, "verbalize, cache and at least one step of stage 2 have read it"
    manifest = json.loads((cache_folder(folder / "run") / "manifest.json").read_text())
    assert manifest["skipped"] == len(NOT_USED)


def test_evaluation_counts_them_and_a_trace_of_one_says_why(odd_run):
    folder, _ = odd_run
    data = folder / "data" / "train"
    python("-m", "pipeline", "evaluate", "--run", folder / "run", "--data", data, "--max-new-tokens", 4)
    results = json.loads((folder / "run" / "evaluation.json").read_text())
    for name in ("teacher", "untouched", "distilled"):
        rejected = {one["key"] for one in results[name]["rejected"]}
        assert results[name]["read"] == results[name]["samples"] + len(rejected) == len(ShardFolder(data))
        assert rejected == NOT_USED.keys()
    for sample, check in (("long-picture", 2), ("sideways", 0)):
        said = python(
            "-m", "pipeline", "trace", "--run", folder / "run", "--data", data, "--sample", sample, check=check
        )
        assert ("absolute aspect ratio" in said) == bool(check) and "Traceback" not in said


def test_text_alone_trains_and_the_projector_is_named(tiny_models, tmp_path):
    samples = [(key, {**record, "messages": [turn("user", "hi"), ANSWER]}, []) for key, record, _ in tiny.chats(16)]
    data = write(tmp_path / "train", samples)
    recipe = tiny_recipe(tmp_path, tiny_models, KIND, data, verbalize={"steps": 3}, interact={"steps": 3})
    said = deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    said += deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    assert "interact: no batch had an image, so" in said and "`train` without projector" in said
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    alone = ["--set", f"run={tmp_path / 'alone'}", "interact.steps=0", "train=[decoder,head]"]
    assert "no batch had an image" not in deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe, *alone)


@pytest.mark.parametrize("cut", ["student", "teacher"])
def test_a_sample_of_which_one_model_sees_less_is_rejected_by_both_stages(tiny_models, tmp_path, cut):
    """Processors that allow images of other sizes: the larger form of a large image is cut at max_length."""
    models = dict(tiny_models)
    other = tmp_path / cut
    subprocess.run(["cp", "-r", str(tiny_models[KIND, cut]), str(other)], check=True)
    for path in other.glob("*processor_config.json"):
        settings = json.loads(path.read_text())
        for section in (settings, settings.get("image_processor", {})):
            if "size" in section:
                section["size"] = {"shortest_edge": 784, "longest_edge": 56 * 56 * 16}
        path.write_text(json.dumps(settings))
    models[KIND, cut] = other
    samples = tiny.chats(16)
    samples[3] = ("large", {**samples[3][1], "messages": [ASK, turn("assistant", "ab" * 20)]}, [png(size=(224, 224))])
    data = write(tmp_path / "train", samples)
    epoch = {"steps": None, "epochs": 1, "batch_size": 8}
    sections = {"verbalize": epoch, "interact": epoch, "reinforce": {"steps": 0}}
    limits = {"max_length": 110, "max_bad_share": 0.1}
    recipe = tiny_recipe(tmp_path, models, KIND, data, data=limits, **sections)
    deepspeed(2, "train.py", "--stage", 1, "--recipe", recipe)
    assert rejects(tmp_path / "run").keys() == {"large"}
    (tmp_path / "run" / "rejects.jsonl").unlink()
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe)
    (line,) = rejects(tmp_path / "run").values()
    assert line["key"] == "large" and "cut at data.max_length" in line["reason"]


def test_an_error_of_one_rank_is_read_first_with_its_rank_and_exit_code_2(tiny_models, tmp_path):
    data = write(tmp_path / "train", tiny.chats(16))
    one_micro_step = {"batch_size": 8, "micro_batch_size": 4}  # so that no sample is read to estimate lengths
    recipe = tiny_recipe(tmp_path, tiny_models, KIND, data, interact={"steps": 0}, reinforce=one_micro_step)
    training = Training(steps=4, **one_micro_step)
    (update,) = micro_batches(DataOrder(16, derived_seed(0, "reinforce")), training, None, 0, 1, Ranks(1, 2))
    first = update[0]
    folder = ShardFolder(data)
    entry, place = folder.manifest["shards"][first[0].sample // 8], first[0].sample % 8
    with (data / entry["name"]).open("r+b") as shard:
        shard.seek(entry["offsets"][place])
        shard.write(b"\0" * 512)
    # As a manifest from before there were sums: with them a changed sample is rejected, and ends no job.
    older = [{name: value for name, value in shard.items() if name != "sums"} for shard in folder.manifest["shards"]]
    write_manifest(data, older, format=FORMAT, version=1, split="train")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_accelerators", "2",
         "--master_port", str(free_port()), "launch/train.py", "--stage", "2", "--recipe", str(recipe)],
        cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "rror" in line or "onnection" in line]
    assert (
        errors[0].startswith(f"rank 1 on {socket.gethostname()}: error: ") and folder.keys[first[0].sample] in errors[0]
    ), errors
    assert "onnection" not in done.stderr and "Traceback" not in done.stderr


def test_pictures_of_every_size_go_through(tiny_models):
    """What decodes, and is neither too thin for the processor nor too long for max_length, trains."""
    from pipeline.vlm.processing import ChatEncoder, load_processor

    encoder = ChatEncoder(load_processor(tiny_models[KIND, "student"]), 256)
    for width, height in [(1, 1), (1, 150), (3, 500), (640, 5)]:
        out = io.BytesIO()
        Image.new("RGB", (width, height)).save(out, "PNG")
        assert encoder("k", [ASK, ANSWER], [out.getvalue()]).response.any()
