"""The parts of the step benchmark: what it refuses, and whether its pairs and data have the declared sizes."""

import sys
from dataclasses import replace

import pytest
import torch

from bench.steps import batches, pairs, run
from bench.steps.measures import operations_of
from data_prep.shards import ShardFolder
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime.data.batches import ChatDataset, SampleIndex
from pipeline.runtime.data.loader import load
from pipeline.vlm.assemble import encoders, vocabulary_rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="real shapes run here")
def test_real_shapes_are_refused_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["steps", "--shape", "real"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--shape real needs a GPU with 80 GB, and torch finds none" in capsys.readouterr().err


def test_a_pair_has_its_declared_sizes(monkeypatch, tmp_path):
    tiny = replace(
        pairs.RANDOM_PAIRS["real-2b"],
        teacher=pairs.Size(layers=4, width=64, inner=64, heads=4, kv_heads=2, rows=1100, tied=False),
        student=pairs.Size(layers=3, width=32, inner=64, heads=4, kv_heads=2, rows=1000),
        tower=pairs.Tower(blocks=1, width=16, heads=2, patch=14),
        teacher_layers=(1, 3),
        student_layers=(2,),
        image_side=6,
        samples=8,
    )
    monkeypatch.setitem(pairs.RANDOM_PAIRS, "tiny", tiny)
    pairs.prepare("tiny", tmp_path, "cpu")
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    assert [vocabulary_rows(model.path) for model in (recipe.teacher, recipe.student)] == [1100, 1000]
    chats = ChatDataset(ShardFolder(recipe.data.train), encoders(recipe, ["student"]))
    (loaded,) = load(chats, [[SampleIndex(index) for index in range(tiny.samples)]], 0, "cpu")
    batch = loaded.batches["student"]
    assert loaded.rejected == []
    image = chats.encoders["student"].processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (batch.inputs["input_ids"] == image).sum(1).tolist() == [tiny.image_side**2] * tiny.samples
    assert all(tiny.words[0] <= count - 1 <= tiny.words[1] for count in batch.counts)


def test_batches_of_before_are_counted_beside_sorted_ones():
    shares = batches.count_shares()
    layouts = [entry for entry in shares.values() if isinstance(entry, dict)]
    assert 800 < shares["mean_length"] < 1000 and len(layouts) == len(batches.LAYOUTS)
    assert all(0 < entry["before"]["real_share"] < entry["sorted"]["real_share"] <= 1 for entry in layouts)
    assert all(entry["before"]["micro_steps"] == entry["sorted"]["micro_steps"] for entry in layouts)
    for entry in layouts:
        padded, packed = entry["micro_batch_tokens"], entry["packed"]
        assert padded["real_share"] < packed["real_share"] <= 1 and packed["micro_steps"] <= padded["micro_steps"]


def test_packed_samples_are_counted_by_hand():
    """10 + 2 and 7 + 5 on two ranks; within 10 tokens two micro-steps: 10 and 7, then 5 and 2."""
    assert batches.packed_share([[2.0, 10.0, 5.0, 7.0]], 12, 2) == (1.0, 1.0)
    assert batches.packed_share([[2.0, 10.0, 5.0, 7.0]], 10, 2) == (24 / (2 * 10 + 2 * 5), 2.0)


def test_attention_is_counted_on_a_cpu_too():
    """Counted by hand, n x n x d per head: two products in the forward, five in the backward; fewer key/value heads."""
    heads, tokens, width = 4, 24, 16
    query = torch.randn(2, heads, tokens, width, requires_grad=True)
    key, value = (torch.randn(2, 2, tokens, width, requires_grad=True) for _ in range(2))

    def attend(backward):
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        if backward:
            output.sum().backward()

    product = 2 * 2 * heads * tokens * tokens * width
    assert operations_of(lambda: attend(False)) == 2 * product
    assert operations_of(lambda: attend(True)) == 7 * product
