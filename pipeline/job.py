"""One invocation of launch/train.py or launch/cache.py: check everything, join the other ranks, run the steps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.atomic import storage_fault
from data_prep.lock import lock_file
from data_prep.open_files import allow_open_files
from data_prep.schema import DataError as ShardError
from data_prep.shards import MANIFEST, write_file
from pipeline.errors import REQUEUE_EXIT, UserError
from pipeline.recipe.checks import check_recipe
from pipeline.recipe.resolve import (
    Resolved,
    load_recipe,
    refuse_another_student,
    refuse_another_teacher,
    refuse_changes,
)
from pipeline.runtime.faults.first_error import report, report_failure
from pipeline.runtime.faults.stop import Requeue, listen

if TYPE_CHECKING:
    from pipeline.recipe.schema import Recipe
    from pipeline.runtime.loop import Job
    from pipeline.runtime.ranks import Ranks

USER_ERROR, FAILURE = 2, 1

ANOTHER_RUN = "end it; or give this job a folder of its own: --set run=FOLDER"
"""What to do, besides to wait, where two jobs want one step of one run."""

LAST_RANKS_S = 15.0
"""How long a start waits for the ranks of a job that was killed: they end within seconds. See also
lock.DEAD_HOST_S."""


def run_steps(
    recipe: Path,
    overrides: Iterable[str],
    steps: Sequence[str],
    stop_after: int | None = None,
    shards: tuple[int, int] | None = None,
    only_missing: bool = False,
    verbose: bool = False,
) -> int:
    """Run steps in order on this rank; returns the exit code.

    It is 0, REQUEUE_EXIT after a request to stop, 2 for what the user can put right, 1 for the rest.
    """
    listen()
    try:
        resolved = prepare(recipe, overrides, steps, int(os.environ.get("WORLD_SIZE", 1)))
        return _exit(_run(resolved, steps, stop_after, shards, only_missing, verbose))
    except (UserError, ShardError) as error:
        report(f"error: {error}", USER_ERROR, *_place())
        return _exit(USER_ERROR)
    except Exception as error:
        if (fault := storage_fault(error)) is not None:
            report(f"error: {fault}", USER_ERROR, *_place())
            return _exit(USER_ERROR)
        report_failure(error, FAILURE, *_place())
        return _exit(FAILURE)


def _place() -> tuple[int, int]:
    """This rank and the number of ranks, as far as they are known: mpirun tells them only when the ranks meet."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def prepare(recipe: Path, overrides: Iterable[str], steps: Sequence[str], world: int) -> Resolved:
    """Read and check the recipe, before any model is loaded. Raises RecipeError with every problem."""
    from pipeline.runtime.folder import begun_steps

    resolved = load_recipe(recipe, overrides)
    check_recipe(resolved.recipe, steps, world)
    refuse_another_student(resolved.recipe)
    refuse_another_teacher(resolved.recipe)
    refuse_changes(resolved, begun_steps(resolved.recipe.run))
    return resolved


def _run(resolved: Resolved, steps, stop_after, shards, only_missing, verbose) -> int:
    """Join the other ranks and run the steps; returns the exit code, 0 or REQUEUE_EXIT."""
    from pipeline.runtime import engine
    from pipeline.runtime.faults import watch
    from pipeline.runtime.folder import clear_requeue, write_requeue
    from pipeline.runtime.launcher import end_with_the_launcher
    from pipeline.runtime.loop import Job, Stopped
    from pipeline.runtime.ranks import heed_stop
    from pipeline.runtime.shared_files import wait_for_files
    from pipeline.steps import interact, reinforce, verbalize
    from pipeline.steps.cache import step as cache
    from pipeline.vlm.attention import check_attention

    end_with_the_launcher()
    allow_open_files()
    ranks = engine.start(verbose, watch.limit_minutes(resolved.recipe.hang_minutes))
    watch.start(ranks.rank, ranks.world, resolved.recipe.hang_minutes)
    check_recipe(resolved.recipe, steps, ranks.world)  # again: mpirun says only now how many ranks there are
    wait_for_files(ranks, [folder / MANIFEST for folder in _data_folders(resolved.recipe, steps)])
    check_attention(resolved.recipe.attention, engine.dtype_of(resolved.recipe))  # before the hashing, not only loading
    job = Job(resolved.recipe, ranks, stop_after)
    if ranks.first:
        write_file(resolved.recipe.run / "recipe.yaml", resolved.to_yaml().encode())
        clear_requeue(resolved.recipe.run)
    for line in resolved.inherited():
        job.say(line)
    _choose_kernels(job, engine.dtype_of(job.recipe))
    hosted, code = None, 0
    try:
        for step in steps:
            heed_stop(f"{step}: not begun")
            if job.is_over():
                raise Stopped(f"stopped after {stop_after} updates, before {step}; the same command goes on from here")
            watch.doing(f"{step}: opening data and models", long=True)
            if step == "cache" and resolved.recipe.cache_from is not None:
                job.say(f"cache: that of {resolved.recipe.cache_from}, which stage 2 reads there")
                continue
            if step == "cache":  # many jobs may fill one cache
                _keep_environment(job, step)
                cache.run(job, hosted, shards, only_missing)
            else:
                with _alone(resolved.recipe.run, step, ranks):
                    _keep_environment(job, step)
                    if step == "verbalize":
                        hosted = verbalize.run(job)
                    else:
                        {"interact": interact, "reinforce": reinforce}[step].run(job)
            _keep_report(job)
    except Stopped as stopped:
        job.say(str(stopped))
        _keep_report(job)
    except Requeue as stopped:
        job.say(str(stopped))
        code = REQUEUE_EXIT
        if ranks.first:
            write_requeue(resolved.recipe.run, str(stopped))
        _keep_report(job)
    watch.stop()
    engine.stop()
    return code


def _data_folders(recipe: Recipe, steps: Sequence[str]) -> list[Path]:
    """The shard folders that the steps read."""
    measures = any(getattr(getattr(recipe, step), "evaluate_every", 0) for step in steps)
    folders = (*map(recipe.samples_of, steps), recipe.data.held_out if measures else None)
    return [folder for folder in dict.fromkeys(folders) if folder is not None]


@contextlib.contextmanager
def _alone(run: Path, step: str, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a run's step, on rank 0. Raises ShardError where another job that lives holds it."""
    from pipeline.runtime.ranks import on_first_rank

    with contextlib.ExitStack() as held:
        lock = lock_file(run / f".{step}.lock", f"{step} of {run}", ANOTHER_RUN, wait_s=LAST_RANKS_S)
        on_first_rank(ranks, f"{step}: waiting for another job to end", lambda: held.enter_context(lock))
        yield


def _keep_environment(job: Job, step: str) -> None:
    """Rank 0 writes what the step runs with: once no other job runs it."""
    if job.ranks.first:
        from pipeline.runtime.versions import keep_environment

        keep_environment(job.recipe.run, step, job.ranks.world, job.ranks.device)


def _keep_report(job: Job) -> None:
    """Rank 0 writes the run's report, where the recipe wants it; the others do not wait."""
    if job.ranks.first and job.recipe.report:
        from pipeline.results.report.run import keep_report
        from pipeline.runtime.faults import watch

        watch.doing("writing the report", long=True)
        keep_report(job.recipe.run)


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
    from pipeline.runtime.launcher import leave

    return leave(code)
