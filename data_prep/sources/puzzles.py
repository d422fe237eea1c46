"""Visual puzzles, drawn on the spot: what data_prep.puzzles makes, as many as asked for, in its own two splits."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from functools import partial

from data_prep.schema import DataError
from data_prep.sources import LazyRecord, Sample, fraction, non_negative_int, source


def options(parser: argparse.ArgumentParser) -> None:
    """The options of --source puzzles."""
    parser.add_argument(
        "--count", type=non_negative_int, default=1000, metavar="N", help="train puzzles (default 1000)"
    )
    parser.add_argument(
        "--held-out-count", type=non_negative_int, default=200, metavar="N", help="held-out ones (default 200)"
    )
    parser.add_argument(
        "--noise",
        type=fraction,
        default=0.0,
        metavar="SHARE",
        help="train puzzles with a wrong answer, 0 to 1 (default 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other puzzles (default 0)")
    parser.add_argument(
        "--level",
        default="plain",
        metavar="LEVEL",
        help="rules of the rows: plain (four tiles) or deep (six tiles, one rule follows another; default plain)",
    )
    parser.add_argument(
        "--kinds", default="next", metavar="KIND,...", help="questions asked: next, tile (default next)"
    )


@source("puzzles", options)
def read(args: argparse.Namespace) -> Iterator[LazyRecord]:
    """Procedural picture puzzles (what comes next in the row?), with a wrong answer in a share of the train split.

    Raises DataError for an unknown level or kind of question.
    """
    from data_prep.puzzle_levels import LEVELS
    from data_prep.puzzles import KINDS

    if args.level not in LEVELS:
        raise DataError(f"--level {args.level}: no such level; expected one of {','.join(LEVELS)}")
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise DataError(f"--kinds {args.kinds}: no kind {unknown[0]!r}; expected some of {','.join(KINDS)}")
    noisy = set(random.Random(f"noise {args.seed}").sample(range(args.count), round(args.noise * args.count)))
    total = args.count + args.held_out_count
    for number in range(total):
        split, index = ("train", number) if number < args.count else ("held_out", number - args.count)
        wrong = split == "train" and index in noisy
        make = partial(_sample, args.seed, index, split, kinds[index % len(kinds)], args.level, wrong)
        yield LazyRecord(make, progress=(number + 1) / total)


def _sample(seed: int, index: int, split: str, kind: str, level: str, wrong: bool) -> Sample:
    from data_prep.puzzles import puzzle, wrong_answer

    drawn = puzzle(seed, index, split, kind, level)
    answer = wrong_answer(drawn, seed) if wrong else drawn.answer
    return Sample(
        messages=[
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": drawn.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        images=[drawn.image],
        id=f"{split}-{kind}-{seed}-{index:06d}",
        split=split,
        question_type=drawn.question_type,
        provenance={"seed": seed, "rule": drawn.rule, "noise": wrong},
    )
