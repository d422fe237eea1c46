"""Which ids of two tokenizers are compared: those that mean the same to both."""

from __future__ import annotations

import pytest
from tiny import byte_tokenizer

from pipeline.errors import RecipeError
from pipeline.vlm.vocabulary import CommonVocabulary, common_vocabulary

SIZE = 265


def with_added(*tokens: str):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_one_tokenizer_is_common_up_to_the_smaller_head_padding_rows_and_all():
    common = common_vocabulary(byte_tokenizer(), byte_tokenizer(), 320, 300)
    assert common == CommonVocabulary(300)
    assert common.describe() is None


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_tokens_that_one_tokenizer_adds_are_named_and_cut_off(role):
    more, plain = with_added("<think>", "</think>"), byte_tokenizer()
    pair = (more, plain) if role == "teacher" else (plain, more)
    common = common_vocabulary(*pair, 320, 320)
    assert common.size == SIZE, "neither has the added tokens' ids in common, nor do padding rows behind them matter"
    assert (common.only_teacher if role == "teacher" else common.only_student) == ("<think>", "</think>")
    assert f"265 ids; <think>, </think> are the {role}'s alone" in common.describe()


def test_no_id_is_common_that_a_head_has_no_row_for():
    assert common_vocabulary(with_added("<think>"), byte_tokenizer(), 266, 260).size == 260


def test_both_may_add_tokens_as_long_as_no_id_means_two():
    common = common_vocabulary(with_added("<a>", "<b>"), with_added("<a>"), 300, 300)
    assert (common.size, common.only_teacher, common.only_student) == (SIZE + 1, ("<b>",), ())
    with pytest.raises(RecipeError, match="token 265 is '<a>' to the teacher and '<b>' to the student"):
        common_vocabulary(with_added("<a>"), with_added("<b>"), 300, 300)


def test_many_tokens_of_one_alone_are_counted():
    common = common_vocabulary(with_added(*(f"<{i}>" for i in range(8))), byte_tokenizer(), 300, 300)
    assert "<0>, <1>, <2>, <3>, <4> and 3 more are the teacher's alone" in common.describe()


def test_tokenizers_that_differ_are_refused_with_the_first_token():
    teacher, student = byte_tokenizer(), byte_tokenizer()
    student.get_vocab = lambda: {("xyz" if i == 7 else t): i for t, i in teacher.get_vocab().items()}
    with pytest.raises(RecipeError, match="token 7 is .* to the teacher and 'xyz' to the student"):
        common_vocabulary(teacher, student, SIZE, SIZE)


def test_one_token_with_two_ids_is_refused():
    teacher, student = with_added("<a>"), byte_tokenizer()
    student.get_vocab = lambda: {**byte_tokenizer().get_vocab(), "<a>": 270}
    with pytest.raises(RecipeError, match="token 265 is '<a>' to the teacher and 'id 270' to the student"):
        common_vocabulary(teacher, student, 300, 300)
