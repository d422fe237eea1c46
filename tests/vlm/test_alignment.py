"""Which response tokens of two tokenizers are predicted after the same text, and which ids mean the same."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from bpe_tokenizers import ENGLISH, OTHER, blanks_tokenizer, bpe_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, png, turn, write_vlm
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from pipeline.errors import RecipeError, SampleError
from pipeline.vlm.alignment import aligned
from pipeline.vlm.mapped_pair import MappedPair, align_both, align_teacher
from pipeline.vlm.processing import ChatEncoder, load_processor
from pipeline.vlm.token_text import END, EOS, NAMED, PROBE, SPECIAL, token_texts

ROWS = 400


def with_a_token_that_is_not_bytes() -> PreTrainedTokenizerFast:
    """A byte-level vocabulary that also has a character as it is, as some have from an older one."""
    state = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    state["model"]["vocab"]["漢"] = 300
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")


MAKE = {
    "english": lambda: bpe_tokenizer(ENGLISH, 300),
    "other": lambda: bpe_tokenizer(OTHER, 320, end="</s>"),
    "blanks": lambda: blanks_tokenizer(OTHER, 340, end="</s>"),
    "bytes": byte_tokenizer,
    "odd": with_a_token_that_is_not_bytes,
}
PAIRS = [("english", "other"), ("blanks", "english"), ("bytes", "blanks")]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, ChatEncoder]:
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {name: write_vlm(root / name, "qwen2_vl", 1, 16, tokenizer=MAKE[name]()) for name in {*sum(PAIRS, ())}}
    return {name: ChatEncoder(load_processor(folder), 512) for name, folder in folders.items()}


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request, encoders) -> MappedPair:
    return MappedPair(*(encoders[name] for name in request.param))


def chat(*answers: str, blank: str = ""):
    turns = [(turn("user", "<image>", "what?"), turn("assistant", blank + answer)) for answer in answers]
    return [message for both in turns for message in both]


@cache
def plain(name: str):
    """A tokenizer and its tokens' bytes, without a model."""
    tokenizer = MAKE[name]()
    template = SimpleNamespace(end_of_turn=lambda: tokenizer.eos_token)
    return tokenizer, token_texts(SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer), template=template))


def cut(name: str, text: str) -> list[bytes]:
    tokenizer, texts = plain(name)
    return [texts[index] for index in tokenizer.encode(text)]


WORDS = st.sampled_from(
    ["the", " that", "cat", " cat", "ab", "ba", "naïve", "漢字", "字", "🙂", "🙃", "\n", "1", "23", ":"]
)
# No ▁: to a tokenizer that writes blanks so, it is one.
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=12), st.lists(WORDS, max_size=8).map("".join)
)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_pairs_are_exactly_the_tokens_after_equal_bytes(names, text):
    """Against every pair of prefixes, decoded and compared; what a text's tokens stand for is the text."""
    teacher, student = (cut(name, text) for name in names)
    assert b"".join(teacher) == b"".join(student) == text.encode()
    naive = [
        (i, j)
        for j in range(len(student))
        for i in range(len(teacher))
        if b"".join(teacher[:i]) == b"".join(student[:j])
    ]
    assert aligned(teacher, student) == naive
    with_end = aligned([*teacher, END], [*student, END])
    assert with_end == [*naive, (len(teacher), len(student))], "the end of a turn is a token of its own"


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, other=TEXTS)
def test_of_two_texts_only_what_begins_alike_is_paired(text, other):
    teacher, student = cut("english", text), cut("other", other)
    for i, j in aligned(teacher, student):
        before = [b"".join(tokens[:n]) for tokens, n in ((teacher, i), (student, j))]
        assert before[0] == before[1] or before[0].lstrip() == before[1].lstrip()


def test_a_character_that_both_cut_at_one_byte_is_paired_inside():
    assert aligned([b"a\xf0\x9f", b"\x99\x82"], [b"a", b"\xf0\x9f", b"\x99\x82!"]) == [(0, 0), (1, 2)]
    assert aligned([b"a\xf0", b"\x9f\x99\x82"], [b"a", b"\xf0\x9f", b"\x99\x82!"]) == [(0, 0)]


