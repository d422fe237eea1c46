"""Traces against naive computations with transformers' own hidden states."""

import pytest
import torch
from tiny import KINDS, png, turn, write_vlm
from torch.nn import functional as F

from pipeline.recipe.schema import Data
from pipeline.results.generate import Vlm, greedy, load
from pipeline.results.trace.layers import generate_from_layer, predict_along, trace
from pipeline.vlm.families import decoder_layers, final_norm, lm_head
from pipeline.vlm.processing import TOKEN_KEYS
from pipeline.vlm.verb_ffns import initial_verb_ffns
from pipeline.vlm.verbalizer import VerbalizedVLM

LAYERS = (1, 3)


def traced_model(folder, kind: str, trained: bool, rows: int = 0) -> tuple[Vlm, VerbalizedVLM]:
    vlm = load(write_vlm(folder, kind, 4, 32, rows=rows), Data(train="x", max_length=512))
    ffns = initial_verb_ffns(LAYERS, 32, "residual", torch.float32, seed=1)
    if trained:
        for block in ffns.values():
            torch.nn.init.normal_(block.down.weight, std=1.0)
    return vlm, VerbalizedVLM(vlm.model, LAYERS, ffns, vocab=len(vlm.tokenizer))


@pytest.fixture(scope="module", params=KINDS)
def untrained(request, tmp_path_factory):
    return traced_model(tmp_path_factory.mktemp(request.param), request.param, trained=False)


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    return traced_model(tmp_path_factory.mktemp(request.param), request.param, trained=True)


def prompt_of(vlm: Vlm):
    return vlm.encoder.prompt([turn("user", "<image>", "what comes next?")], [png(seed=5)])


def extended(prompt, ids):
    new = torch.tensor([list(ids)])
    more = {"input_ids": new, "attention_mask": torch.ones_like(new)}
    return {
        k: torch.cat([v, more.get(k, torch.zeros_like(new))], 1) if k in TOKEN_KEYS else v for k, v in prompt.items()
    }


@torch.no_grad()
def naive(vlm: Vlm, side: VerbalizedVLM, inputs, layer: int) -> torch.Tensor:
    """[S, V] verbalized probabilities at every position, from transformers' own hidden_states and logits."""
    out = vlm.model(**inputs, output_hidden_states=True, use_cache=False)
    if layer == side.depth:
        return out.logits[0, :, : len(vlm.tokenizer)].softmax(-1)
    h = out.hidden_states[layer][0]
    block = side.verb_ffns[str(layer)]
    n = F.rms_norm(h, (h.shape[-1],), block.norm.weight, 1e-6)
    h = h + (F.silu(n @ block.gate.weight.T) * (n @ block.up.weight.T)) @ block.down.weight.T
    return lm_head(vlm.model)(final_norm(vlm.model)(h))[:, : len(vlm.tokenizer)].softmax(-1)


def logit_lens(vlm: Vlm, inputs, layer: int) -> torch.Tensor:
    with torch.no_grad():
        h = vlm.model(**inputs, output_hidden_states=True).hidden_states[layer][0]
        return lm_head(vlm.model)(final_norm(vlm.model)(h))[:, : len(vlm.tokenizer)].softmax(-1)


def test_untrained_verbalizers_equal_the_logit_lens(untrained):
    vlm, side = untrained
    prompt, answer = prompt_of(vlm), [70, 71, 72]
    begin = prompt["input_ids"].shape[1] - 1
    for layer, along in zip(LAYERS, predict_along(vlm, side, prompt, answer), strict=False):
        expected = logit_lens(vlm, extended(prompt, answer), layer)[begin : begin + 3]
        assert [prediction.token for prediction in along] == expected.argmax(-1).tolist()
        assert torch.allclose(
            torch.tensor([prediction.probability for prediction in along]), expected.amax(-1), atol=1e-6
        )


def test_reading_along_equals_the_naive_way_at_every_layer(trained):
    vlm, side = trained
    prompt, answer = prompt_of(vlm), [80, 13, 256]
    begin = prompt["input_ids"].shape[1] - 1
    found = predict_along(vlm, side, prompt, answer)
    assert len(found) == 3
    for layer, along in zip(side.all_layers(), found, strict=True):
        expected = naive(vlm, side, extended(prompt, answer), layer)[begin : begin + 3]
        assert [prediction.token for prediction in along] == expected.argmax(-1).tolist()
        assert torch.allclose(
            torch.tensor([prediction.probability for prediction in along]), expected.amax(-1), atol=1e-6
        )


def test_each_layers_own_answer_equals_feeding_back_its_own_tokens(trained):
    vlm, side = trained
    prompt = prompt_of(vlm)
    answers = set()
    for layer in side.all_layers():
        ids: list[int] = []
        for step in generate_from_layer(vlm, side, prompt, layer, 6):
            expected = naive(vlm, side, extended(prompt, ids) if ids else prompt, layer)[-1]
            expected[vlm.placeholder_ids()] = 0
            assert step.token == int(expected.argmax())
            assert step.probability == pytest.approx(float(expected.max()), abs=1e-6)
            ids.append(step.token)
        answers.add(tuple(ids))
    assert len(answers) == 3, "the layers of this test should give different answers"


def test_the_last_layers_own_answer_is_the_models(trained):
    vlm, side = trained
    predictions = generate_from_layer(vlm, side, prompt_of(vlm), side.depth, 8)
    assert [one.token for one in predictions] == greedy(vlm, prompt_of(vlm), 8)[0]


def test_rows_that_only_pad_the_vocabulary_are_never_generated(tmp_path):
    vlm, side = traced_model(tmp_path, "qwen2_vl", trained=True, rows=2000)
    vocab = len(vlm.tokenizer)
    found = trace("teacher", vlm, side, prompt_of(vlm), 4)
    assert all(prediction.token < vocab for layer in found.layers for prediction in (*layer.along, *layer.free))
    assert max(greedy(vlm, prompt_of(vlm), 4)[0]) >= vocab, (
        "without the limit these random weights generate padding ids"
    )


def test_free_answers_stop_at_the_end_of_turn_and_hooks_go_away(trained):
    vlm, side = trained
    hooks = [len(layer._forward_hooks) for layer in decoder_layers(vlm.model)]
    first = generate_from_layer(vlm, side, prompt_of(vlm), 1, 4)
    vlm.model.generation_config.eos_token_id = [first[1].token]
    try:
        ended = generate_from_layer(vlm, side, prompt_of(vlm), 1, 4)
    finally:
        vlm.model.generation_config.eos_token_id = 256
    assert ended[-1].ends and not any(one.ends for one in ended[:-1])
    assert [one.token for one in ended] == [one.token for one in first][: len(ended)]
    assert [len(layer._forward_hooks) for layer in decoder_layers(vlm.model)] == hooks


def test_a_trace_holds_every_layer_the_last_one_last(trained):
    vlm, side = trained
    found = trace("teacher", vlm, side, prompt_of(vlm), 5)
    assert [one.layer for one in found.layers] == [1, 3, 4]
    assert all(len(one.along) == len(found.answer) for one in found.layers)
    last = found.layers[-1]
    assert [prediction.token for prediction in last.along] == [prediction.token for prediction in last.free]
    assert (
        last.text
        == vlm.tokenizer.decode([prediction.token for prediction in last.free], skip_special_tokens=True).strip()
    )
