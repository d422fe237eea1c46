"""Questions about stamps, emoji and easy-VQA's pictures, through `data_prep shard`, as a source of its own.

  python -m bench.real.shard --count 1200 --noise 0.4 --held-out-count 600 --output data/real

A third each: easy-VQA's own questions on shapes and colours; which of nine groups a picture belongs to; what it is,
answered by its caption. Wrong answers are drawn from the answers of other samples of the same type.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.real.pictures import PICTURES, read_index
from data_prep import __main__ as data_prep
from data_prep.images import read_image
from data_prep.sources import LazyRecord, Sample, fraction, non_negative_int, source

TYPES = ("shape", "color", "group", "caption")
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
PROMPTS = {"group": "What kind of thing is in this picture?", "caption": "What is in this picture?"}
SHARES = {"shape": 1, "color": 1, "group": 2, "caption": 2}
"""Type -> its share of the samples, in sixths."""


@dataclass(frozen=True)
class Asked:
    """A question with its picture."""

    kind: str
    folder: Path
    file: str
    question: str
    answer: str
    wrong: bool = False


def options(parser: argparse.ArgumentParser) -> None:
    """The options of --source real."""
    parser.add_argument("--count", type=non_negative_int, default=1200, metavar="N", help="training samples")
    parser.add_argument("--held-out-count", type=non_negative_int, default=600, metavar="N", help="held-out samples")
    parser.add_argument(
        "--noise", type=fraction, default=0.0, metavar="SHARE", help="training samples answered wrongly"
    )
    parser.add_argument("--seed", type=int, default=0, help="which samples, and which are wrong (default 0)")
    parser.add_argument("--part", choices=("student", "teacher"), default="student", help="whose training pictures")
    parser.add_argument("--kinds", nargs="+", choices=TYPES, default=TYPES, help="types of question (default: all)")
    parser.add_argument(
        "--pictures",
        choices=("own", "shuffled"),
        default="own",
        help="shuffled: held-out questions show other pictures",
    )


@source("real", options)
def read(args: argparse.Namespace) -> Iterator[LazyRecord]:
    """Stamps, emoji and easy-VQA. Raises FileNotFoundError before bench.real.pictures has run."""
    rng = random.Random(f"real {args.part} {args.seed}")
    train = _with_noise(_chosen(args.part, args.kinds, args.count, rng), args.noise, rng)
    held_out = _chosen("held_out", args.kinds, args.held_out_count, random.Random(f"held out {args.seed}"))
    if args.pictures == "shuffled":
        held_out = _shuffled(held_out, rng)
    for split, asked in (("train", train), ("held_out", held_out)):
        for number, one in enumerate(asked):
            yield LazyRecord(partial(_sample, one, f"{split}-{number:05d}", split), one.file)


def _chosen(part: str, kinds: tuple[str, ...], count: int, rng: random.Random) -> list[Asked]:
    """As many questions of a part as are wanted, all types mixed by SHARES, drawn without repeating where enough."""
    total = sum(SHARES[kind] for kind in kinds)
    chosen: list[Asked] = []
    for kind in kinds:
        asked = easy_vqa_questions(part, kind) if kind in ("shape", "color") else _of_pictures(part, kind)
        rng.shuffle(asked)
        wanted = round(count * SHARES[kind] / total)
        chosen += [asked[place % len(asked)] for place in range(wanted)]
    rng.shuffle(chosen)
    return chosen


def easy_vqa_questions(part: str, kind: str) -> list[Asked]:
    """The package's questions; of its training pictures, teacher and student have one half each."""
    import easy_vqa

    folder = Path(easy_vqa.__file__).parent / "data"
    split, read = (
        ("test", easy_vqa.get_test_questions) if part == "held_out" else ("train", easy_vqa.get_train_questions)
    )
    answers = SHAPES if kind == "shape" else COLOURS
    return [
        Asked(kind, folder / split / "images", f"{image}.png", question, answer)
        for question, answer, image in zip(*read(), strict=True)
        if answer in answers and (part == "held_out" or image % 2 == ("teacher", "student").index(part))
    ]


def _of_pictures(part: str, kind: str) -> list[Asked]:
    return [
        Asked(kind, PICTURES, one.file, PROMPTS[kind], one.group if kind == "group" else one.caption)
        for one in read_index()
        if one.part == part
    ]


def _with_noise(asked: list[Asked], share: float, rng: random.Random) -> list[Asked]:
    """A share of them answered as another sample of the type is, which has another answer."""
    answers = {kind: [one.answer for one in asked if one.kind == kind] for kind in TYPES}
    wrong = set(rng.sample(range(len(asked)), round(share * len(asked))))

    def swapped(one: Asked) -> Asked:
        return replace(one, wrong=True, answer=rng.choice([a for a in answers[one.kind] if a != one.answer]))

    return [swapped(one) if place in wrong else one for place, one in enumerate(asked)]


def _shuffled(asked: list[Asked], rng: random.Random) -> list[Asked]:
    """Each question with the picture of another one of its type, in a random cycle: none keeps its own."""
    shown = list(asked)
    for kind in TYPES:
        places = [place for place, one in enumerate(asked) if one.kind == kind]
        rng.shuffle(places)
        for place, other in zip(places, places[1:] + places[:1], strict=True):
            shown[place] = replace(asked[place], folder=asked[other].folder, file=asked[other].file)
    return shown


def _sample(asked: Asked, name: str, split: str) -> Sample:
    return Sample(
        messages=[
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": asked.answer}]},
        ],
        images=[read_image(asked.folder, asked.file)],
        id=name,
        split=split,
        question_type=asked.kind,
        provenance={"images": [asked.file], "noise": asked.wrong},
    )


if __name__ == "__main__":
    sys.exit(data_prep.main(["shard", "--source", "real", *sys.argv[1:]]))
