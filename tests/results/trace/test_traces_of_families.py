"""A trace of a tiny pair of each family that both stages are tested with, as a page: one process, random weights."""

from __future__ import annotations

import json

import pytest
from tiny import KINDS, chats, write_vlm
from tiny_families import FAMILIES, as_parameter, write_family
from tiny_run import LAYERS, WIDTH, write_recipe, write_shards, write_verb_ffns

from pipeline.__main__ import main
from pipeline.runtime.folder import mark_done

ALWAYS = (*KINDS, "gemma3", "qwen3_vl_moe")
DEPTH, SHALLOW = 4, 3
"""Decoder layers of teachers and of students."""


def write_pair(root, kind: str) -> None:
    """Teacher and both students, as wide as the verbalizers of tiny_run are."""
    for folder, role, layers in (
        ("teacher", "teacher", DEPTH), ("student", "student", SHALLOW), ("run/student", "student", SHALLOW),
    ):  # fmt: skip
        if kind in KINDS:
            write_vlm(root / folder, kind, layers, WIDTH[role])
        else:
            write_family(root / folder, kind, layers, WIDTH[role])


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ALWAYS else as_parameter(kind, pytest.mark.families)
        for kind in dict.fromkeys((*KINDS, *FAMILIES))
    ],
)
def test_a_pair_of_each_family_can_be_traced(kind, tmp_path):
    run = tmp_path / "run"
    write_pair(tmp_path, kind)
    write_shards(tmp_path / "shards" / "held_out", chats(2, seed=1))
    for role in ("teacher", "student"):
        write_verb_ffns(run / "verbalize" / f"{role}.safetensors", role, moved=True)
    mark_done(run / "verbalize", {"updates": 3, "losses": {}})
    write_recipe(run, tmp_path)
    page, file = tmp_path / "trace.html", tmp_path / "trace.json"
    arguments = ["trace", "--run", str(run), "--sample", "s00000", "--max-new-tokens", "2"]
    assert main([*arguments, "--page", str(page), "--json", str(file)]) == 0
    (question,) = json.loads(file.read_text())["questions"]
    layers = {model["name"]: [layer["layer"] for layer in model["layers"]] for model in question["models"]}
    student = [*LAYERS["student"], SHALLOW]
    assert layers == {"teacher": [*LAYERS["teacher"], DEPTH], "untouched": student, "distilled": student}
    last = [reading for model in question["models"] for reading in model["layers"][-1]["along"]]
    assert all(reading["divergence"] == pytest.approx(0, abs=1e-6) for reading in last), "the last layer is the model"
    assert "data:image/png" in page.read_text() or "[image]" not in question["question"]
