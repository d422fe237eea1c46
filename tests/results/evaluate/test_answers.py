import pytest
from tiny import turn

from pipeline.errors import SampleError
from pipeline.results.evaluate.answers import QuestionOnly, Tally, is_right, last_exchange, normalise
from pipeline.results.evaluate.comparison import share_interval


def record(*pairs, **fields):
    turns = [t for q, a in pairs for t in (turn("user", "<image>", q), turn("assistant", a))]
    return {"messages": turns, **fields}


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (" Red  STAR.", "red star"),
        ("red\nstar ?!", "red star"),
        ("Ｒｅｄ　ｓｔａｒ！", "red star"),
        ("1.5", "1.5"),
        ("yes. ", "yes"),
    ],
)
def test_normalise(text, same):
    assert normalise(text) == same


def test_articles_and_inner_punctuation_are_kept():
    assert normalise("A star") != normalise("star")
    assert normalise("3,5") != normalise("35")


def test_punctuation_alone_is_an_answer_of_its_own():
    assert is_right(" ? ", "?")
    assert not any(is_right(*pair) for pair in (("", "?"), ("!", "?"), ("...", ":"), ("?", "")))


def test_a_reference_that_thinks_is_met_by_the_answer_after_its_thinking():
    assert is_right("Red.", "<think>\nhm\n</think>\n\nred") and is_right("<think>a</think> B", "<think>a</think> b")
    assert not is_right("", "<think>a</think>") and not is_right("</think>red", "red")


def test_last_exchange_gives_the_earlier_turns_and_their_images():
    chat = record(("one?", "1"), ("two?", "2"), question_type="count")
    exchange = last_exchange(chat, [b"a", b"b"])
    assert [m["role"] for m in exchange.messages] == ["user", "assistant", "user"]
    assert exchange.images == [b"a", b"b"]
    assert (exchange.question, exchange.answer, exchange.question_type) == ("two?", "2", "count")


def test_images_shown_after_the_answer_are_not_given():
    chat = record(("one?", "1"))
    chat["messages"].append(turn("user", "<image>", "and?"))
    assert last_exchange(chat, [b"a", b"b"]).images == [b"a"]


def test_a_chat_without_an_answer_is_a_bad_sample():
    with pytest.raises(SampleError, match="no assistant turn"):
        last_exchange({"messages": [turn("user", "hm")]}, [])


def test_question_only_takes_the_majority_of_the_same_question_and_of_all_for_a_new_one():
    seen = [("colour?", "red"), ("colour?", "Red."), ("colour?", "blue"), ("shape?", "box"), *[("x?", "yes")] * 3]
    guess = QuestionOnly(record(pair) for pair in seen)
    assert guess("Colour ?") == "red"
    assert guess("shape?") == "box"
    assert guess("never asked") == "yes"


def test_question_only_needs_something_to_learn_from():
    with pytest.raises(ValueError, match="no question with an answer"):
        QuestionOnly([])


def test_tally_counts_in_total_and_by_type():
    tally = Tally()
    for question_type, answer in (("a", "x"), ("a", "no"), ("b", "X.")):
        tally.count(question_type, is_right(answer, "x"))
    low, high = share_interval(2, 3)
    assert tally.summary() == {
        "exact_match": 2 / 3,
        "samples": 3,
        "low": low,
        "high": high,
        "by_type": {"a": {"exact_match": 0.5, "samples": 2}, "b": {"exact_match": 1.0, "samples": 1}},
    }
