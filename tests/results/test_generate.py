import pytest
import torch
from tiny import KINDS, chats, png, turn, write_vlm

from pipeline.errors import RecipeError
from pipeline.recipe.schema import Data
from pipeline.results.generate import Vlm, greedy, load, pad_left


@pytest.fixture(scope="module", params=KINDS)
def vlm(request, tmp_path_factory) -> Vlm:
    return load(
        write_vlm(tmp_path_factory.mktemp(request.param), request.param, 3, 32), Data(train="x", max_length=512)
    )


def prompts(vlm: Vlm, pictures: bool):
    questions = [
        ([turn("user", "<image>", "what is it?")], [png(seed=1)]),
        ([turn("user", "just words, and more of them than in the others")], []),
        ([turn("user", "<image>", "<image>", "compare")], [png(seed=2), png(seed=3, size=(100, 40))]),
    ]
    return [vlm.encoder.prompt(*question) for question in questions if pictures or not question[1]]


def naive(vlm: Vlm, prompt, count: int) -> list[int]:
    """Greedy ids of one prompt alone, recomputed in full for each token: no generate(), no key-value cache."""
    inputs, ids = dict(prompt), []
    for _ in range(count):
        with torch.no_grad():
            logits = vlm.model(**inputs, use_cache=False).logits[0, -1]
        logits[vlm.placeholder_ids()] = float("-inf")
        ids.append(int(logits.argmax()))
        if ids[-1] in vlm.stop_ids():
            break
        for name, value in (("input_ids", ids[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.tensor([[value]])], 1)
    return ids


@pytest.mark.parametrize("pictures", [True, False])
def test_a_padded_batch_generates_what_each_prompt_generates_alone(vlm, pictures):
    prompt_list = prompts(vlm, pictures)
    together = greedy(vlm, pad_left(prompt_list, vlm.encoder.filler(), vlm.pad_id), 6)
    assert together == [naive(vlm, prompt, 6) for prompt in prompt_list]


def test_an_answer_ends_with_its_end_of_turn(vlm):
    prompt_list = prompts(vlm, True)
    usual = greedy(vlm, prompt_list[0], 5)[0]
    vlm.model.generation_config.eos_token_id = [usual[1]]
    try:
        (ended, *_) = greedy(vlm, pad_left(prompt_list, vlm.encoder.filler(), vlm.pad_id), 5)
    finally:
        vlm.model.generation_config.eos_token_id = 256
    assert ended == usual[: usual.index(usual[1]) + 1]


def test_the_end_of_turn_of_the_chat_template_ends_an_answer_whatever_the_folder_says(vlm):
    """Chat models without generation_config.json whose tokenizer's end of text is another token."""
    vlm.model.generation_config.eos_token_id, vlm.tokenizer.eos_token = None, "<|endoftext|>"
    try:
        assert vlm.stop_ids() == sorted(vlm.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    finally:
        vlm.model.generation_config.eos_token_id, vlm.tokenizer.eos_token = 256, "<|im_end|>"


def test_a_folders_own_sampling_settings_are_not_used(vlm):
    prompt = prompts(vlm, True)[0]
    usual = greedy(vlm, prompt, 6)
    given = vlm.model.generation_config
    given.do_sample, given.temperature, given.repetition_penalty = True, 50.0, 3.0
    try:
        assert greedy(vlm, prompt, 6) == usual
        assert vlm.model.generation_config is given
    finally:
        given.do_sample, given.temperature, given.repetition_penalty = False, None, None


def test_pad_left_moves_padding_to_the_front(vlm):
    prompt_list = prompts(vlm, True)
    inputs = pad_left(prompt_list, vlm.encoder.filler(), vlm.pad_id)
    for row, mask, prompt in zip(inputs["input_ids"], inputs["attention_mask"], prompt_list, strict=True):
        ids = prompt["input_ids"][0]
        assert torch.equal(row[-len(ids) :], ids)
        assert mask.tolist() == [0] * (len(row) - len(ids)) + [1] * len(ids)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"no model in .*expected a Hugging Face folder"):
        load(tmp_path, Data(train="x"))


def test_chats_of_the_fixtures_are_readable(vlm):
    for _key, record, images in chats(5):
        assert vlm.encoder.prompt(record["messages"][:1], images)["input_ids"].shape[0] == 1
