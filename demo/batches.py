"""Training batches of the demo models: pictures, questions, answers, and labels of what the pictures show.

B pictures of a batch, R regions of a picture (its tiles, or the one shape of easy-VQA), A attributes of a region.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.puzzle_levels import LEVELS, VALUES, Tile
from data_prep.puzzles import ORDINALS, split_of
from data_prep.tile_art import TILTS, draw_tile


@dataclass(frozen=True)
class QuestionBatch:
    """A batch of pictures, each with one question."""

    pictures: Tensor
    """[B, 3, height, width] float32 in -1 .. 1, as large as the image processor makes them."""
    questions: list[str]
    answers: list[str]
    attributes: Tensor
    """[B, R, A] int64: which value each attribute of each region has."""


class BatchSource(Protocol):
    """Draws training batches without end, and makes held-out ones to measure the progress."""

    grid: tuple[int, int]
    """Rows and columns of image tokens."""
    values: tuple[int, ...]
    """How many values each of the A attributes has."""

    def draw(self, rng: random.Random, size: int) -> QuestionBatch:
        """Draw a training batch."""

    def held_out(self, size: int) -> QuestionBatch:
        """Make the held-out batch, the same one every time."""


class PuzzleBatches:
    """Rows of tiles from rule instances of the asked split; `next_share` of the questions ask what comes next."""

    values = tuple(len(values) for values in VALUES.values())

    def __init__(self, next_share: float, level: str = "plain"):
        self.next_share, self.level = next_share, LEVELS[level]
        self.grid = (2, 2 * self.level.row)
        self._index = {name: {value: i for i, value in enumerate(values)} for name, values in VALUES.items()}
        self._tiles = [Tile(s, c, m) for s in VALUES["shape"] for c in VALUES["colour"] for m in VALUES["mark"]]
        self._sprites = torch.stack([_sprite(tile, tilt) for tile in self._tiles for tilt in TILTS])

    def draw(self, rng: random.Random, size: int) -> QuestionBatch:
        """Draw a training batch."""
        return self._make(rng, size, "train", self.next_share)

    def held_out(self, size: int) -> QuestionBatch:
        """Make a batch of held-out rows, all asking what comes next where any training question does."""
        return self._make(random.Random("held out"), size, "held_out", 1.0 if self.next_share else 0.0)

    def _make(self, rng: random.Random, size: int, split: str, next_share: float) -> QuestionBatch:
        rows, questions, answers = [], [], []
        while len(rows) < size:
            rule = self.level.draw_rule(rng)
            if split_of(rule) != split:
                continue
            *row, after = self.level.tiles_of(rule)
            place = rng.randrange(self.level.row)
            asks_next = rng.random() < next_share
            rows.append(row)
            questions.append("What comes next?" if asks_next else f"What is the {ORDINALS[place]} tile?")
            answers.append(str(after if asks_next else row[place]))
        attributes = torch.tensor([[[self._index[n][v] for n, v in t._asdict().items()] for t in row] for row in rows])
        return QuestionBatch(self._pictures(attributes, rng), questions, answers, attributes)

    def _pictures(self, attributes: Tensor, rng: random.Random) -> Tensor:
        shape, colour, mark = attributes.unbind(-1)
        kind = (shape * self.values[1] + colour) * self.values[2] + mark
        tilt = torch.tensor([[rng.randrange(len(TILTS)) for _ in row] for row in attributes])
        sprites = self._sprites[kind * len(TILTS) + tilt]  # [B, R, 3, 32, 32]
        return sprites.permute(0, 2, 3, 1, 4).flatten(3)


class EasyVQABatches:
    """The easy-VQA package's own training questions; shapes mirrored and moved about, which changes no answer."""

    grid = (4, 4)
    values = (3, 8)
    shapes = ("circle", "rectangle", "triangle")
    colours = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

    def __init__(self) -> None:
        import easy_vqa  # an extra: needed for this pair only

        folder = Path(easy_vqa.__file__).parent / "data"
        self._train = _Questions(folder / "train" / "images", *easy_vqa.get_train_questions(), self)
        self._test = _Questions(folder / "test" / "images", *easy_vqa.get_test_questions(), self)

    def draw(self, rng: random.Random, size: int) -> QuestionBatch:
        """Draw a training batch, each shape moved elsewhere and perhaps mirrored."""
        chosen = [rng.randrange(len(self._train.questions)) for _ in range(size)]
        batch = self._train.pick(chosen)
        boxes = [self._train.boxes[self._train.images[i]] for i in chosen]
        moved = [_move(picture, box, rng) for picture, box in zip(batch.pictures, boxes, strict=True)]
        return QuestionBatch(torch.stack(moved), batch.questions, batch.answers, batch.attributes)

    def held_out(self, size: int) -> QuestionBatch:
        """Pick questions of the test split, evenly spread."""
        return self._test.pick(list(range(0, len(self._test.questions), len(self._test.questions) // size))[:size])


class _Questions:
    """One split of easy-VQA in memory."""

    def __init__(self, folder: Path, questions: Sequence[str], answers: Sequence[str], images: Sequence[int], names):
        self.questions, self.answers, self.images = questions, answers, images
        count = max(images) + 1
        self.pictures = torch.stack([_pixels(Image.open(folder / f"{i}.png")) for i in range(count)])
        self.boxes = [_box(picture) for picture in self.pictures]
        self.attributes = torch.full((count, 1, 2), -1)
        for answer, image in zip(answers, images, strict=True):
            for place, known in enumerate((names.shapes, names.colours)):
                if answer in known:
                    self.attributes[image, 0, place] = known.index(answer)

    def pick(self, chosen: Sequence[int]) -> QuestionBatch:
        images = torch.tensor([self.images[i] for i in chosen])
        questions = [self.questions[i] for i in chosen]
        return QuestionBatch(
            self.pictures[images], questions, [self.answers[i] for i in chosen], self.attributes[images]
        )


def _box(picture: Tensor) -> tuple[int, int, int, int]:
    """Find the shape on its plain background: top, left, bottom, right, the latter two exclusive."""
    background = picture.flatten(1).median(1).values
    there = ((picture - background[:, None, None]).abs() > 0.02).any(0)
    rows, columns = there.any(1).nonzero().flatten().tolist(), there.any(0).nonzero().flatten().tolist()
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def _move(picture: Tensor, box: tuple[int, int, int, int], rng: random.Random) -> Tensor:
    """Move the shape to any place where it is whole, and mirror the picture half of the time."""
    top, left, bottom, right = box
    down = rng.randint(-top, picture.shape[1] - bottom)
    across = rng.randint(-left, picture.shape[2] - right)
    moved = picture.roll((down, across), (1, 2))
    return moved.flip(2) if rng.random() < 0.5 else moved


def _sprite(tile: Tile, tilt: int) -> Tensor:
    """One tile as the image processor scales it: the page around it is flat, so a row can be scaled tile by tile."""
    return _pixels(draw_tile(*tile, tilt).resize((32, 32), Image.Resampling.BICUBIC))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
