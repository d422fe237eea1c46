"""The levels of the puzzles: how a row of tiles, and the tile after it, follow from a rule instance.

At both levels an attribute of a tile may follow a pattern of its own along the row: letters that stand for values.

* `plain`: four tiles. Shape, colour and mark each follow their own pattern: `constant` (A A A A, next A), `ABAB`
  (next A) or `ABCA` (next B). Each can be read off by itself, by copying the tile one period before.
* `deep`: six tiles. The shape follows a pattern of two letters with a period of up to four tiles, the mark one of up to
  three. The colour follows the shape: each tile is one step of COLOURS on from the last tile of the same shape, so the
  two shapes of a row carry two interleaved sequences of colours. What colour comes next is in no place that could be
  known beforehand: find the shapes, their pattern and the next one, find the last tile of that shape, and take a step
  from its colour. And the colour is the first word of the answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data_prep.tile_art import COLOURS, MARKS, SHAPES


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
"""Attribute -> {"pattern": its name, "values": what A, B, C stand for}, or {"follows": another attribute, "values":
[the first one beside each of that attribute's values]}."""

Patterns = Mapping[str, tuple[int, ...]]
"""Name -> which of its values stands in each tile of the row, and then in the one that comes next."""

PLAIN_PATTERNS: Patterns = {
    "constant": (0, 0, 0, 0, 0),
    "ABAB": (0, 1, 0, 1, 0),
    "ABCA": (0, 1, 2, 0, 1),
}

LEADING_PATTERNS: Patterns = {
    (period * 6)[:6]: tuple("AB".index(letter) for letter in (period * 7)[:7])
    for period in ("A", "AB", "AAB", "ABA", "ABB", "AAAB", "AABA", "AABB", "ABAA", "ABBA", "ABBB")
}
"""Of the deep level's shapes: all that one or two of them can make with a period of up to four tiles."""

OWN_PATTERNS: Patterns = {
    "AAAAAA": (0, 0, 0, 0, 0, 0, 0),
    "ABABAB": (0, 1, 0, 1, 0, 1, 0),
    "ABCABC": (0, 1, 2, 0, 1, 2, 0),
}
"""Of the deep level's marks."""


@dataclass(frozen=True)
class Level:
    """How rules are drawn and laid out."""

    row: int
    """Tiles in a picture."""
    patterns: Mapping[str, Patterns]
    """Attribute -> the patterns that it may follow."""
    follows: Mapping[str, str] = field(default_factory=dict)
    """Attribute -> the one, with a pattern, for each of whose values it goes round its own values, a step a tile."""

    def draw_rule(self, rng: random.Random) -> Rule:
        """Draw a rule instance: for each attribute a pattern, uniformly, and then distinct values for its letters."""
        rule: Rule = {}
        for attribute, values in VALUES.items():
            if attribute in self.follows:
                leader = self.follows[attribute]
                rule[attribute] = {"follows": leader, "values": [rng.choice(values) for _ in rule[leader]["values"]]}
                continue
            patterns = self.patterns[attribute]
            pattern = rng.choice(tuple(patterns))
            rule[attribute] = {"pattern": pattern, "values": rng.sample(values, max(patterns[pattern]) + 1)}
        return rule

    def tiles_of(self, rule: Rule) -> list[Tile]:
        """Lay out the tiles of the picture and, last, the one that comes next."""
        columns = {name: self._by_pattern(name, rule) for name in VALUES if name not in self.follows}
        for name, leader in self.follows.items():
            first = dict(zip(rule[leader]["values"], rule[name]["values"], strict=True))
            columns[name] = _interleaved(VALUES[name], first, columns[leader])
        return [Tile(*values) for values in zip(*(columns[name] for name in VALUES), strict=True)]

    def _by_pattern(self, attribute: str, rule: Rule) -> list[str]:
        letters = self.patterns[attribute][rule[attribute]["pattern"]]
        return [rule[attribute]["values"][letter] for letter in letters]


def _interleaved(values: Sequence[str], first: Mapping[str, str], leader: Sequence[str]) -> list[str]:
    """For each value of the leader go round the values from its first one, a step at each of its tiles."""
    places = {one: values.index(start) for one, start in first.items()}
    column = []
    for one in leader:
        column.append(values[places[one] % len(values)])
        places[one] += 1
    return column


LEVELS: Mapping[str, Level] = {
    "plain": Level(row=4, patterns=dict.fromkeys(VALUES, PLAIN_PATTERNS)),
    "deep": Level(row=6, patterns={"shape": LEADING_PATTERNS, "mark": OWN_PATTERNS}, follows={"colour": "shape"}),
}
"""Name -> level."""
