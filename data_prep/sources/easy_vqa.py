"""easy-VQA 1.0 (PyPI, by Victor Zhou): 5,000 pictures of one shape each, 48,248 questions, 13 answers."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from data_prep.images import read_image
from data_prep.schema import DataError
from data_prep.sources import LazyRecord, Sample, fraction, non_negative_int, source

ANSWERS = {
    "yes-no": ("yes", "no"),
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}
"""Question type -> its answers."""


def options(parser: argparse.ArgumentParser) -> None:
    """The options of --source easy-vqa."""
    parser.add_argument(
        "--count", type=non_negative_int, metavar="N", help="train questions, chosen by the seed (default: all 38,575)"
    )
    parser.add_argument(
        "--held-out-count", type=non_negative_int, metavar="N", help="held-out questions (default: all 9,673)"
    )
    parser.add_argument(
        "--noise", type=fraction, default=0.0, metavar="SHARE", help="train questions with a wrong answer (default 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which questions, and which are wrong (default 0)")
    parser.add_argument(
        "--types", default=",".join(ANSWERS), metavar="TYPE,...", help=f"question types (default {','.join(ANSWERS)})"
    )


@source("easy-vqa", options)
def read(args: argparse.Namespace) -> Iterator[LazyRecord]:
    """The easy-VQA package (pip install easy-vqa==1.0): shapes, colours and yes/no; its test split is held out.

    Raises DataError where the package is not installed, and for an unknown type of question.
    """
    types = args.types.split(",")
    if unknown := [kind for kind in types if kind not in ANSWERS]:
        raise DataError(f"--types {args.types}: no type {unknown[0]!r}; expected some of {','.join(ANSWERS)}")
    try:
        import easy_vqa
    except ImportError:
        raise DataError("--source easy-vqa needs the package: pip install easy-vqa==1.0") from None
    folder = Path(easy_vqa.__file__).parent / "data"
    train = _chosen(easy_vqa.get_train_questions(), types, args.count, args.seed)
    test = _chosen(easy_vqa.get_test_questions(), types, args.held_out_count, args.seed)
    wrong = set(random.Random(f"noise {args.seed}").sample(range(len(train)), round(args.noise * len(train))))
    questions = [(folder / "train", *asked) for asked in train] + [(folder / "test", *asked) for asked in test]
    for place, (images, number, question, answer, image) in enumerate(questions):
        make = partial(_sample, images / "images", number, question, answer, image, args.seed, place in wrong)
        yield LazyRecord(make, f"{images.name}/questions.json", progress=(place + 1) / len(questions))


def _chosen(
    columns: tuple[Sequence[str], Sequence[str], Sequence[int]], types: Sequence[str], wanted: int | None, seed: int
) -> list[tuple[int, str, str, int]]:
    """(number, question, answer, image) of as many questions of some types as are wanted, in the package's order."""
    questions, answers, images = columns
    known = {answer for kind in types for answer in ANSWERS[kind]}
    numbers: Sequence[int] = [number for number, answer in enumerate(answers) if answer in known]
    if wanted is not None and wanted < len(numbers):
        numbers = sorted(random.Random(f"choice {seed}").sample(numbers, wanted))
    return [(number, questions[number], answers[number], images[number]) for number in numbers]


def _sample(folder: Path, number: int, question: str, answer: str, image: int, seed: int, wrong: bool) -> Sample:
    split = "train" if folder.parent.name == "train" else "held_out"
    question_type = next(name for name, answers in ANSWERS.items() if answer in answers)
    given = answer
    if wrong:
        given = random.Random(f"wrong {seed} {number}").choice(
            [other for other in ANSWERS[question_type] if other != answer]
        )
    return Sample(
        messages=[
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": given}]},
        ],
        images=[read_image(folder, f"{image}.png")],
        id=f"{split}-{number:05d}",
        split=split,
        question_type=question_type,
        provenance={"images": [f"{image}.png"], "seed": seed, "noise": wrong},
    )
