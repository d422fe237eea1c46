"""One invocation of launch/train.py or launch/cache.py: check everything, join the other ranks, run the steps."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from data_prep.lock import lock_file
from data_prep.schema import DataError as ShardError
from data_prep.shards import write_file
from pipeline.errors import UserError
from pipeline.recipe.checks import check_recipe
from pipeline.recipe.resolve import Resolved, load_recipe, refuse_another_student, refuse_changes

if TYPE_CHECKING:
    from pipeline.runtime.ranks import Ranks

USER_ERROR, FAILURE = 2, 1

ANOTHER_RUN = "end it; or give this job a folder of its own: --set run=FOLDER"
"""What to do, besides to wait, where two jobs want one step of one run."""

ANOTHER_RANK_S = 3.0
"""How long a rank other than 0 waits before it prints its error: an error of all ranks is then printed once, by 0."""
LAST_RANKS_S = 15.0
"""How long a start waits for the ranks of a job that was killed: they end within seconds."""
LAUNCHER_S = 30.0
"""How long a rank that only lost its connection waits for the launcher to end it, with the exit code of the cause."""


def run_steps(
    recipe: Path,
    overrides: Iterable[str],
    steps: Sequence[str],
    stop_after: int | None = None,
    shards: tuple[int, int] | None = None,
    only_missing: bool = False,
    verbose: bool = False,
) -> int:
    """Run steps in order on this rank; returns the exit code: 0, 2 for what the user can put right, 1 for the rest."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        resolved = prepare(recipe, overrides, steps, world)
        _run(resolved, steps, stop_after, shards, only_missing, verbose)
        return _exit(0)
    except (UserError, ShardError) as error:
        _print_error(rank, f"rank {rank}: error: {error}" if rank else f"error: {error}")
        return _exit(USER_ERROR)
    except Exception as error:
        _print_failure(rank, error)
        return _exit(FAILURE)


def prepare(recipe: Path, overrides: Iterable[str], steps: Sequence[str], world: int) -> Resolved:
    """Read and check the recipe, before any model is loaded. Raises RecipeError with every problem."""
    from pipeline.runtime.folder import begun_steps

    resolved = load_recipe(recipe, overrides)
    check_recipe(resolved.recipe, steps, world)
    refuse_another_student(resolved.recipe)
    refuse_changes(resolved, begun_steps(resolved.recipe.run))
    return resolved


def _run(resolved: Resolved, steps, stop_after, shards, only_missing, verbose) -> None:
    from pipeline.runtime import engine
    from pipeline.runtime.launcher import end_with_the_launcher
    from pipeline.runtime.loop import Job, Stopped
    from pipeline.steps import interact, reinforce, verbalize
    from pipeline.steps.cache import step as cache
    from pipeline.vlm.attention import check_attention

    end_with_the_launcher()
    ranks = engine.start(verbose)
    check_attention(resolved.recipe.attention, engine.dtype_of(resolved.recipe))  # before the hashing, not only loading
    job = Job(resolved.recipe, ranks, stop_after)
    if ranks.first:
        write_file(resolved.recipe.run / "recipe.yaml", resolved.to_yaml().encode())
    for line in resolved.inherited():
        job.say(line)
    _choose_kernels(job, engine.dtype_of(job.recipe))
    hosted = None
    try:
        for step in steps:
            if step == "cache":  # many jobs may fill one cache
                cache.run(job, hosted, shards, only_missing)
                continue
            with _alone(resolved.recipe.run, step, ranks):
                if step == "verbalize":
                    hosted = verbalize.run(job)
                else:
                    {"interact": interact, "reinforce": reinforce}[step].run(job)
    except Stopped as stopped:
        job.say(str(stopped))
    engine.stop()


@contextlib.contextmanager
def _alone(run: Path, step: str, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a run's step, on rank 0. Raises ShardError where another job that lives holds it."""
    from pipeline.runtime.ranks import on_first_rank

    with contextlib.ExitStack() as held:
        lock = lock_file(run / f".{step}.lock", f"{step} of {run}", ANOTHER_RUN, wait_s=LAST_RANKS_S)
        on_first_rank(ranks, f"{step}: waiting for another job to end", lambda: held.enter_context(lock))
        yield


def _choose_kernels(job, dtype) -> None:
    """Each rank checks the kernels that it could use; then all use the same. Rank 0 keeps it for `status`."""
    from pipeline.loss import kernels
    from pipeline.runtime.folder import write_kernels
    from pipeline.runtime.ranks import gather_lists

    asked, _ = kernels.setting(job.recipe.kernels)
    found = gather_lists([kernels.find(asked, job.ranks.device, dtype)])
    choice = kernels.settle(found, job.recipe.kernels)
    kernels.use(choice)
    job.say(f"{'warning: ' if choice.failed else ''}kernels: {choice}")
    if job.ranks.first:
        write_kernels(job.recipe.run, str(choice))


def _exit(code: int) -> int:
    """End the process at once under a launcher; elsewhere return the exit code.

    After a failure other ranks may be waiting in a collective for this one. After success, a thread of the
    communication library now and then outlives the process group and aborts the interpreter on its way out ("terminate
    called without an active exception", seen on gloo): all work is done by then, but the next job would not start.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _print_failure(rank: int, error: Exception) -> None:
    """Print a traceback; of a connection that another rank's end broke, one line, and only if nobody ends this rank."""
    from pipeline.runtime.ranks import lost_connection

    if lost_connection(error):
        time.sleep(LAUNCHER_S)
        text = f"rank {rank} lost its connection to another rank, which failed before it: {str(error).splitlines()[0]}"
        Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)
    else:
        _print_error(rank, f"rank {rank} failed: {type(error).__name__}: {error}\n\n{traceback.format_exc()}")


def _print_error(rank: int, text: str) -> None:
    """Rank 0 prints at once; another rank only if the launcher has not ended it by then."""
    if rank:
        time.sleep(ANOTHER_RANK_S)
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)
