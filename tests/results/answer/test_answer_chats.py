"""Answers and their probabilities against one sample at a time, recomputed naively."""

import copy
import math

import pytest
import torch
from ending_vlm import write_ending_vlm
from tiny import KINDS, THINKING_CHAT, chats, png, turn, write_vlm
from torch import Tensor

from data_prep.shards import RawSample
from pipeline.errors import SampleError
from pipeline.recipe.schema import Data
from pipeline.results.answer import chats as answering
from pipeline.results.answer.chats import Answerer
from pipeline.results.generate import Generated, Vlm, greedy_with_log_probs, load, unwritable_ids
from pipeline.vlm.processing import TOKEN_KEYS

NEW = 16
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module", params=KINDS)
def vlm(request, tmp_path_factory) -> Vlm:
    folder = write_ending_vlm(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return load(folder, Data(train="x", max_length=512))


def sample(key: str, images: list[bytes], *messages: dict) -> RawSample:
    return RawSample(key, {"id": key, "messages": list(messages), "provenance": {}, "question_type": "t"}, images)


def samples(count: int = 12) -> list[RawSample]:
    return [RawSample(*one) for one in chats(count)]


def plain_generate(vlm: Vlm, messages, images) -> list[int]:
    """transformers' own generate() on one prompt."""
    prompt = vlm.encoder.prompt(messages, images)
    out = vlm.model.generate(
        **prompt, do_sample=False, max_new_tokens=NEW, eos_token_id=vlm.stop_ids(), suppress_tokens=unwritable_ids(vlm)
    )
    return out[0, prompt["input_ids"].shape[1] :].tolist()


def forced(vlm: Vlm, model, messages, images, ids: list[int]) -> float:
    """log p of the ids after the prompt, by one forward over all of it, summed in float64."""
    new = torch.tensor([ids])
    more = {"input_ids": new, "attention_mask": torch.ones_like(new)}
    dtype = next(model.parameters()).dtype

    def extend(name: str, value: Tensor) -> Tensor:
        if name in TOKEN_KEYS:
            return torch.cat([value, more.get(name, torch.zeros_like(new))], 1)
        return value.to(dtype) if value.is_floating_point() else value

    inputs = {name: extend(name, value) for name, value in vlm.encoder.prompt(messages, images).items()}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, -len(ids) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(ids)), ids].double().sum())


def test_a_batch_is_answered_as_each_sample_alone(vlm):
    """log_prob is as near to float64 as a plain float32 forward, but for the rounding of T sums of exponentials."""
    truth_model, used = copy.deepcopy(vlm.model).double(), 0
    for raw, result in zip(samples(), Answerer(vlm, NEW)(samples()), strict=True):
        question = raw.record["messages"][:1]
        ids = plain_generate(vlm, question, raw.images)
        if isinstance(result, SampleError):
            continue
        used += 1
        text = vlm.tokenizer.decode(ids[:-1]).strip()
        (entry,) = result["answered"]
        assert result["messages"] == [*question, turn("assistant", text)]
        assert (entry["given"], entry["tokens"]) == (raw.record["messages"][1]["content"][0]["text"], len(ids))
        truth = forced(vlm, truth_model, question, raw.images, ids)
        naive = forced(vlm, vlm.model, question, raw.images, ids)
        rounding = len(ids) * 8 * torch.finfo(torch.float32).eps * math.log(len(vlm.tokenizer))
        assert abs(entry["log_prob"] - truth) <= abs(naive - truth) + rounding
    assert used >= 3


def test_each_rejected_answer_has_its_reason(vlm):
    reasons = set()
    for raw, result in zip(samples(), Answerer(vlm, NEW)(samples()), strict=True):
        ids = plain_generate(vlm, raw.record["messages"][:1], raw.images)
        text = vlm.tokenizer.decode(ids[:-1]).strip()
        control = [token for token in vlm.tokenizer.all_special_tokens if token in text]
        if isinstance(result, SampleError):
            reasons.add(str(result))
            if ids[-1] not in vlm.stop_ids():
                assert str(result) == f"answer not finished within --max-new-tokens {NEW} tokens"
            else:
                assert str(result).startswith("unusable answer: the text contains the tokenizer's control token <|")
                assert control
        else:
            assert ids[-1] in vlm.stop_ids() and text and not control
    assert f"answer not finished within --max-new-tokens {NEW} tokens" in reasons


