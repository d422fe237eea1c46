"""How one tile of a puzzle looks: a rounded card with a coloured shape on it and, perhaps, a mark on the shape.

Drawn OVERSAMPLE times too large and scaled down, so that edges are smooth. The page between the cards is one flat
colour: tiles can be pasted side by side, and a picture can be scaled tile by tile, with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from PIL import Image, ImageDraw, ImageFilter

TILE_PX = 96
"""Width and height of a tile, page margin included."""
OVERSAMPLE = 4
TILTS = (-9, 0, 9)
"""Degrees by which a shape may lean; it means nothing, it keeps the row lively."""

PAGE = (241, 236, 226)
CARD = (255, 253, 248)
SHADOW = (120, 104, 84)
INK = (38, 40, 58)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 62, 70),
    "orange": (247, 140, 44),
    "yellow": (250, 205, 58),
    "green": (62, 168, 96),
    "blue": (58, 124, 214),
    "purple": (142, 84, 184),
}

Point = tuple[float, float]
Outline = Callable[[], list[Point]]


def _ring_points(count: int, radius: Callable[[int], float], y: float = 0.0) -> list[Point]:
    """Place `count` points around (0, y), the first one straight up."""
    angles = [math.tau * i / count - math.tau / 4 for i in range(count)]
    return [(radius(i) * math.cos(a), y + radius(i) * math.sin(a)) for i, a in enumerate(angles)]


def _circle() -> list[Point]:
    return _ring_points(90, lambda _: 0.88)


def _square() -> list[Point]:
    return [(-0.74, -0.74), (0.74, -0.74), (0.74, 0.74), (-0.74, 0.74)]


def _triangle() -> list[Point]:
    return _ring_points(3, lambda _: 1.08, y=0.22)


def _star() -> list[Point]:
    return _ring_points(10, lambda i: 0.5 if i % 2 else 1.04, y=0.06)


def _heart() -> list[Point]:
    angles = [math.tau * i / 120 for i in range(120)]
    return [
        (
            0.98 * math.sin(a) ** 3,
            -0.06 - (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16.5,
        )
        for a in angles
    ]


SHAPES: dict[str, Outline] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
}
"""Shape -> its outline, about the unit circle, y downwards."""

MARKS = ("none", "dot", "ring", "cross")


@cache
def draw_tile(shape: str, colour: str, mark: str, tilt: int) -> Image.Image:
    """Draw one tile, RGB, TILE_PX square. Drawn once per process; callers must not write into it.

    Raises KeyError for a shape or colour, ValueError for a mark that does not exist.
    """
    if mark not in MARKS:
        raise ValueError(f"mark is {mark!r}; expected one of {', '.join(MARKS)}")
    tile = _card()
    figure = Image.new("RGBA", tile.size)
    _draw_shape(ImageDraw.Draw(figure), SHAPES[shape](), COLOURS[colour])
    _draw_mark(ImageDraw.Draw(figure), mark)
    figure = figure.rotate(tilt, Image.Resampling.BICUBIC)
    tile.paste(figure, (0, 0), figure)
    return tile.resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)


@cache
def _blank_card() -> Image.Image:
    """Draw the empty card with its soft shadow on the page, oversampled."""
    side = TILE_PX * OVERSAMPLE
    margin, corner, drop = side * 0.07, side * 0.15, side * 0.018
    box = (margin, margin, side - margin, side - margin)
    shade = Image.new("L", (side, side))
    ImageDraw.Draw(shade).rounded_rectangle([v + drop * (i % 2) for i, v in enumerate(box)], corner, fill=80)
    shade = shade.filter(ImageFilter.GaussianBlur(side * 0.014))
    tile = Image.new("RGB", (side, side), PAGE)
    tile.paste(SHADOW, (0, 0), shade)
    ImageDraw.Draw(tile).rounded_rectangle(box, corner, fill=CARD)
    return tile


def _card() -> Image.Image:
    return _blank_card().copy()


def _draw_shape(draw: ImageDraw.ImageDraw, outline: list[Point], colour: tuple[int, int, int]) -> None:
    """Fill the outline and trace it with a darker, round-cornered line."""
    middle, unit = TILE_PX * OVERSAMPLE / 2, TILE_PX * OVERSAMPLE * 0.3
    points = [(middle + unit * x, middle + unit * y) for x, y in outline]
    edge = tuple(round(0.74 * channel) for channel in colour)
    width = round(TILE_PX * OVERSAMPLE * 0.03)
    draw.polygon(points, fill=colour)
    draw.line([*points, points[0], points[1]], fill=edge, width=width, joint="curve")


def _draw_mark(draw: ImageDraw.ImageDraw, mark: str) -> None:
    middle, unit = TILE_PX * OVERSAMPLE / 2, TILE_PX * OVERSAMPLE * 0.09
    width = round(unit * 0.42)

    def round_box(radius: float) -> tuple[float, float, float, float]:
        return (middle - radius, middle - radius, middle + radius, middle + radius)

    if mark == "dot":
        draw.ellipse(round_box(unit * 0.8), fill=INK)
    elif mark == "ring":
        draw.ellipse(round_box(unit * 1.2), outline=INK, width=width)
    elif mark == "cross":
        for direction in (-1, 1):
            ends = [(middle - unit, middle - direction * unit), (middle + unit, middle + direction * unit)]
            draw.line(ends, fill=INK, width=width)
            for x, y in ends:
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=INK)
