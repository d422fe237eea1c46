"""Submit a whole run to SLURM: data, stage 1, the teacher cache as a job array, stage 2, evaluate.

  python -m launch.submit --recipe recipes/NAME.yaml --nodes 4 --partition gpu --time 24:00:00
  python -m launch.submit --recipe recipes/NAME.yaml --nodes 4 --site site.yaml --time evaluate=02:00:00
  python -m launch.submit --recipe recipes/NAME.yaml --nodes 4 --time 24:00:00 --dry-run
  python -m launch.submit --recipe recipes/NAME.yaml --nodes 4 --time 24:00:00 -- \\
    --source llava --input FILE --images DIR --output DIR

Each job begins when the one before has ended well; where one fails, those behind it are cancelled. What is done already
is left out, so after a failure the same command submits the rest. What stands behind -- goes to
`python -m data_prep shard`; without it the shards are there.

A job that is preempted, whose node dies, or that comes near its time limit goes back to the queue and on from its last
checkpoint. So --time may be shorter than a step; without --time it is what `python -m pipeline plan` says.

The scripts lie in RUN/jobs/, where the jobs' output goes too; they are the plain ones of launch/slurm/ with this run's
header. `python -m pipeline status RUN` shows the jobs. docs/running_on_a_cluster.md describes the site file.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import RecipeError, UserError
from pipeline.results.argument_types import positive

TIME = re.compile(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})")


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="the run's YAML (recipes/)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override values of the recipe, in the jobs of stage 1, cache and stage 2",
    )  # fmt: skip
    parser.add_argument("--nodes", type=positive, required=True, metavar="N", help="nodes of stage 1 and stage 2")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs, and ranks (default: 8)")
    parser.add_argument("--cpus-per-gpu", type=positive, default=8, metavar="N", help="cores a rank (default: 8)")
    parser.add_argument("--partition", metavar="NAME", help="SLURM's partition (default: the site file's, or SLURM's)")
    parser.add_argument(
        "--time", type=time_limit, action="append", default=[], metavar="[JOB=]TIME",
        help="time limit as sbatch takes it, of all jobs, or of one: --time stage1=15:00:00 (default: from the plan)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-jobs", type=positive, metavar="N", help="tasks of the cache's array, a node each (default: --nodes)"
    )
    parser.add_argument("--data-ranks", type=positive, default=8, metavar="N", help="of data_prep (default: 8)")
    parser.add_argument("--site", type=Path, metavar="FILE", help="account, QOS, container, modules, environment")
    parser.add_argument("--dry-run", action="store_true", help="write the scripts, submit nothing")
    parser.add_argument("data_arguments", nargs="*", metavar="-- ARGUMENT", help="of python -m data_prep shard")
    return parser


def time_limit(text: str) -> tuple[str, str]:
    """ "24:00:00" -> ("", "24:00:00"), for all jobs; "stage1=24:00:00" -> ("stage1", "24:00:00")."""
    from launch.chain import NAMES

    name, equals, time = text.rpartition("=")
    if (equals and name not in NAMES) or not TIME.fullmatch(time):
        raise argparse.ArgumentTypeError(
            f"expected TIME or JOB=TIME, TIME as in 24:00:00 or 2-12:00:00, JOB of {', '.join(NAMES)}, found {text!r}"
        )
    return name, time


def main(arguments: list[str] | None = None) -> int:
    """Check, write the scripts, submit, show. Returns 0, or 2 with a message for what the user can put right."""
    options = parser().parse_args(arguments)
    try:
        _submit(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _submit(options: argparse.Namespace) -> None:
    from launch.chain import Machines, chain
    from launch.job_script import Request, render, script_path
    from launch.job_times import check_warning, planned_times
    from launch.site_file import read_site
    from pipeline.recipe.resolve import load_recipe

    site, recipe = read_site(options.site), load_recipe(options.recipe, options.overrides).recipe
    gpus = options.gpus_per_node
    machines = Machines(
        options.nodes, gpus, options.cpus_per_gpu, options.cache_jobs or options.nodes, options.data_ranks
    )
    jobs, left_out = chain(recipe, machines, bool(options.data_arguments))
    times = planned_times(recipe, jobs, site.gpu_tflops, site.network, dict(options.time))
    check_warning(times, site.warning_s)
    request = Request(
        recipe.run.resolve(), options.recipe.resolve(), options.overrides, options.partition, site,
        Path(sys.executable), Path.cwd(), options.data_arguments,
    )  # fmt: skip
    if not options.dry_run:
        _refuse_a_second_chain(request.run)
    for job in jobs:
        path = script_path(request.run, job)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(job, times[job.name], request), encoding="utf-8")
    ids = {} if options.dry_run else _send(request.run, jobs)
    _show(request.run, jobs, left_out, times, ids)


def _refuse_a_second_chain(run: Path) -> None:
    from pipeline.results.jobs import FOLDER, NO_ANSWER, job_states, read_jobs

    if shutil.which("sbatch") is None:
        raise RecipeError(
            "no sbatch here: run this on a login node of a SLURM cluster, add --dry-run to see the scripts, or start "
            "the steps without SLURM: deepspeed --hostfile hostfile launch/train.py --stage 1 --recipe RECIPE"
        )
    states = job_states(read_jobs(run))
    if unanswered := [f"{state.name} {state.id}" for state in states if state.state == NO_ANSWER]:
        raise RecipeError(
            f"SLURM does not say whether {run} has jobs in the queue: {', '.join(unanswered)}. "
            "A second chain beside them would train the same run. Run the same command again when squeue answers; if "
            f"they are surely gone, remove {run / FOLDER / 'jobs.json'} before"
        )
    if active := [state for state in states if state.active]:
        numbers = " ".join(state.id for state in active)
        raise RecipeError(
            f"{run} has jobs in the queue already: {', '.join(f'{s.name} {s.id} ({s.state})' for s in active)}. "
            f"Wait for them, or end them: scancel {numbers}"
        )


def _send(run: Path, jobs: Sequence) -> dict[str, str]:
    """Submit the jobs, each after the one before; {name: id}. Kept in the run folder after each, whatever follows."""
    from launch.job_script import output_pattern, script_path
    from pipeline.results.jobs import Job, write_jobs

    sent: list[Job] = []
    for job in jobs:
        after = [f"--dependency=afterok:{sent[-1].id}", "--kill-on-invalid-dep=yes"] if sent else []
        command = ["sbatch", "--parsable", *after, str(script_path(run, job))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RecipeError(_refused(job.name, command, done.stderr, sent))
        number = done.stdout.strip().partition(";")[0]  # with federated clusters: ID;CLUSTER
        sent.append(Job(job.name, number, output_pattern(run, job)))
        write_jobs(run, sent)
    return {job.name: job.id for job in sent}


def _refused(name: str, command: Sequence[str], said: str, sent: Sequence) -> str:
    before = f" The jobs before it are in the queue: scancel {' '.join(job.id for job in sent)}" if sent else ""
    return (
        f"SLURM refused the job {name}: {said.strip() or 'it says nothing'}\nThe command was: {' '.join(command)}; "
        f"account, partition, QOS and further options come from the site file (--site).{before}"
    )


def _show(run: Path, jobs: Sequence, left_out: dict[str, str], times: dict[str, str], ids: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from launch.chain import NAMES
    from launch.job_script import script_path

    table, needed = Table(title=str(run), title_justify="left"), {job.name: job for job in jobs}
    for heading in ("job", "id", "machines", "time", "after", "script"):
        table.add_column(heading, overflow="fold")
    before = ""
    for name in NAMES:
        if job := needed.get(name):
            script = os.path.relpath(script_path(run, job), run)
            table.add_row(name, ids.get(name, "not sent"), job.machines, times[name], before, script)
            before = name
        else:
            table.add_row(name, "", left_out[name], "", "", "")
    console = Console(highlight=False)
    console.print(table)
    following = f"python -m pipeline status {run} --watch" if ids else "submit: the same command without --dry-run"
    console.print(following if jobs else "nothing to do: all is done", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
