"""Visual puzzles, in the spirit of the VLsI paper's Figure 3: a row of four tiles follows a rule; what comes next?

Each of three attributes of a tile (shape, colour, mark) follows a pattern of its own along the row: `constant`
(A A A A, next A), `ABAB` (next A) or `ABCA` (next B). The answer names the fifth tile: "red star with a dot".

Everything is a pure function of its arguments: the same (seed, index, split, kind) gives the same words and the same
pixels anywhere (and the same PNG bytes under one version of Pillow). A *rule instance*, which is the patterns and
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
from typing import Any, NamedTuple

from PIL import Image

from data_prep.tile_art import COLOURS, MARKS, SHAPES, TILE_PX, TILTS, draw_tile

PATTERNS: dict[str, tuple[int, ...]] = {
    "constant": (0, 0, 0, 0, 0),
    "ABAB": (0, 1, 0, 1, 0),
    "ABCA": (0, 1, 2, 0, 1),
}
"""Pattern name -> which of its values stands in each of the four tiles, and then in the one that comes next."""

ROW = 4
"""Tiles in a picture."""
SPLITS = ("train", "held_out")
KINDS = ("next", "tile")
ORDINALS = ("first", "second", "third", "fourth")
HELD_OUT_ONE_IN = 8
"""Of all rule instances, one in this many is held out."""


class Tile(NamedTuple):
    """What can be said of one tile."""

    shape: str
    colour: str
    mark: str

    def __str__(self) -> str:
        words = f"{self.colour} {self.shape}"
        return words if self.mark == "none" else f"{words} with a {self.mark}"


VALUES: dict[str, Sequence[str]] = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "mark": MARKS}
"""Attribute -> its values, in the order of `Tile`'s fields."""

Rule = dict[str, dict[str, Any]]
"""Attribute -> {"pattern": a key of PATTERNS, "values": the values that A, B, C stand for}."""


@dataclass(frozen=True)
class Puzzle:
    """One picture with one question and its right answer."""

    image: bytes
    """PNG, RGB, ROW * TILE_PX wide and TILE_PX high."""
    question: str
    answer: str
    question_type: str
    """The kind that was asked for: one of KINDS."""
    rule: Rule
    """The rule instance that the row follows, as JSON would hold it."""
    origin: str
    """The arguments that made it, as one line."""


def puzzle(seed: int, index: int, split: str, kind: str = "next") -> Puzzle:
    """Make puzzle `index` of the endless series that `seed` names.

    kind "next" asks what comes next; kind "tile" asks for one of the tiles that are there.
    Raises ValueError for an unknown split or kind.
    """
    _check("split", split, SPLITS)
    _check("kind", kind, KINDS)
    origin = f"puzzles seed={seed} split={split} kind={kind} index={index}"
    rng = random.Random(origin)
    rule = draw_rule(rng)
    while split_of(rule) != split:
        rule = draw_rule(rng)
    tiles = tiles_of(rule)
    image = _png(tiles[:ROW], [rng.choice(TILTS) for _ in range(ROW)])
    if kind == "next":
        return Puzzle(image, "What comes next?", str(tiles[ROW]), kind, rule, origin)
    place = rng.randrange(ROW)
    return Puzzle(image, f"What is the {ORDINALS[place]} tile?", str(tiles[place]), kind, rule, origin)


def wrong_answer(right: Puzzle, seed: int) -> str:
    """Name some other tile: well formed, in the same words, never the right answer; a function of both arguments."""
    rng = random.Random(f"wrong seed={seed} {right.origin}")
    while True:
        answer = str(Tile(*(rng.choice(values) for values in VALUES.values())))
        if answer != right.answer:
            return answer


def draw_rule(rng: random.Random) -> Rule:
    """Draw a rule instance: for each attribute a pattern, uniformly, and then distinct values for its letters."""
    rule: Rule = {}
    for attribute, values in VALUES.items():
        pattern = rng.choice(tuple(PATTERNS))
        rule[attribute] = {"pattern": pattern, "values": rng.sample(values, max(PATTERNS[pattern]) + 1)}
    return rule


def tiles_of(rule: Rule) -> list[Tile]:
    """Lay out the ROW tiles of the picture and, last, the one that comes next."""
    columns = ([rule[name]["values"][letter] for letter in PATTERNS[rule[name]["pattern"]]] for name in VALUES)
    return [Tile(*values) for values in zip(*columns, strict=True)]


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
