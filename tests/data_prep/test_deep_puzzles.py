"""The deep level of the puzzles, solved from its pictures by somebody who knows the rules but not the instance."""

import io
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from data_prep.puzzle_levels import LEVELS, VALUES, Tile
from data_prep.puzzles import ORDINALS, SPLITS, puzzle, split_of, wrong_answer
from data_prep.tile_art import TILE_PX, TILTS, draw_tile

DEEP = LEVELS["deep"]


@pytest.fixture(scope="module")
def names():
    """Pixels of every tile in every tilt -> the tile."""
    tiles = [Tile(s, c, m) for s in VALUES["shape"] for c in VALUES["colour"] for m in VALUES["mark"]]
    return {draw_tile(*tile, tilt).tobytes(): tile for tile in tiles for tilt in TILTS}


def seen(image, names):
    """The tiles of a picture, by their pixels alone."""
    picture = Image.open(io.BytesIO(image))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (6 * TILE_PX, TILE_PX))
    return [names[picture.crop((x, 0, x + TILE_PX, TILE_PX)).tobytes()] for x in range(0, picture.width, TILE_PX)]


def next_by_period(column, longest):
    """What a column with the shortest period that fits goes on with."""
    period = next(p for p in range(1, longest + 1) if all(a == b for a, b in zip(column, column[p:], strict=False)))
    return column[len(column) - period]


def solve(row):
    """Name the tile after the row."""
    shape = next_by_period([tile.shape for tile in row], longest=4)
    mark = next_by_period([tile.mark for tile in row], longest=3)
    wheel = ["red", "orange", "yellow", "green", "blue", "purple", "red"]
    last = [tile.colour for tile in row if tile.shape == shape][-1]
    colour = wheel[wheel.index(last) + 1]
    return f"{colour} {shape}" + ("" if mark == "none" else f" with a {mark}")


@pytest.mark.parametrize("split", SPLITS)
def test_the_picture_alone_gives_the_answer(split, names):
    for index in range(100):
        made = puzzle(2, index, split, level="deep")
        assert solve(seen(made.image, names)) == made.answer


def test_a_tile_question_asks_for_a_tile_that_is_there(names):
    asked = set()
    for index in range(60):
        made = puzzle(0, index, "train", "tile", "deep")
        place = next(i for i, word in enumerate(ORDINALS) if word in made.question)
        assert made.answer == str(seen(made.image, names)[place])
        asked.add(place)
    assert asked == set(range(6))


def test_the_colours_of_a_shape_step_by_one_and_the_other_shape_s_do_not_matter():
    rng = random.Random(0)
    wheel = list(VALUES["colour"])
    for _ in range(200):
        tiles = DEEP.tiles_of(DEEP.draw_rule(rng))
        for shape in {tile.shape for tile in tiles}:
            for a, b in pairwise(tile for tile in tiles if tile.shape == shape):
                assert wheel.index(b.colour) == (wheel.index(a.colour) + 1) % len(wheel)


def rows_of(level, count):
    rng = random.Random(0)
    return [LEVELS[level].tiles_of(LEVELS[level].draw_rule(rng)) for _ in range(count)]


def test_copying_one_tile_whichever_is_hardly_ever_right():
    rows = rows_of("deep", 2000)
    assert max(sum(row[-1] == row[place] for row in rows) for place in range(6)) < 0.1 * 2000


def read_out(level):
    """How often a linear map of all attributes that are seen, by least squares, names the colour that comes next."""
    rows = rows_of(level, 6000)
    seen = np.array([[getattr(t, n) == v for t in row[:-1] for n in VALUES for v in VALUES[n]] for row in rows], float)
    colour = np.array([VALUES["colour"].index(row[-1].colour) for row in rows])
    weights = np.linalg.lstsq(seen[:5000], np.eye(6)[colour[:5000]], rcond=1e-6)[0]
    return (seen[5000:] @ weights).argmax(1) == colour[5000:]


def test_the_colour_is_not_read_off_in_one_step():
    """A linear read-out is right on nearly all plain rows, but not on deep ones."""
    assert read_out("plain").mean() > 0.9
    assert read_out("deep").mean() < 0.8


def test_no_held_out_row_is_ever_in_training(names):
    rows = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in range(3):
            for index in range(60):
                made = puzzle(seed, index, split, level="deep")
                assert split_of(made.rule) == split
                rows[split].add(tuple(DEEP.tiles_of(made.rule)[:6]))
    assert not rows["train"] & rows["held_out"]


def test_same_arguments_same_puzzle_in_another_process():
    code = "from data_prep.puzzles import puzzle; import hashlib; p = puzzle(7, 3, 'train', level='deep'); "
    code += "print(p.answer, hashlib.sha256(p.image).hexdigest())"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1
    assert puzzle(7, 3, "train", level="deep") != puzzle(8, 3, "train", level="deep")


def test_wrong_answers_are_wrong_and_well_formed(names):
    words = {str(tile) for tile in names.values()}
    for index in range(40):
        made = puzzle(0, index, "train", level="deep")
        assert wrong_answer(made, 1) in words - {made.answer}
