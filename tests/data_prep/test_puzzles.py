import hashlib
import io
import json
import random
import subprocess
import sys

import pytest
from PIL import Image

from data_prep.puzzle_levels import LEVELS, VALUES, Tile
from data_prep.puzzles import KINDS, ORDINALS, SPLITS, puzzle, split_of, wrong_answer
from data_prep.tile_art import PAGE, TILE_PX, TILTS, draw_tile

PLAIN = LEVELS["plain"]
ROW, draw_rule, tiles_of = PLAIN.row, PLAIN.draw_rule, PLAIN.tiles_of


def every_tile():
    return [Tile(s, c, m) for s in VALUES["shape"] for c in VALUES["colour"] for m in VALUES["mark"]]


def test_same_arguments_same_puzzle_in_another_process():
    code = "from data_prep.puzzles import puzzle; import hashlib; p = puzzle(7, 3, 'train'); "
    code += "print(p.answer, hashlib.sha256(p.image).hexdigest())"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1


def test_each_argument_matters():
    assert puzzle(0, 0, "train") != puzzle(1, 0, "train")
    assert puzzle(0, 0, "train") != puzzle(0, 1, "train")


def test_no_held_out_instance_is_ever_in_training():
    rules = {split: [puzzle(seed, i, split).rule for seed in range(3) for i in range(60)] for split in SPLITS}
    for split, drawn in rules.items():
        assert all(split_of(rule) == split for rule in drawn)
    assert not [rule for rule in rules["held_out"] if rule in rules["train"]]


def test_tile_questions_keep_the_split_too():
    assert all(split_of(puzzle(0, i, "train", "tile").rule) == "train" for i in range(60))


def test_about_one_instance_in_eight_is_held_out():
    rng = random.Random(0)
    share = sum(split_of(draw_rule(rng)) == "held_out" for _ in range(4000)) / 4000
    assert 0.10 < share < 0.15


def test_the_split_ignores_key_order():
    rule = draw_rule(random.Random(5))
    assert split_of(dict(reversed(rule.items()))) == split_of(rule)


def test_the_visible_row_leaves_one_answer():
    """Rows that look the same have the same continuation, whatever rule made them."""
    for level in LEVELS.values():
        for patterns in level.patterns.values():
            rows = [pattern[: level.row] for pattern in patterns.values()]
            assert {len(pattern) for pattern in patterns.values()} == {level.row + 1}
            assert len(set(rows)) == len(rows)


def test_plain_puzzles_are_what_they_were_before_there_were_levels():
    """The digest is that of the code before them: words, rules, lean of each tile, wrong answers of 100 puzzles."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for kind in KINDS:
            for index in range(25):
                made = puzzle(3, index, split, kind)
                words = [made.question, made.answer, made.rule, made.origin, leans(made), wrong_answer(made, 1)]
                digest.update(json.dumps(words).encode())
    assert digest.hexdigest() == "ea7603389e5b15a51b35842260e95136cb25b5d54b882f07a64c367c4b54fa71"


def leans(made):
    """For each tile of the picture, the tilts that give just these pixels."""
    picture = Image.open(io.BytesIO(made.image))
    crops = [picture.crop((x, 0, x + TILE_PX, TILE_PX)).tobytes() for x in range(0, picture.width, TILE_PX)]
    return [
        [tilt for tilt in TILTS if draw_tile(*tile, tilt).tobytes() == crop]
        for tile, crop in zip(tiles_of(made.rule), crops, strict=False)
    ]


@pytest.mark.parametrize("index", range(20))
def test_answer_follows_from_the_row(index):
    made = puzzle(2, index, "held_out")
    *row, after = tiles_of(made.rule)
    assert made.answer == str(after)
    for attribute in VALUES:
        seen = [getattr(tile, attribute) for tile in row]
        period = next(p for p in (1, 2, 3) if all(seen[i] == seen[i - p] for i in range(p, ROW)))
        assert getattr(after, attribute) == seen[ROW - period]


def test_tile_question_asks_for_a_tile_that_is_there():
    for index in range(20):
        made = puzzle(0, index, "train", "tile")
        place = next(i for i, word in enumerate(ORDINALS) if word in made.question)
        assert made.answer == str(tiles_of(made.rule)[place])


def test_names_of_tiles():
    assert str(Tile("star", "red", "dot")) == "red star with a dot"
    assert str(Tile("star", "red", "none")) == "red star"
    assert len({str(tile) for tile in every_tile()}) == 120


def test_wrong_answers_are_wrong_well_formed_and_repeatable():
    names = {str(tile) for tile in every_tile()}
    puzzles = [puzzle(0, i, "train") for i in range(80)]
    wrong = [wrong_answer(p, seed=1) for p in puzzles]
    assert all(w != p.answer and w in names for w, p in zip(wrong, puzzles, strict=True))
    assert wrong == [wrong_answer(p, seed=1) for p in puzzles]
    assert wrong != [wrong_answer(p, seed=2) for p in puzzles]


def test_picture_is_the_row_of_tiles():
    made = puzzle(0, 0, "train")
    picture = Image.open(io.BytesIO(made.image))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (ROW * TILE_PX, TILE_PX))
    first = tiles_of(made.rule)[0]
    crop = picture.crop((0, 0, TILE_PX, TILE_PX)).tobytes()
    assert crop in [draw_tile(*first, tilt).tobytes() for tilt in TILTS]


def test_every_tile_looks_different_and_has_the_page_around_it():
    tiles = [draw_tile(*tile, 0) for tile in every_tile()]
    assert len({tile.tobytes() for tile in tiles}) == 120
    assert {tile.getpixel(corner) for tile in tiles for corner in ((0, 0), (TILE_PX - 1, TILE_PX - 1))} == {PAGE}


def test_unknown_arguments_are_named():
    with pytest.raises(ValueError, match=r"split is 'test'; expected one of train, held_out"):
        puzzle(0, 0, "test")
    with pytest.raises(ValueError, match=r"kind is 'last'; expected one of next, tile"):
        puzzle(0, 0, "train", "last")
    with pytest.raises(ValueError, match=r"level is 'high'; expected one of plain, deep"):
        puzzle(0, 0, "train", level="high")
    with pytest.raises(ValueError, match=r"mark is 'blob'; expected one of none, dot, ring, cross"):
        draw_tile("star", "red", "blob", 0)
