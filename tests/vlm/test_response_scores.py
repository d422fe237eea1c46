"""Scores of responses: the cross-entropy of transformers' own logits, and the answers that greedy decoding gives."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny import chats, turn

from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.processing import ChatEncoder, Encoded, collate, load_processor
from pipeline.vlm.response_scores import right_answers, score_responses
from pipeline.vlm.verbalizer import LanguageHead


@pytest.fixture(scope="module", params=["qwen2_vl", "llava_onevision"])
def student(request, tiny_models):
    folder = tiny_models[request.param, "student"]
    model = load_vlm(folder, torch.float32).eval()
    return model, LanguageHead(model, model.lm_head.weight.shape[0]), ChatEncoder(load_processor(folder), 512)


def with_own_answer(model, sample: Encoded) -> Encoded:
    """The sample with the model's greedy tokens in the places of its response, which is one run up to the end."""
    ids, places = sample.inputs["input_ids"].clone(), torch.nonzero(sample.response)[:, 0].tolist()
    for place in places:  # a whole forward each, as decoding without a cache
        with torch.no_grad():
            logits = model(**{**sample.inputs, "input_ids": ids}, use_cache=False).logits
        ids[0, place] = logits[0, place - 1].argmax()
    return replace(sample, inputs={**sample.inputs, "input_ids": ids})


def test_an_answer_is_right_where_greedy_decoding_gives_it(student):
    model, head, encoder = student
    theirs = [encoder(key, record["messages"], images) for key, record, images in chats(5)]
    ours = [with_own_answer(model, sample) for sample in theirs[:3]]
    batch = collate([*theirs, *ours], encoder.filler(), 0)
    nats, tokens, right, answers = score_responses(model, head, batch).tolist()
    with torch.no_grad():
        logits = model(**batch.inputs).logits.double().flatten(0, 1)[batch.positions]
    assert nats == pytest.approx(float(torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")), 1e-6)
    assert (tokens, right, answers) == (len(batch.labels), 3, 8)


def test_a_batch_of_nothing_but_the_filler_scores_nothing(student):
    model, head, encoder = student
    assert score_responses(model, head, collate([], encoder.filler(), 0)).tolist() == [0, 0, 0, 0]


def test_only_the_last_turn_counts():
    all_but = [[place != wrong for place in range(8)] for wrong in range(8)]
    #         two turns of the first sample, one of the second, and a third of a single token
    found = [right_answers(likeliest, (5, 2, 1), (3, 2, 1)) for likeliest in all_but]
    assert found == [3, 3, 2, 2, 2, 2, 2, 2]
    assert right_answers([True], (0, 1, 0), (0, 1, 0)) == 1
    assert right_answers([True] * 8, (5, 2, 1), (3, 0, 1)) == 2, "an answer that was cut is none"


CHAT = [
    turn("user", "Which colour?"),
    turn("assistant", "It is red."),
    turn("user", "Sure?"),
    turn("assistant", "Yes."),
]


def test_an_answer_that_max_length_cuts_is_not_scored(student):
    """Neither its beginning nor the turn before it stands for it: both are easier."""
    model, head, encoder = student
    whole = encoder("whole", CHAT, [])
    length = whole.inputs["input_ids"].shape[1]
    ends = {turn: int(torch.nonzero(whole.turns == turn)[-1]) + 1 for turn in (1, 3)}
    for max_length in range(ends[1], length + 1):
        cut = copy.copy(encoder)
        cut.max_length = max_length
        batch = collate([with_own_answer(model, cut("cut", CHAT, []))], encoder.filler(), 0)
        *_, right, answers = score_responses(model, head, batch).tolist()
        expected = 1 if max_length >= ends[3] else 0
        assert (right, answers) == (expected, expected), max_length
    assert collate([whole], encoder.filler(), 0).answers == (int((whole.turns == 3).sum()),)
