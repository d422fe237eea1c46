"""Measuring on held-out data between two updates: every sample once, whatever the ranks, and nothing else changes."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from tiny import chats, write_data

from pipeline.errors import DataError
from pipeline.recipe.schema import StudentTraining
from pipeline.runtime.held_out import HeldOut, open_held_out
from pipeline.runtime.ranks import Ranks
from pipeline.steps.reinforce import Finetuned
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.processing import ChatEncoder, collate, load_processor

SAMPLES = 11


class PlainEngine:
    """What is asked of an Engine, without DeepSpeed."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.device, self.dtype = module, torch.device("cpu"), torch.float32
        self.train, self.eval = module.train, module.eval

    def __call__(self, *args, **options):
        return self.module(*args, **options)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "held_out", SAMPLES)


@pytest.fixture(scope="module")
def student(tiny_models):
    """A module in training mode, in which attention drops half of its weights at random."""
    folder = tiny_models["qwen2_vl", "student"]
    model = load_vlm(folder, torch.float32)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    module = Finetuned(model, model.lm_head.weight.shape[0]).train()
    return PlainEngine(module), ChatEncoder(load_processor(folder), 512)


def measuring(folder, engine, encoder, **training) -> HeldOut:
    settings = StudentTraining(steps=4, batch_size=4, evaluate_every=3, **training)
    return HeldOut("reinforce", settings, folder, encoder, partial(engine, score=True))


def test_it_is_the_loss_in_eval_mode_and_training_goes_on_as_if_nothing_had_been(held_out, student):
    engine, encoder = student
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    found = measuring(held_out, engine, encoder, micro_batch_size=3).measure(engine, Ranks(), workers=0)
    assert torch.equal(torch.rand(3), expected) and engine.module.training and torch.is_grad_enabled()
    batch = collate([encoder(k, r["messages"], i) for k, r, i in chats(SAMPLES)], encoder.filler(), 0)
    model = engine.module.backbone.eval()
    with torch.no_grad():
        logits = model(**batch.inputs).logits.double().flatten(0, 1)[batch.positions]
    engine.module.train()
    loss = float(torch.nn.functional.cross_entropy(logits, batch.labels))
    assert found == {"held_out_loss": pytest.approx(loss, rel=1e-6), "held_out_exact_match": 0.0}


@pytest.mark.parametrize("training", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"micro_batch_tokens": 100}])
@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_every_rank_runs_as_often_and_every_sample_is_read_once(held_out, student, monkeypatch, world, training):
    monkeypatch.setattr("pipeline.runtime.held_out.fit_lengths", length_of_a_sample)
    plans = [measuring(held_out, *student, **training).plan(Ranks(rank, world)) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    read = [index.sample for plan in plans for batch in plan for index in batch]
    assert sorted(read) == list(range(SAMPLES))


def length_of_a_sample(dataset, ranks, name):
    """In place of a fit, for which the ranks would have to meet."""
    from pipeline.runtime.data.lengths import LengthModel, feature_count

    return LengthModel((1.0,) * feature_count(dataset.folder), 0.0, 0.0, 0.0)


def test_what_cannot_be_used_is_left_out_and_said_once(tmp_path, student, capsys):
    engine, encoder = student
    half = measuring(write_data(tmp_path / "held_out", 6, good=2), engine, encoder, micro_batch_size=2)
    first, second = (half.measure(engine, Ranks(), workers=0) for _ in range(2))
    assert first == second and math.isfinite(first["held_out_loss"])
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("warning: reinforce: 3 of 6 samples of data.held_out cannot be used") and "s00001" in said


def test_data_that_cannot_be_used_at_all_is_no_loss_of_zero(tmp_path, student):
    bad = write_data(tmp_path / "held_out", 3)
    engine, encoder = student
    short = copy.copy(encoder)
    short.max_length = 1  # leaves no response token
    with pytest.raises(
        DataError, match=r"data.held_out: none of the 3 samples of .*held_out can be used; first s00000"
    ):
        measuring(bad, engine, short, micro_batch_size=2).measure(engine, Ranks(), workers=0)


def test_answers_that_are_cut_are_left_out_and_said_once(held_out, student, capsys):
    engine, encoder = student
    short = copy.copy(encoder)
    short.max_length = min(encoder(k, r["messages"], i).inputs["input_ids"].shape[1] for k, r, i in chats(SAMPLES)) - 2
    cut = measuring(held_out, engine, short, micro_batch_size=2)
    first, second = (cut.measure(engine, Ranks(), workers=0) for _ in range(2))
    assert first == second and set(first) == {"held_out_loss"}, "no answer is whole"
    *_, said = capsys.readouterr().out.splitlines()
    why = "samples of data.held_out: the last answer is cut at data.max_length: held_out_exact_match leaves them out"
    assert said.startswith("warning: reinforce: ") and said.endswith(why)


def test_it_is_due_every_so_many_updates_and_at_the_end(held_out, student):
    due = measuring(held_out, *student).is_due
    assert [update for update in range(1, 9) if due(update, 8)] == [3, 6, 8]
    none = StudentTraining(steps=1, batch_size=1)
    assert open_held_out("reinforce", none, held_out, student[1], partial(student[0], score=True)) is None