def test_blanks_that_templates_set_around_an_answer_are_none_of_it():
    """Before it: the first tokens are asked for other texts, the next for the same. Behind it: the ends are paired."""
    assert aligned([b" Yes", b",", b" no", END], [b"Yes", b", no", b" ", END]) == [(1, 1), (3, 3)]
    assert aligned([b" Yes", b","], [b" Yes", b","]) == [(0, 0), (1, 1)]
    assert aligned([b"\n", b" Yes", b"!"], [b"\n", b"Yes", b"!"]) == [(2, 2)], "that blank was for the model to say"


def test_ends_of_different_texts_and_cut_ones_are_not_paired():
    assert aligned([b"Yes", END], [b"No", END]) == [(0, 0)]
    assert aligned([b"Yes", END], [b"Yes"]) == [(0, 0)]
    assert aligned([], [b"Yes"]) == []


@pytest.mark.parametrize("name", MAKE)
def test_what_a_token_stands_for_is_what_its_decoder_says(name):
    """Each token alone; where its bytes are no whole character, decoders and python write the same replacement."""
    tokenizer, texts = plain(name)
    ids = {token: index for token, index in tokenizer.get_vocab().items() if texts[index][:1] != SPECIAL}
    assert len(ids) > 250
    for token, index in ids.items():
        assert tokenizer.backend_tokenizer.decoder.decode([token]) == texts[index].decode(errors="replace")


def test_what_tokens_stand_for(encoders):
    texts = token_texts(encoders["blanks"])
    ids = encoders["blanks"].processor.tokenizer.get_vocab()
    assert (texts[ids["<0xE6>"]], texts[ids["▁"]], texts[ids["▁c"]]) == (b"\xe6", b" ", b" c")
    assert texts[ids["</s>"]] == END and texts[ids["<|im_start|>"]] == NAMED + b"<|im_start|>"
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.eos_token = "<|endoftext|>"
    encoder = ChatEncoder(encoders["bytes"].processor, 512)
    encoder.processor.tokenizer, before = tokenizer, encoder.processor.tokenizer
    try:
        texts, ids = token_texts(encoder), tokenizer.get_vocab()
    finally:
        encoder.processor.tokenizer = before
    assert texts[ids["<think>"]] == b"<think>", "an added token that is not special is text"
    assert (texts[ids["<|endoftext|>"]], texts[ids["<|im_end|>"]]) == (EOS, END)


def test_ids_that_stand_for_the_same_text_or_role_are_mapped(pair):
    made = pair.vocabulary_map(ROWS, ROWS)
    theirs, ours = pair.texts
    assert (len(made.class_of), made.bucket) == (len(theirs), len(ours)), "without padding rows"
    for index, student_id in enumerate(made.class_of.tolist()):
        if student_id == made.bucket:
            assert theirs[index] not in ours.values()
        else:
            assert theirs[index] == ours[student_id]
    roles = [{text: index for index, text in texts.items()} for texts in pair.texts]
    for role in (END, NAMED + b"<|im_start|>"):
        assert made.class_of[roles[0][role]] == roles[1][role]
    assert set(made.outside) == set(ours) - set(made.class_of.tolist())
    assert f"mean one of the student's {len(ours)}" in made.describe()


def test_of_two_ids_with_one_text_the_one_of_the_same_name_is_taken(encoders):
    """The blanks tokenizer has <0x61> and a: both stand for one byte."""
    ids = encoders["blanks"].processor.tokenizer.get_vocab()
    itself = MappedPair(encoders["blanks"], encoders["blanks"]).vocabulary_map(ROWS, ROWS)
    assert itself.class_of.tolist() == list(range(len(ids)))
    from_bytes = MappedPair(encoders["bytes"], encoders["blanks"]).vocabulary_map(ROWS, ROWS)
    assert from_bytes.class_of[encoders["bytes"].processor.tokenizer.get_vocab()["a"]] == ids["a"]


