"""Fill the teacher cache alone: the teacher and its verbalizers, no student, no optimizer.

    deepspeed launch/cache.py --recipe recipes/demo.yaml
    deepspeed launch/cache.py --recipe recipes/demo.yaml --shards 0-99
    deepspeed launch/cache.py --recipe recipes/demo.yaml --only-missing

Needs the verbalizers of stage 1 (launch/train.py --stage 1 --only verbalize). Many such jobs, each with its own range
of shards, may fill one cache at once. A job that was killed loses at most the shards it was writing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.output import add_output_arguments, choose_output


def shard_range(text: str) -> tuple[int, int]:
    """'0-99' -> (0, 99), both included; '7' -> (7, 7)."""
    first, dash, last = text.partition("-")
    try:
        bounds = int(first), int(last if dash else first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected FIRST-LAST, as in 0-99, found {text!r}") from None
    if not 0 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"expected FIRST <= LAST, both from 0, found {text!r}")
    return bounds


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/cache.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="the run's YAML (recipes/)")
    parser.add_argument(
        "--shards", type=shard_range, metavar="FIRST-LAST", help="only these shards of data.train, counted from 0"
    )
    parser.add_argument(
        "--only-missing", action="store_true", help="verify the shards that exist by their hash, make the rest"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override values of the recipe, as in --set cache.batch_tokens=8192",
    )  # fmt: skip
    add_output_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return parser().parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, then cache."""
    options = parse(arguments)
    choose_output(options)
    from pipeline.job import run_steps

    return run_steps(
        options.recipe,
        options.overrides,
        ("cache",),
        shards=options.shards,
        only_missing=options.only_missing,
        verbose=options.verbose,
    )


if __name__ == "__main__":
    sys.exit(main())
