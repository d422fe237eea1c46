"""The parts of a tiny run folder: shards, random verbalizers, a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import turn

from data_prep.shards import FORMAT, write_manifest, write_shard
from pipeline.vlm.verb_ffns import initial_verb_ffns

LAYERS = {"teacher": (1, 2, 3), "student": (1, 2)}
DEPTH = {"teacher": 5, "student": 3}
WIDTH = {"teacher": 32, "student": 16}


def write_shards(folder: Path, samples) -> Path:
    folder.mkdir(parents=True)
    members = (
        (key, {"json": json.dumps(record).encode()} | {f"{i}.png": data for i, data in enumerate(images)})
        for key, record, images in samples
    )
    write_manifest(folder, [write_shard(folder / "000000.tar", members)], format=FORMAT, version=1, split=folder.name)
    return folder


def flip_a_bit(folder: Path, sample: int) -> None:
    """Of a sample in the first shard: in its record, behind the tar header."""
    entry = json.loads((folder / "manifest.json").read_text())["shards"][0]
    content = bytearray((folder / entry["name"]).read_bytes())
    content[entry["offsets"][sample] + 520] ^= 1
    (folder / entry["name"]).write_bytes(content)


def typed(samples):
    """Every other sample has another type; every third one has an earlier turn before the question."""
    for index, (key, record, images) in enumerate(samples):
        messages = list(record["messages"])
        if index % 3 == 0:
            messages = [messages[0], turn("assistant", "hm"), turn("user", "say it again?"), messages[1]]
        yield key, {**record, "messages": messages, "question_type": ("colour", "shape")[index % 2]}, images


def write_verb_ffns(path: Path, role: str, moved: bool) -> None:
    ffns = initial_verb_ffns(LAYERS[role], WIDTH[role], "residual", torch.float32, seed=3)
    if moved:  # as after training: W_down is no longer zero
        for block in ffns.values():
            torch.nn.init.normal_(block.down.weight, std=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(ffns.state_dict(), path)


def write_recipe(run: Path, root: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    training = "{steps: 3, batch_size: 4}"
    (run / "recipe.yaml").write_text(
        f"run: {run}\n"
        f"data: {{train: {root}/shards/train, held_out: {root}/shards/held_out, max_length: 512}}\n"
        f"teacher: {{path: {root}/teacher, layers: {list(LAYERS['teacher'])}}}\n"
        f"student: {{path: {root}/student, layers: {list(LAYERS['student'])}}}\n"
        f"verbalize: {training}\ninteract: {training}\nreinforce: {training}\n"
    )