def test_a_head_with_fewer_rows_than_its_tokenizer_has_tokens(encoders):
    made = MappedPair(encoders["english"], encoders["other"]).vocabulary_map(280, 290)
    assert len(made.class_of) == 280 and made.class_of.max() <= 290


def test_samples_are_supervised_at_the_same_tokens_turn_by_turn(encoders):
    pair = MappedPair(encoders["english"], encoders["other"])
    messages, images = chat("the cat is naïve", "漢字🙂, no"), [png(seed=1), png(seed=2)]
    both = {
        role: encoders[name]("k", messages, images) for role, name in (("teacher", "english"), ("student", "other"))
    }
    teacher, student, record = pair.align(both["teacher"], both["student"])
    kept = [e.response_ids.tolist() for e in (teacher, student)]
    assert len(kept[0]) == len(kept[1]) == len(record.tokens) and record.tokens.tolist() == kept[1]
    whole = both["student"].response_ids.numpy()
    assert record.places[-1] == len(whole) and (whole[record.places[:-1]] == record.tokens).all()
    assert 4 <= len(record.tokens) < len(whole)
    texts = pair.texts
    assert [texts[0][kept[0][-1]], texts[1][kept[1][-1]]] == [END, END]
    assert sum(texts[1][index] == END for index in kept[1]) == 2, "each turn's end"
    assert (teacher.turns[teacher.response] == student.turns[student.response]).all()

    class Raw:
        key, record, images = "k", {"messages": messages}, [png(seed=1), png(seed=2)]

    found, extra = align_teacher(pair, Raw, {"teacher": both["teacher"]})
    assert (found["teacher"].response == teacher.response).all() and (extra.places == record.places).all()
    found, extra = align_both(pair, Raw, both)
    assert (found["student"].response == student.response).all() and extra is None


def test_a_sample_cut_short_for_one_model_keeps_the_turns_that_both_have(encoders):
    short = ChatEncoder(encoders["other"].processor, 60)
    pair = MappedPair(encoders["english"], short)
    messages, images = chat("the cat", "the cat is there " * 4), [png(seed=1), png(seed=2)]
    teacher, student = encoders["english"]("k", messages, images), short("k", messages, images)
    assert len(student.response_ids) < len(encoders["other"]("k", messages, images).response_ids)
    _, kept, record = pair.align(teacher, student)
    assert record.places[-1] == len(student.response_ids) and len(kept.response_ids) == len(record.tokens) > 0


def test_a_sample_without_a_common_place_is_left_out(encoders):
    pair = MappedPair(encoders["english"], encoders["other"])
    messages = [turn("user", "what?"), turn("assistant", "the cat")]
    teacher = encoders["english"]("k", messages, [])
    teacher.turns[teacher.response] = 7
    with pytest.raises(SampleError, match="begins after the same text"):
        pair.align(teacher, encoders["other"]("k", messages, []))


def test_tokenizers_that_cannot_be_read_as_bytes_are_refused(encoders):
    encoder, tokenizer = ChatEncoder(encoders["english"].processor, 512), bpe_tokenizer(ENGLISH, 300)
    before, encoder.processor.tokenizer = encoder.processor.tokenizer, tokenizer
    try:
        tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
        with pytest.raises(RecipeError, match="decodes by ByteLevel, Metaspace or ByteFallback, found WordPiece"):
            token_texts(encoder)
        tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
        with pytest.raises(RecipeError, match=f"tokens that make up their text: {PROBE[:1]!r}"[:-1]):
            token_texts(encoder)
    finally:
        encoder.processor.tokenizer = before


def test_nothing_in_common_is_refused(encoders):
    pair = MappedPair(encoders["english"], encoders["other"])
    pair.texts = (pair.texts[0], dict.fromkeys(pair.texts[1], b"another"))
    with pytest.raises(RecipeError, match="no token of the teacher stands for the same text"):
        pair.vocabulary_map(ROWS, ROWS)


def test_equal_tokenizers_map_each_id_to_itself(encoders):
    made = MappedPair(encoders["english"], encoders["english"]).vocabulary_map(ROWS, ROWS)
    assert np.array_equal(made.class_of, np.arange(309)) and not len(made.outside)
