"""What a rank holds while verb-FFNs are made, and that their values depend on neither the ranks nor the ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from running import deepspeed, tiny_recipe
from safetensors.torch import load_file

from pipeline.vlm.verb_ffns import initial_verb_ffns, save_verb_ffns

KIND, WIDTH, LAYERS, SEED = "qwen2_vl", 128, (1, 2, 3, 4, 5, 6, 7), 5
PROBE = "../tests/distributed/loading_probe.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    folder = tiny.write_vlm(tmp_path_factory.mktemp("models") / "student", KIND, 8, WIDTH)
    return dict.fromkeys([(KIND, "teacher"), (KIND, "student")], folder)


def drawn() -> dict[str, torch.Tensor]:
    return initial_verb_ffns(LAYERS, WIDTH, "residual", torch.float32, SEED).state_dict()


def load(folder: Path, models: dict, ranks: int, zero: str) -> list[dict]:
    """Check the values of drawn and stored verb-FFNs; returns what each rank held."""
    expected = {"drawn": drawn(), "stored": {name: v + torch.randn_like(v) for name, v in drawn().items()}}
    save_verb_ffns(expected["stored"], folder / "verbalize" / "student.safetensors")
    student = {"layers": list(LAYERS)}
    recipe = tiny_recipe(folder, models, KIND, folder, zero, seed=SEED, student=student)
    deepspeed(ranks, PROBE, recipe, folder / "verbalize" / "student.safetensors", folder)
    found = load_file(folder / "values.safetensors")
    assert len(found) == sum(map(len, expected.values()))
    for source, values in expected.items():
        for name, value in values.items():
            assert torch.equal(found[f"{source}.{name}"], value), (source, name)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def test_on_one_rank_without_zero_values_are_the_seed_s_or_the_file_s(models, tmp_path):
    """`load` compares the values; the one rank keeps all of them."""
    (of_rank,) = load(tmp_path, models, 1, "zero0")
    assert all(told["kept"] >= told["all"] for told in of_rank.values())


def test_on_two_ranks_they_are_the_same_and_neither_rank_ever_holds_them_all(models, tmp_path):
    """Each rank keeps its half, and beside it never more than the verb-FFN that is being made (and a matrix)."""
    for of_rank in load(tmp_path, models, 2, "zero3_cpu"):
        for told in of_rank.values():
            assert told["all"] / 2 <= told["kept"] <= told["all"] / 2 * 1.01
            assert told["peak"] <= told["all"] / 2 + told["whole"] * 4 / 3 < told["all"] * 0.8
