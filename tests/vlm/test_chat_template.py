"""Chats under templates of every kind: a response is what the model has to generate, or the sample is rejected."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import turn

from pipeline.errors import RecipeError, SampleError
from pipeline.vlm.chat_template import ChatTemplate
from pipeline.vlm.processing import load_processor

HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
TEXT = "{% set t = m['content'] | map(attribute='text') | select('defined') | join %}"
FOOT = "<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPENING = PROMPT.replace("{% endif %}", "<think>\n{% endif %}")
LAST = "{% set answer = m['role'] == 'assistant' %}"
STRIP = "{% if answer %}{% set t = t.split('</think>')[-1].lstrip() %}{% endif %}"
STRIP_HISTORY = STRIP.replace("{% if answer %}", "{% if answer and not loop.last %}")
EMPTY = "{% if answer and '<think>' not in t %}<think>\n\n</think>\n\n{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "plain": HEAD + TEXT + "{{ t }}" + FOOT + PROMPT,
    "alternating": ALTERNATE + HEAD + TEXT + "{{ t }}" + FOOT + PROMPT,
    "mistral": (
        "{% for m in messages %}" + TEXT + "{% if m['role'] == 'assistant' %} {{ t }}<|im_end|>"
        "{% else %}[INST] {{ t }} [/INST]{% endif %}{% endfor %}"
    ),
    "strips history": HEAD + TEXT + LAST + STRIP_HISTORY + "{{ t }}" + FOOT + PROMPT,
    "strips always": HEAD + TEXT + LAST + STRIP + "{{ t }}" + FOOT + PROMPT,
    "prompt opens thinking": HEAD + TEXT + "{{ t }}" + FOOT + OPENING,
    "inserts empty thinking": HEAD + TEXT + LAST + EMPTY + "{{ t }}" + FOOT + PROMPT,
    "opens and inserts": HEAD + TEXT + LAST + EMPTY + "{{ t }}" + FOOT + OPENING,
    "drops the first turn of long chats": (
        "{% if messages | length > 3 %}{% set messages = messages[1:] %}{% endif %}"
        + HEAD + TEXT + "{{ t }}" + FOOT + PROMPT
    ),
    "shouts": HEAD + TEXT + "{{ t | upper }}" + FOOT + PROMPT,
    "never ends": HEAD + TEXT + "{{ t }}" + FOOT.replace("<|im_end|>", "") + PROMPT,
    "no chat at all": "{{ raise_exception('this model takes no chats') }}",
}  # fmt: skip
THOUGHT = "<think>\nred, then blue\n</think>\n\n"
CHAT = [turn("user", "what next?"), turn("assistant", "a circle"), turn("user", "sure?"), turn("assistant", "yes")]
THINKING = [CHAT[0], turn("assistant", THOUGHT + "a circle"), CHAT[2], turn("assistant", THOUGHT + "yes")]


@pytest.fixture(scope="module")
def template(tiny_models):
    made = ChatTemplate(load_processor(tiny_models["qwen2_vl", "student"]))

    def use(name: str) -> ChatTemplate:
        made.processor.chat_template = TEMPLATES[name]
        return made

    return use


def responses(template: ChatTemplate, chat) -> list[str]:
    text = template.render(chat)
    return [text[begin:end] for begin, end in template.response_spans(text, chat)]


@pytest.mark.parametrize("name", ["plain", "alternating", "mistral", "strips history", "strips always"])
def test_answers_alone(template, name):
    template(name).check()
    assert responses(template(name), CHAT) == ["a circle<|im_end|>", "yes<|im_end|>"]


def test_what_stands_after_the_generation_prompt_is_generated(template):
    inserted = "<think>\n\n</think>\n\n"
    assert responses(template("inserts empty thinking"), CHAT)[1] == inserted + "yes<|im_end|>"
    assert responses(template("opens and inserts"), CHAT)[1] == inserted.removeprefix("<think>\n") + "yes<|im_end|>"
    assert responses(template("prompt opens thinking"), CHAT) == ["a circle<|im_end|>", "yes<|im_end|>"]
    first, last = responses(template("prompt opens thinking"), THINKING)
    assert first == (THOUGHT + "a circle<|im_end|>").removeprefix("<think>\n")
    assert last == (THOUGHT + "yes<|im_end|>").removeprefix("<think>\n")


@pytest.mark.parametrize(
    "name", ["plain", "mistral", "prompt opens thinking", "inserts empty thinking", "opens and inserts"]
)
@pytest.mark.parametrize("chat", [CHAT, THINKING])
def test_the_answer_in_what_is_generated_is_what_follows_the_thinking_of_the_template(template, name, chat):
    one = template(name)
    *_, last = responses(one, chat)
    generated, thinks = last.removesuffix("<|im_end|>"), name not in ("plain", "mistral")
    assert one.thinks() == thinks
    assert one.answer_in(generated) == ("yes" if thinks or chat is CHAT else THOUGHT + "yes")
    assert one.answer_in("yes") == "yes" and one.answer_in("<think> red") == "<think> red", "cut in its thinking"
    assert one.answer_in("red</think> ") == ("" if thinks else "red</think> ")


def test_a_turn_that_lost_its_reasoning_as_history_is_context(template):
    """The model is asked for the reasoning there, and the text does not have it."""
    text = template("strips history").render(THINKING)
    assert THOUGHT + "a circle" not in text and "a circle" in text
    assert responses(template("strips history"), THINKING) == [THOUGHT + "yes<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "chat", "reason"),
    [
        ("plain", CHAT[1:], "begins with an assistant turn, which answers nothing"),
        ("plain", [CHAT[0], turn("assistant", " ")], "assistant turn 1 is empty"),
        ("alternating", [CHAT[0], *CHAT], "chat template refused it: TemplateError: Conversation roles must alternate"),
        ("strips always", THINKING, "changes the answer of turn 1: expected '<think>.red, then blue"),
        ("drops the first turn of long chats", CHAT, "changes what stands before turn 1"),
        ("shouts", CHAT, "changes the answer of turn 1: expected 'a circle', found 'A CIRCLE'"),
        ("never ends", CHAT, "writes no end-of-turn token"),
    ],
)
def test_what_cannot_be_learnt_from_is_rejected_with_a_reason(template, name, chat, reason):
    with pytest.raises(SampleError, match=reason.replace(".red", r"\\nred")):
        responses(template(name), chat)


@pytest.mark.parametrize("name", ["never ends", "shouts", "no chat at all"])
def test_a_template_that_could_take_no_chat_is_refused_at_once(template, name):
    with pytest.raises(RecipeError, match="not even a question and an answer: the chat template"):
        template(name).check()


@pytest.mark.parametrize("blanks", [200 * " ", 100 * " \n", 40 * "<b> \t\n", 60 * "\n" + "<" + 60 * " "])
@pytest.mark.parametrize("name", ["plain", "prompt opens thinking", "mistral"])
def test_a_question_may_end_with_many_blanks(template, name, blanks):
    """An expression that cuts a run of blanks in every way would not end within a lifetime."""
    one = template(name)
    one.check()
    assert responses(one, [turn("user", f"a table: {blanks}"), CHAT[1]]) == ["a circle<|im_end|>"]


texts = st.text(st.sampled_from("aZ1 \n\t.<>/é日'\"{}%") | st.characters(codec="utf-8"), min_size=0, max_size=24)
answers = texts | st.sampled_from(["<think>", THOUGHT + "b", "assistant", "<b>x</b>", "</think>c", "[INST] a [/INST]"])
turns = st.one_of(
    st.builds(turn, st.sampled_from(["user", "system"]), texts), st.builds(turn, st.just("assistant"), answers)
)


USABLE = sorted(
    set(TEMPLATES) - {"never ends", "shouts", "no chat at all"}
)  # the others are refused at once, see above


@given(name=st.sampled_from(USABLE), chat=st.lists(turns, max_size=6))
@settings(max_examples=500, deadline=None)
def test_an_accepted_response_is_what_follows_its_generation_prompt(template, name, chat):
    """Whatever the chat: rejected with a reason, or each response continues its own prompt and ends its turn."""
    one = template(name)
    try:
        text = one.render(chat)
        spans = one.response_spans(text, chat)
    except SampleError as error:
        assert len(str(error)) > 20
        return
    answered = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    assert len(spans) <= len(answered) and (len(spans) == len(answered) or "strips" in name)
    for begin, end in spans:
        assert text[begin:end].endswith("<|im_end|>")
        before = text[:begin]
        prompts = [one.render(chat[:index], prompt=True) for index in answered]
        assert any(before.rstrip() in (p.rstrip(), p.removesuffix("<think>\n").rstrip()) for p in prompts), before
