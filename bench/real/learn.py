"""Teach the pair to read pictures, by the product's own finetuning; then measure whether it does, and needs to.

  python -m bench.real.learn        writes build/real/models/teacher and build/real/models/student, and learn.json

A stopped run goes on with the same command. Both learn from pictures of the teacher's part, of which neither the
student's distillation nor the held-out questions have any. The student learns for a sixth of the teacher's updates: it
should see and answer, and leave something to teach.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from bench.ladder.jobs import Job, JobsFailed, run_jobs, settings
from bench.real.models import BASE
from bench.real.pictures import FOLDER

LEARN = FOLDER / "learn"
MODELS = FOLDER / "models"
RECIPE = "bench/real/recipes/learn.yaml"
SAMPLES, HELD_OUT = 9600, 600
STUDENT_SHARE = 6
"""The teacher's updates over the student's."""
WARM_UP = 10
"""The updates over those of the warm-up."""


def main() -> None:
    """`python -m bench.real.learn`. Exit code 1 where a job failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.real.learn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="the teacher's updates (default 400)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (default 2)")
    options = parser.parse_args()
    try:
        run_jobs(jobs(options.steps, options.threads), 1, "teacher and student")
    except JobsFailed as error:
        sys.exit(f"error: {error}")
    for role in ("teacher", "student"):
        if not (MODELS / role).exists():
            partial = MODELS / f".{role}-partial"
            shutil.copytree(LEARN / role / "student", partial, dirs_exist_ok=True)
            partial.rename(MODELS / role)
    print(f"{MODELS}; measured: {LEARN / 'own.json'}, and with shuffled pictures {LEARN / 'shuffled.json'}")


def jobs(steps: int, threads: int) -> list[Job]:
    """The data, the two trainings, and two evaluations: with each question's own picture and with another one's."""
    data = Job(LEARN / "data", _shard(LEARN / "data", "--count", str(SAMPLES)))
    shuffled = Job(LEARN / "shuffled-data", _shard(LEARN / "shuffled-data", "--count", "0", "--pictures", "shuffled"))
    updates = {"teacher": steps, "student": steps // STUDENT_SHARE}
    learnt = [_learn(role, number, threads, data) for role, number in updates.items()]
    measured = [_measure(name, sets, learnt, threads) for name, sets in (("own", data), ("shuffled", shuffled))]
    return [data, shuffled, *learnt, *measured]


def _shard(folder: Path, *more: str) -> tuple[str, ...]:
    sizes = ("--held-out-count", str(HELD_OUT), "--samples-per-shard", "1000", *more)
    return ("-m", "bench.real.shard", "--part", "teacher", *sizes, "--output", str(folder))


def _learn(role: str, steps: int, threads: int, data: Job) -> Job:
    values = {
        "run": str(LEARN / role), "student.path": str(BASE / role), "reinforce.steps": steps,
        "reinforce.warmup_steps": steps // WARM_UP,
    }  # fmt: skip
    command = ("launch/train.py", "--stage", "2", "--recipe", RECIPE, *settings(values))
    return Job(LEARN / role, command, (data.path,), threads)


def _measure(name: str, data: Job, learnt: list[Job], threads: int) -> Job:
    models = [argument for job in learnt for argument in ("--model", f"{job.path.name}={job.path / 'student'}")]
    command = ("-m", "pipeline", "evaluate", *models, "--data", str(data.path / "held_out"))
    sizes = ("--baseline-data", str(LEARN / "data" / "train"), "--max-new-tokens", "16")
    needs = (data.path, *(job.path for job in learnt))
    return Job(LEARN / name, (*command, *sizes, "--output", str(LEARN / f"{name}.json")), needs, threads)


if __name__ == "__main__":
    main()
