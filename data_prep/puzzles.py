"""Visual puzzles, in the spirit of the VLsI paper's Figure 3: a row of tiles follows a rule; what comes next?

A tile has three attributes: shape, colour and mark. What rules they follow, and how many tiles a row has, is the level
(`data_prep.puzzle_levels`). The answer names the tile after the last: "red star with a dot".

Everything is a pure function of its arguments: the same (seed, index, split, kind, level) gives the same words and the
same pixels anywhere (and the same PNG bytes under one version of Pillow). A *rule instance*, which is the rules and
values of all three attributes, belongs to one split for good, by a hash of itself: a row that asks in the held-out
split was never seen in training, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from data_prep.puzzle_levels import LEVELS, VALUES, Rule, Tile
from data_prep.tile_art import TILE_PX, TILTS, draw_tile

SPLITS = ("train", "held_out")
KINDS = ("next", "tile")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
HELD_OUT_ONE_IN = 8
"""Of all rule instances, one in this many is held out."""


@dataclass(frozen=True)
class Puzzle:
    """One picture with one question and its right answer."""

    image: bytes
    """PNG, RGB, TILE_PX high and TILE_PX wide for each tile of the level's row."""
    question: str
    answer: str
    question_type: str
    """The kind that was asked for: one of KINDS."""
    rule: Rule
    """The rule instance that the row follows, as JSON would hold it."""
    origin: str
    """The arguments that made it, as one line."""


def puzzle(seed: int, index: int, split: str, kind: str = "next", level: str = "plain") -> Puzzle:
    """Make puzzle `index` of the endless series that `seed` names.

    kind "next" asks what comes next; kind "tile" asks for one of the tiles that are there.
    Raises ValueError for an unknown split, kind or level.
    """
    _check("split", split, SPLITS)
    _check("kind", kind, KINDS)
    _check("level", level, tuple(LEVELS))
    made = LEVELS[level]
    # Puzzles are drawn from their origin: the plain level's is what it was before there were levels.
    series = "puzzles" if level == "plain" else f"puzzles level={level}"
    origin = f"{series} seed={seed} split={split} kind={kind} index={index}"
    rng = random.Random(origin)
    rule = made.draw_rule(rng)
    while split_of(rule) != split:
        rule = made.draw_rule(rng)
    *row, after = made.tiles_of(rule)
    image = _png(row, [rng.choice(TILTS) for _ in row])
    if kind == "next":
        return Puzzle(image, "What comes next?", str(after), kind, rule, origin)
    place = rng.randrange(len(row))
    return Puzzle(image, f"What is the {ORDINALS[place]} tile?", str(row[place]), kind, rule, origin)


def wrong_answer(right: Puzzle, seed: int) -> str:
    """Name some other tile: well formed, in the same words, never the right answer; a function of both arguments."""
    rng = random.Random(f"wrong seed={seed} {right.origin}")
    while True:
        answer = str(Tile(*(rng.choice(values) for values in VALUES.values())))
        if answer != right.answer:
            return answer


def split_of(rule: Rule) -> str:
    """Say which split a rule instance belongs to, by a hash of the instance alone."""
    digest = hashlib.sha256(json.dumps(rule, sort_keys=True).encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else "train"


def _png(tiles: Sequence[Tile], tilts: Sequence[int]) -> bytes:
    row = Image.new("RGB", (TILE_PX * len(tiles), TILE_PX))
    for place, (tile, tilt) in enumerate(zip(tiles, tilts, strict=True)):
        row.paste(draw_tile(*tile, tilt), (place * TILE_PX, 0))
    buffer = io.BytesIO()
    row.save(buffer, "PNG")
    return buffer.getvalue()


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
