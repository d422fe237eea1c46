"""A cache made beside a student of more rows, for one of fewer: it is compared as beside the teacher."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from running import cache_folder, deepspeed, tiny_recipe
from safetensors.torch import load_file

from data_prep.shards import ShardFolder
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime.data.batches import DataOrder, derived_seed
from pipeline.vlm.assemble import encoders, shared_vocabulary
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.processing import collate

KIND, SAMPLES = "qwen2_vl", 8
LONG = 5 * "ab"
ROWS = {"teacher": 300, "first": 290, "smaller": 270}


def last_layer(folder, recipe, encoder, vocab: int) -> torch.Tensor:
    """[T, V'] float64: log-probabilities of an untouched model's last layer in the first update of interact."""
    data, order = ShardFolder(recipe.data.train), DataOrder(SAMPLES, derived_seed(recipe.seed, "interact"))
    raw = [data.read(order[position].sample) for position in range(recipe.interact.batch_size)]
    encoded = [encoder(one.key, one.record["messages"], one.images) for one in raw]
    batch = collate(encoded, encoder.filler(), 0)
    with torch.no_grad():
        logits = load_vlm(folder, torch.float32).eval()(**batch.inputs).logits
    return logits.flatten(0, 1)[batch.positions, :vocab].double().log_softmax(-1)


def test_its_loss_is_over_the_ids_that_it_has_in_common_with_the_teacher(tmp_path):
    """Its first loss, of the last layers, against the dense KL of both models over their common ids in float64."""
    data = tiny.write_data(tmp_path / "data", SAMPLES, shards=2)
    depths = {"teacher": 6, "first": 3, "smaller": 3}
    made = {
        name: tiny.write_vlm(tmp_path / name, KIND, depth, 32, seed=depth, rows=ROWS[name])
        for name, depth in depths.items()
    }
    models = {(KIND, "teacher"): made["teacher"], (KIND, "student"): made["first"]}
    few = {"steps": 2, "batch_size": 4}
    exact = {"codec": {"name": "hidden"}}
    first = tiny_recipe(tmp_path, models, KIND, data, verbalize=few, interact=few, reinforce={"steps": 0}, cache=exact)
    deepspeed(1, "train.py", "--stage", 1, "--recipe", first)
    run, base = tmp_path / "smaller_run", tmp_path / "run"
    own = ["--set", f"run={run}", f"cache_from={base}", f"student.path={made['smaller']}"]
    said = " ".join(deepspeed(1, "train.py", "--stage", 1, "--recipe", first, *own).split())
    assert "over 290 ids, of which this student has the first 270: the other 20 get no probability" in said
    assert json.loads((run / "verbalize" / "done.json").read_text())["vocab"] == 270
    assert json.loads((cache_folder(base) / "cache.json").read_text())["vocab"] == 290
    deepspeed(1, "train.py", "--stage", 2, "--recipe", run / "recipe.yaml")
    recipe = load_recipe(run / "recipe.yaml").recipe
    both = encoders(recipe, ["teacher", "student"])
    assert shared_vocabulary(recipe, both).size == 270, "as it would be beside the teacher"
    log_p, log_q = (last_layer(getattr(recipe, role).path, recipe, both[role], 270) for role in both)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first_update = next(line for line in lines if line["step"] == "interact")
    assert first_update["last"] == pytest.approx(float(kl), rel=1e-4)
    assert load_file(run / "student" / "model.safetensors")["lm_head.weight"].shape[0] == 270


def test_a_sample_with_a_token_that_the_teacher_lacks_is_left_out(tmp_path):
    """In verbalize on another run's cache, where the student is alone, and in interaction's held-out data."""
    data = tiny.write_data(tmp_path / "data", SAMPLES, shards=2)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens([LONG])
    made = {
        name: tiny.write_vlm(tmp_path / name, KIND, depth, 32, seed=depth, rows=300, tokenizer=of)
        for name, depth, of in (("teacher", 6, None), ("first", 3, None), ("own", 3, tokenizer))
    }
    models = {(KIND, "teacher"): made["teacher"], (KIND, "student"): made["first"]}
    few = {"steps": 2, "batch_size": 8}
    measured = few | {"evaluate_every": 1}
    first = tiny_recipe(
        tmp_path, models, KIND, data, verbalize=few, interact=measured, reinforce={"steps": 0},
        data={"max_bad_share": 1.0, "held_out": str(data)},
    )  # fmt: skip
    deepspeed(1, "train.py", "--stage", 1, "--recipe", first)
    run = tmp_path / "own_run"
    own = ["--set", f"run={run}", f"cache_from={tmp_path / 'run'}", f"student.path={made['own']}"]
    deepspeed(1, "train.py", "--stage", 1, "--recipe", first, *own)
    said = " ".join(deepspeed(1, "train.py", "--stage", 2, "--recipe", run / "recipe.yaml").split())
    long = [key for key, record, _ in tiny.chats(SAMPLES) if LONG in record["messages"][1]["content"][0]["text"]]
    assert 0 < len(long) < SAMPLES
    rejected = [json.loads(line) for line in (run / "rejects.jsonl").read_text().splitlines()]
    by_reason = {one["key"]: one["reason"] for one in rejected[: len(long)]}
    assert by_reason == dict.fromkeys(long, "the response has token 265; teacher and student share the first 265 alone")
    assert f"{len(long)} of {SAMPLES} samples of data.held_out cannot be used and are not measured on; first" in said
    assert (run / "interact" / "done.json").is_file()
