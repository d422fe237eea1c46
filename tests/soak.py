"""`make soak KILLS=20`: both stages, killed again and again at random moments; each run must end as one never killed.

Each job is started by DeepSpeed's launcher on two ranks. A while later SIGKILL hits a rank, all ranks, the launcher of
the node or the one that was started; nothing may be left running, and the same command goes on. What is compared in
the end: the student, byte for byte, and one line of metrics for each update.
"""

from __future__ import annotations

import argparse
import filecmp
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import tiny
from rich.console import Console
from running import ROOT, free_port, tiny_recipe

from pipeline.runtime.folder import read_metrics

UPDATES = 12
LEFT_AFTER_S = 60
"""How long processes of a job that was hit may live on: the others wait for a rank that lost its connection."""
VICTIMS = ("one rank", "all ranks", "the node's launcher", "the launcher")
SLOWEST_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=None, help="of victims and moments (default: another each time)")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    console, draw = Console(), random.Random(seed)
    console.print(f"seed {seed}: the same victims again with make soak ARGS='--seed {seed}'")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        recipe = _recipe(Path(folder))
        reference, lasted = Path(folder) / "never-killed", {}
        for stage in (1, 2):
            begun = time.monotonic()
            assert _finished(_start(recipe, stage, reference)), "the run without a kill failed"
            lasted[stage] = time.monotonic() - begun
        survived: Counter[str] = Counter()
        for number in range(1, args.kills + 1):
            run = Path(folder) / f"run-{number}"
            for stage in (1, 2):
                _through(recipe, stage, run, args.kills, lasted[stage], draw, survived)
            _compare(run, reference)
            console.print(f"{run.name}: equal to the run never killed; kills survived so far: {dict(survived)}")
            if survived.total() >= args.kills:
                break
    console.print(f"[bold]{survived.total()} kills survived[/] {dict(survived)}, nothing lost")
    return 0


def _through(
    recipe: Path, stage: int, run: Path, most: int, lasted: float, draw: random.Random, survived: Counter
) -> None:
    """A stage to its end, started again after each kill. Each try is hit at a moment within the stage's length."""
    while survived.total() < most:
        job = _start(recipe, stage, run)
        time.sleep(draw.uniform(0, lasted))
        if job.poll() is not None:
            break
        victim = draw.choice(VICTIMS)
        _hit(job, victim, draw)
        survived[victim] += 1
    assert _finished(_start(recipe, stage, run)), f"{run}: stage {stage} does not go on"


def _recipe(folder: Path) -> Path:
    models = {
        ("qwen2_vl", role): tiny.write_vlm(folder / "models" / role, "qwen2_vl", layers, 32, seed=layers)
        for role, layers in (("teacher", 6), ("student", 3))
    }
    step = {"steps": UPDATES, "checkpoint_every": 2}
    data = tiny.write_data(folder / "data", 24, shards=4)
    return tiny_recipe(folder, models, "qwen2_vl", data, verbalize=step, interact=step, reinforce=step)


def _start(recipe: Path, stage: int, run: Path) -> psutil.Popen:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_accelerators", "2"]
    program = ["launch/train.py", "--stage", str(stage), "--recipe", str(recipe), "--set", f"run={run}"]
    return psutil.Popen(
        [*launcher, "--master_port", str(free_port()), *program],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _finished(job: psutil.Popen) -> bool:
    return job.wait(timeout=SLOWEST_S) == 0


def _hit(job: psutil.Popen, victim: str, draw: random.Random) -> None:
    """SIGKILL; then nothing of the job may live on."""
    started = [job, *job.children(recursive=True)]
    commands = [(one, _command(one)) for one in started]
    ranks = [one for one, command in commands if "launch/train.py" in command[2:3]]
    node = [one for one, command in commands if "deepspeed.launcher.launch" in command]
    chosen = {
        "one rank": [draw.choice(ranks)] if ranks else [],
        "all ranks": ranks,
        "the node's launcher": node,
        "the launcher": [],
    }[victim]
    for one in chosen or [job]:  # it may not have started them yet
        one.kill()
    _, alive = psutil.wait_procs(started, timeout=LEFT_AFTER_S)
    assert not alive, f"{victim} was killed, and these live on: {[_command(one) for one in alive]}"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _compare(run: Path, reference: Path) -> None:
    # All but the model card, which names the run.
    names = sorted(f"student/{file.name}" for file in (reference / "student").iterdir() if file.name != "README.md")
    _, differing, missing = filecmp.cmpfiles(reference, run, names, shallow=False)
    assert not differing and not missing, f"{run}: {differing} differ from {reference}, {missing} are missing"
    for step in ("verbalize", "interact", "reinforce"):
        updates = [line["update"] for line in read_metrics(run, step)]
        assert updates == list(range(1, UPDATES + 1)), f"{run}: {step} has metrics of the updates {updates}"


if __name__ == "__main__":
    sys.exit(main())
