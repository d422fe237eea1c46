"""Before a job: are all ranks reached, alike, and is there room for what the recipe needs?

    deepspeed --hostfile hostfile launch/preflight.py --recipe recipes/NAME.yaml
    srun launch/slurm/as_rank.sh python launch/preflight.py --recipe recipes/NAME.yaml
    python -m launch.preflight --recipe recipes/NAME.yaml

Start it as the training is started: by deepspeed, torchrun, mpirun or srun; alone it looks at this machine only. It
joins the ranks, compares commits and versions, looks at and writes to the shared paths, holds disk, memory, /dev/shm
and GPU memory against the plan, lets each GPU compute, and sums over all ranks. One line each; the exit code is 2 where
a line says WRONG; one that says note stops nothing. It takes under a minute once all ranks are there, for which it
waits as long as a training does.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.results.preflight.facts import Facts
    from pipeline.results.preflight.judge import Finding
    from pipeline.results.preflight.needs import Needs
    from pipeline.results.preflight.together import Deadline

WRONG = 2
STEPS = ("verbalize", "cache", "interact", "reinforce")


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/preflight.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="the run's YAML (recipes/)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override values of the recipe",
    )  # fmt: skip
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, metavar="STEP",
        help=f"what the job will run, of {', '.join(STEPS)} (default: what is not done)",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="let libraries log what they like")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Look, judge, print. Does not return under a launcher."""
    options = parser().parse_args(arguments)
    from pipeline.errors import REQUEUE_EXIT, UserError
    from pipeline.results.preflight.together import Deadline
    from pipeline.runtime.display.logs import filter_logs
    from pipeline.runtime.launcher import end_with_the_launcher

    # Nothing is begun yet, so a job that is asked to end now may simply be started again.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(REQUEUE_EXIT))
    filter_logs(options.verbose)
    end_with_the_launcher()
    deadline = Deadline(WRONG)
    try:
        right = _preflight(options, deadline)
    except UserError as error:
        return _end(WRONG, f"error: {error}")
    except Exception as error:  # a broken driver or network says it in its own way
        return _end(WRONG, f"WRONG {deadline.at}: {type(error).__name__}: {error}\n\n{traceback.format_exc()}")
    deadline.call_off()
    return _end(0 if right else WRONG)


def _preflight(options: argparse.Namespace, deadline: Deadline) -> bool:
    """Whether all is right, the same on all ranks. Rank 0 prints."""
    from pipeline.recipe.resolve import load_recipe
    from pipeline.results.preflight.facts import look, paths_of, written_by
    from pipeline.results.preflight.judge import judge
    from pipeline.results.preflight.together import JOIN_S, JOINING, LIMIT_S, share_folder, sum_together
    from pipeline.runtime import engine
    from pipeline.runtime.folder import done
    from pipeline.runtime.node import loader_workers, rank_share
    from pipeline.runtime.ranks import gather_lists

    recipe = load_recipe(options.recipe, options.overrides).recipe
    steps = options.steps or [
        step for step in STEPS if step not in recipe.left_to_another_run() and not done(recipe.run / step)
    ]
    deadline.begin(JOINING, JOIN_S)
    ranks = engine.start(options.verbose)
    deadline.begin(f"looking at {recipe.run} and what {options.recipe} names", LIMIT_S)
    own = look(recipe, paths_of(recipe, steps), ranks.rank, ranks.device)
    unwritable = {key: share_folder(folder, ranks) for key, folder in written_by(recipe, steps).items()}
    facts = gather_lists([replace(own, unwritable=unwritable)])
    deadline.at = "summing over all ranks"
    summed = sum_together(ranks)
    deadline.at = "planning what the recipe needs"
    workers = max(gather_lists([loader_workers(recipe.data.workers, rank_share())]))
    findings = []
    if ranks.first:
        problems, needed = _needs(options, steps, facts, workers)
        findings = [*judge(facts, needed), summed, *problems]
        print("\n".join(map(str, findings)), flush=True)
    (right,) = gather_lists([all(finding.right for finding in findings)] if ranks.first else [])
    engine.stop()
    return right


def _needs(
    options: argparse.Namespace, steps: list[str], facts: list[Facts], workers: int
) -> tuple[list[Finding], Needs | None]:
    """(what is wrong with the recipe itself, what it needs or None)."""
    from pipeline.errors import UserError
    from pipeline.job import prepare
    from pipeline.results.preflight.judge import Finding
    from pipeline.results.preflight.needs import needs

    per_node = max(sum(f.host == fact.host for f in facts) for fact in facts)
    try:
        recipe = prepare(options.recipe, options.overrides, steps, len(facts)).recipe
        # As many loader workers as these machines have cores for: the plan counts with the most there may be.
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
        found = Finding("recipe", True, f"{options.recipe}: {', '.join(steps) or 'all is done'}")
        return [found], needs(recipe, steps, len(facts), per_node)
    except UserError as error:
        return [Finding("recipe", False, str(error).replace("\n", " "), f"correct {options.recipe}")], None


def _end(code: int, text: str = "") -> int:
    from pipeline.runtime.launcher import leave

    if text:
        print(text, file=sys.stderr)
    return leave(code)


if __name__ == "__main__":
    sys.exit(main())