def test_turns_are_answered_after_the_models_own_answers(vlm):
    two = [
        sample(f"two{i}", [png(seed=i), png(seed=50 + i)],
               turn("system", "be brief"), turn("user", "<image>", f"what is {i}?"), turn("assistant", "given one"),
               turn("user", "<image>", "and this?"), turn("assistant", "given two"), turn("user", "thanks"))
        for i in range(8)
    ]  # fmt: skip
    mixed = [*samples(4), *two]
    used = 0
    for raw, result in zip(mixed, Answerer(vlm, NEW)(mixed), strict=True):
        if isinstance(result, SampleError) or len(result["answered"]) < 2:
            continue
        used += 1
        messages = list(raw.record["messages"])
        for index, entry in zip((2, 4), result["answered"], strict=True):
            before = messages[:index]
            ids = plain_generate(vlm, before, raw.images[: index // 2])
            assert entry["given"] == f"given {('one', 'two')[index // 4]}"
            assert entry["log_prob"] == pytest.approx(
                forced(vlm, vlm.model, before, raw.images[: index // 2], ids), rel=1e-5
            )
            messages[index] = turn("assistant", vlm.tokenizer.decode(ids[:-1]).strip())
        assert result["messages"] == messages
        assert result["question_type"] == "t"
    assert used >= 2


def test_batch_size_changes_no_answer(vlm):
    answerer = Answerer(vlm, NEW)
    together = answerer(samples())
    for one, raw in zip(together, samples(), strict=True):
        (alone,) = answerer([raw])
        assert str(alone) == str(one) if isinstance(one, SampleError) else alone["messages"] == one["messages"]


def test_a_banned_id_is_not_generated_and_keeps_its_share_of_the_probability(vlm):
    messages = [turn("user", "what is it?")]
    prompt = vlm.encoder.prompt(messages, [])
    with torch.no_grad():
        likeliest, second = vlm.model(**prompt).logits[0, -1].topk(2).indices.tolist()
    (answer,) = greedy_with_log_probs(vlm, prompt, 1, [likeliest])
    assert answer.ids == [second]
    assert answer.log_prob == pytest.approx(forced(vlm, vlm.model, messages, [], [second]), rel=1e-5)


def test_placeholders_and_rows_that_are_no_token_are_banned(tmp_path):
    padded = load(write_vlm(tmp_path, "qwen2_vl", 2, 32, rows=300), Data(train="x", max_length=512))
    ids = padded.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    assert unwritable_ids(padded) == [*sorted(ids), *range(len(padded.tokenizer), 300)]


@pytest.mark.parametrize(
    ("images", "messages", "reason"),
    [
        ([b"no"], [turn("user", "<image>", "?"), turn("assistant", "a")], "image cannot be decoded"),
        (
            [],
            [turn("user", "x" * 600), turn("assistant", "a")],
            r"the question takes \d+ tokens, and max_length is 512",
        ),
        ([], [turn("user", "?")], "no assistant turn"),
        ([], [turn("assistant", "a"), turn("user", "?")], "begins with an assistant turn"),
        ([], [turn("user", "<|im_end|>"), turn("assistant", "a")], r"control token <\|im_end\|>"),
    ],
)
def test_a_sample_that_cannot_be_asked_is_rejected_and_its_batch_goes_on(vlm, images, messages, reason):
    answerer = Answerer(vlm, NEW)
    expected = answerer(samples(3))
    *others, bad = answerer([*samples(3), sample("bad", images, *messages)])
    with pytest.raises(SampleError, match=reason):
        raise bad
    assert [str(one) for one in others] == [str(one) for one in expected]


def test_an_answer_of_nothing_is_rejected(vlm):
    first = {plain_generate(vlm, raw.record["messages"][:1], raw.images)[0] for raw in samples(3)}
    config = vlm.model.generation_config
    usual, config.eos_token_id = config.eos_token_id, sorted(first)
    try:
        assert [str(one) for one in Answerer(vlm, NEW)(samples(3))] == ["empty answer"] * 3
    finally:
        config.eos_token_id = usual


def test_the_thinking_block_of_the_chat_template_is_no_part_of_the_answer(vlm, monkeypatch):
    template = vlm.encoder.processor.chat_template
    image = template.partition("=='image' %}")[2].partition("{%")[0]
    monkeypatch.setattr(vlm.encoder.processor, "chat_template", THINKING_CHAT.replace(IMAGE, image))
    for said, expected in (("\n</think>\n\nred", "red"), ("hm\n</think>\n\na</think> b", "b"), ("red", "red")):
        generated = Generated(vlm.tokenizer(f"{said}<|im_end|>").input_ids, -1.0, ended=True)
        monkeypatch.setattr(answering, "greedy_with_log_probs", lambda *_, made=generated: [made])
        (result,) = Answerer(vlm, NEW)(samples(1))
        assert result["messages"][-1] == turn("assistant", expected), said
    empty = Generated(vlm.tokenizer("hm\n</think>\n\n<|im_end|>").input_ids, -1.0, ended=True)
    monkeypatch.setattr(answering, "greedy_with_log_probs", lambda *_: [empty])
    assert str(Answerer(vlm, NEW)(samples(1))[0]) == "empty answer"


def test_outputs_that_are_not_finite_are_rejected(vlm):
    broken = copy.deepcopy(vlm.model)
    with torch.no_grad():
        broken.lm_head.weight[70] = float("nan")
    results = Answerer(Vlm(broken, vlm.encoder, vlm.device, vlm.dtype), NEW)(samples(2))
    assert [str(one) for one in results] == ["the model's outputs are not finite"] * 2
