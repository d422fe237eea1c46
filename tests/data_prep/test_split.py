from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from data_prep.split import split_of


def picture(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


SAMPLES = st.lists(st.lists(st.integers(0, 40).map(picture), min_size=1, max_size=3), max_size=40)


@given(SAMPLES, st.floats(0, 1))
def test_one_picture_never_stands_on_both_sides(samples: list[list[bytes]], held_out: float) -> None:
    sides: dict[bytes, str] = {}
    for pictures, split in zip(samples, split_of(samples, held_out), strict=True):
        for each in pictures:
            assert sides.setdefault(each, split) == split


@given(SAMPLES)
def test_the_order_of_samples_does_not_matter(samples: list[list[bytes]]) -> None:
    assert split_of(samples[::-1], 0.3) == split_of(samples, 0.3)[::-1]


def test_the_share_is_about_what_was_asked_for() -> None:
    samples = [[picture(number)] for number in range(4000)]
    assert 0.08 < split_of(samples, 0.1).count("held_out") / 4000 < 0.12
    assert set(split_of(samples, 0.0)) == {"train"}
    assert set(split_of(samples, 1.0)) == {"held_out"}


def test_a_picture_stays_on_its_side_when_the_share_grows() -> None:
    samples = [[picture(number)] for number in range(500)]
    few, many = split_of(samples, 0.1), split_of(samples, 0.2)
    assert all(late == "held_out" for early, late in zip(few, many, strict=True) if early == "held_out")
