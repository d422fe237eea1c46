"""The peers train the same weights on the same tokens with the same loss as ours; see `python -m bench.peers`."""

import json
from pathlib import Path

import pytest
import torch

from bench.gpu.trainer import full_labels
from bench.peers import methods, table
from bench.peers.chats import Collator, read
from bench.peers.settings import frozen_tower
from data_prep.__main__ import main as data_prep
from data_prep.shards import ShardFolder
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime.data.batches import ChatDataset, SampleIndex
from pipeline.runtime.data.loader import load
from pipeline.vlm.assemble import encoders
from pipeline.vlm.backbone import load_student
from pipeline.vlm.processing import load_processor

ROOT = Path(__file__).parents[3]
COUNT = 4
PUZZLES = methods.PAIRS["puzzles"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "data"
    command = ["shard", "--source", "puzzles", "--count", str(COUNT), "--held-out-count", "1", "--output", str(folder)]
    assert data_prep(command) == 0
    return folder / "train"


def test_the_peers_batch_is_ours_and_so_are_the_weights_that_train(shards, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(Path(PUZZLES.task.recipe), [f"data.train={shards}"]).recipe
    chats = ChatDataset(ShardFolder(shards), encoders(recipe, ["student"]))
    (rank,) = load(chats, [[SampleIndex(index) for index in range(COUNT)]], 0, "cpu")
    ours = rank.batches["student"]
    theirs = Collator(load_processor(PUZZLES.model("student")))(list(read(shards)))
    for row, labels in enumerate(full_labels(ours)[:COUNT]):
        mine, peer = ours.inputs["input_ids"][row], theirs["input_ids"][row]
        length = int(theirs["attention_mask"][row].sum())
        assert torch.equal(mine[:length], peer[:length])
        assert torch.equal(labels[labels != -100], theirs["labels"][row][theirs["labels"][row] != -100])
    student = load_student(PUZZLES.model("student"), torch.float32, recipe, recipe.reinforce)
    trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
    peers = frozen_tower(PUZZLES.model("student"))
    assert {name for name, weight in peers.named_parameters() if weight.requires_grad} == trained
    with torch.no_grad():
        loss = peers(**theirs).loss  # the mean over the response tokens, as ours divides
    tokens = int((theirs["labels"] != -100).sum())
    logits = peers(**{key: value for key, value in theirs.items() if key != "labels"}).logits.double()
    log_probs = logits[:, :-1].log_softmax(-1)
    wanted = theirs["labels"][:, 1:]
    picked = log_probs.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    naive = -(picked * (wanted != -100)).sum() / tokens
    torch.testing.assert_close(loss.double(), naive.detach(), rtol=1e-5, atol=0)
    assert tokens == len(ours.labels)


@pytest.mark.parametrize("name", methods.PAIRS)
def test_commands_and_lines(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    pair = methods.PAIRS[name]
    size = pair.sizes["full"]
    for method in methods.METHODS:
        command = methods.train_command(pair, method, size.updates, 0, Path("place"), method.name)
        assert command[0] in ("-m", "launch/train.py")
        assert ("stage_1" in " ".join(command)) == method.stage_1
        assert str(pair.model("student")) in command or pair.task.recipe in command
    by_name = {method.name: methods.lines_written(pair, method) for method in methods.METHODS}
    assert by_name["trainer_finetune"] < by_name["trainer_gkd_loss"]
    assert by_name["ours_interaction"] == by_name["ours_finetune"] + 1


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("peers*.json")), ids=lambda path: path.stem)
def test_the_page_has_the_table_of_the_committed_results(path):
    assert table.table(json.loads(path.read_text())) in table.PAGE.read_text(encoding="utf-8")
