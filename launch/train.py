"""Stage 1 (verbalize, then cache) and stage 2 (interact, then reinforce) of one recipe, under DeepSpeed.

    deepspeed launch/train.py --stage 1 --recipe recipes/demo.yaml
    deepspeed launch/train.py --stage 2 --recipe recipes/demo.yaml

Run the same command again to go on where a stopped run left off; a complete one says so and exits 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.output import add_output_arguments, choose_output

STAGES = {1: ("verbalize", "cache"), 2: ("interact", "reinforce")}


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--stage", type=int, choices=STAGES, required=True, help="1: both models; 2: the student alone")
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="the run's YAML (recipes/)")
    parser.add_argument("--only", choices=[s for steps in STAGES.values() for s in steps], help="one step of the stage")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override values of the recipe, as in --set interact.steps=100 seed=1",
    )  # fmt: skip
    parser.add_argument(
        "--stop-after", type=int, metavar="N", help="checkpoint and stop cleanly after N updates of this invocation"
    )
    add_output_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    asked = parser()
    options = asked.parse_args(arguments)
    if options.only and options.only not in STAGES[options.stage]:
        asked.error(f"--only {options.only} is no step of stage {options.stage}: {', '.join(STAGES[options.stage])}")
    if options.stop_after is not None and options.stop_after < 1:
        asked.error(f"--stop-after {options.stop_after}: expected at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Parse, check everything that can be checked without a model, then run the stage's steps."""
    options = parse(arguments)
    choose_output(options)
    from pipeline.job import run_steps

    steps = (options.only,) if options.only else STAGES[options.stage]
    return run_steps(options.recipe, options.overrides, steps, stop_after=options.stop_after, verbose=options.verbose)


if __name__ == "__main__":
    sys.exit(main())
