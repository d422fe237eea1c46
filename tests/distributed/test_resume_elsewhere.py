"""A real step, with LoRA, that two ranks began, ended by one under another ZeRO stage, past two damaged checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from running import ROOT, deepspeed, tiny_recipe

from data_prep.shards import ShardFolder
from pipeline.results.status import status
from pipeline.runtime.checkpoint.files import read_index
from pipeline.runtime.checkpoint.same_data import data_state
from pipeline.runtime.folder import read_metrics

KIND, UPDATES, STOPPED = "qwen2_vl", 5, 4
COUNTS = ("update", "tokens", "learning_rate")


@pytest.fixture(scope="module")
def ended(tiny_models, tmp_path_factory):
    """The run's folder, its metrics when two ranks stopped, the names of their checkpoints, and what one rank said."""
    folder = tmp_path_factory.mktemp("elsewhere")
    data = tiny.write_data(folder / "data", 24, shards=2)
    training = {"steps": UPDATES, "keep_checkpoints": 3, "checkpoint_minutes": 0.000001, "lora_rank": 4}
    recipe = tiny_recipe(folder, tiny_models, KIND, data, interact={"steps": 0}, reinforce=training)
    run = folder / "run"
    deepspeed(2, "train.py", "--stage", 2, "--recipe", recipe, "--stop-after", STOPPED)
    assert set(status(run)[0][-1].losses) == {"cross_entropy"}, "what else a line has is no loss"
    before, checkpoints = read_metrics(run, "reinforce"), run / "reinforce" / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    index = read_index(checkpoints / "update_000000002")
    saved = index.parameters
    assert saved and all("lora_" in name for name in saved), "what is frozen is not saved"
    assert index.state["data"] == data_state(ShardFolder(data), UPDATES)
    _flip_a_bit(checkpoints / "update_000000004" / "rank_00001.safetensors")
    (checkpoints / "update_000000003" / "rank_00000.safetensors").unlink()
    other = ["--set", f"deepspeed={ROOT / 'ds_configs' / 'zero2.json'}"]
    said = deepspeed(1, "train.py", "--stage", 2, "--recipe", recipe, *other)
    return run, before, names, " ".join(said.split())


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_clock_of_rank_0_asks_for_checkpoints_and_the_newest_stay(ended):
    _, before, names, _ = ended
    assert names == ["update_000000002", "update_000000003", "update_000000004"]
    assert [line["checkpoint_s"] > 0 for line in before] == [False, True, True, True]


def test_damaged_checkpoints_are_named_and_passed_over(ended):
    _, _, _, said = ended
    assert "rank_00001.safetensors is damaged: its SHA-256 is not the one that checkpoint.json has" in said
    assert "update_000000003/rank_00000.safetensors cannot be read: No such file or directory" in said
    assert said.count("warning: ") == 2 and "reinforce: resumed after update 2 of 5" in said


def test_the_same_samples_give_the_same_losses_on_another_number_of_ranks(ended):
    """The fourth update's loss depends on the moments that were read; both sum in float32."""
    run, before, _, _ = ended
    after = read_metrics(run, "reinforce")
    assert [line["update"] for line in after] == list(range(1, UPDATES + 1)), "no gap, and no update twice"
    for ours, theirs in zip(after[2:], before[2:], strict=False):
        assert [ours[key] for key in COUNTS] == [theirs[key] for key in COUNTS]
        for key in ("cross_entropy", "gradient_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    assert (run / "student" / "model.safetensors").is_file() and not (run / "reinforce" / "checkpoints").exists()
