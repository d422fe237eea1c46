"""The methods that are compared, as commands; the demo's pair and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.ladder.arms import BY_NAME
from bench.ladder.jobs import settings

RECIPE = Path("recipes/demo.yaml")
TEACHER, STUDENT = Path("demo/models/puzzles/teacher"), Path("demo/models/puzzles/student")
SHARED = ("bench/peers/chats.py", "bench/peers/settings.py")
LEARNING_RATE = 3e-3
"""The demo's, for all methods: none has a sweep here. bench.ladder sweeps it for each."""


@dataclass(frozen=True)
class Size:
    """How much is trained and evaluated."""

    samples: int
    held_out: int
    updates: int
    stage_1: int
    """Updates of the verbalizers."""


SIZES: Mapping[str, Size] = {
    "full": Size(1000, 500, 300, 120),
    "small": Size(1000, 500, 100, 40),
    "smoke": Size(64, 16, 4, 2),
}


@dataclass(frozen=True)
class Method:
    """One way to train the student."""

    name: str
    text: str
    """What it minimizes, for the table."""
    program: str = ""
    """Module of a peer; empty: ours."""
    arm: str = ""
    """The arm of the ladder that is ours."""
    stage_1: bool = False
    """Whether it needs ours' stage 1, whose time it is then charged with."""
    files: tuple[str, ...] = ()
    """Files that a user of a peer writes."""


METHODS = (
    Method(
        "trainer_finetune", "transformers' Trainer: cross-entropy on the given answers", "bench.peers.finetune",
        files=(*SHARED, "bench/peers/finetune.py"),
    ),
    Method(
        "trainer_gkd_loss", "TRL's GKD loss, beta = 0, in the Trainer: KL of the last layer, teacher in memory",
        "bench.peers.gkd_loss",
        files=(*SHARED, "bench/peers/gkd_loss.py"),
    ),
    Method("ours_finetune", "the same as the first, by this project", arm="finetune"),
    Method("ours_last_layer", "KL of the last layer, from the cache", arm="last_layer", stage_1=True),
    Method("ours_paper", "the paper: interaction, then finetuning", arm="paper", stage_1=True),
    Method("ours_interaction", "interaction to the end", arm="interaction", stage_1=True),
)  # fmt: skip
BY_METHOD = {method.name: method for method in METHODS}


def data_command(size: Size, seed: int, output: Path) -> list[str]:
    """Shards of puzzles, 40 % of the training answers wrong."""
    return [
        "-m", "data_prep", "shard", "--source", "puzzles", "--noise", "0.4", "--seed", str(seed),
        "--count", str(size.samples), "--held-out-count", str(size.held_out), "--samples-per-shard", "100",
        "--output", str(output),
    ]  # fmt: skip


def stage_1_command(size: Size, seed: int, place: Path) -> list[str]:
    """Ours: verbalizers and the teacher's cache."""
    values = {**_common(seed, place, "stage_1"), "verbalize.steps": size.stage_1, "verbalize.micro_batch_size": 32}
    return ["launch/train.py", "--stage", "1", "--recipe", str(RECIPE), *settings(values)]


def train_command(method: Method, updates: int, seed: int, place: Path, name: str) -> list[str]:
    """Train the student into place/NAME/student."""
    if method.program:
        models = ["--student", str(STUDENT), *(["--teacher", str(TEACHER)] if "gkd" in method.name else [])]
        return [
            "-m", method.program, *models, "--data", str(place / "data" / "train"), "--output", str(place / name),
            "--updates", str(updates), "--learning-rate", str(LEARNING_RATE), "--seed", str(seed),
        ]  # fmt: skip
    values = {**_common(seed, place, name), **BY_NAME[method.arm].settings(updates, LEARNING_RATE, 1.0)}
    values |= {"interact.micro_batch_size": 32, "reinforce.micro_batch_size": 32}
    if method.stage_1:
        values["stage_1"] = str(place / "stage_1")
    return ["launch/train.py", "--stage", "2", "--recipe", str(RECIPE), *settings(values)]


def evaluate_command(names: list[str], place: Path) -> list[str]:
    """Exact match of the students, the teacher and the untouched student on the held-out samples."""
    models = {"teacher": TEACHER, "untouched": STUDENT, **{name: place / name / "student" for name in names}}
    named = [word for name, folder in models.items() for word in ("--model", f"{name}={folder}")]
    return [
        "-m", "pipeline", "evaluate", *named, "--data", str(place / "data" / "held_out"), "--batch-size", "100",
        "--max-new-tokens", "12", "--output", str(place / "evaluation.json"),
    ]  # fmt: skip


def step_seconds(method: Method, place: Path, name: str, log: Path) -> float:
    """Wall seconds of an update, data included: the run's mean."""
    if method.program:
        metrics = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"train_runtime"')]
        return 1 / float(metrics[-1]["train_steps_per_second"])
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["update_s"] for line in lines if "update_s" in line]
    return sum(seconds) / len(seconds)


def lines_written(method: Method) -> int:
    """Lines that a user writes: of a peer its programs', of ours the recipe's and one command for each stage.

    Without empty lines, comments and docstrings.
    """
    if method.files:
        return sum(_code_lines(Path(file)) for file in method.files)
    recipe = [line for line in RECIPE.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    return len(recipe) + (2 if method.stage_1 else 1)


def _code_lines(path: Path) -> int:
    lines, inside = 0, False
    for line in (text.strip() for text in path.read_text().splitlines()):
        quotes = line.count('"""')
        if inside or quotes:
            inside ^= quotes == 1
        elif line and not line.startswith("#"):
            lines += 1
    return lines


def _common(seed: int, place: Path, name: str) -> dict[str, object]:
    data = place / "data"
    return {
        "run": str(place / name), "seed": seed, "data.train": str(data / "train"),
        "data.held_out": str(data / "held_out"), "data.memory_mb": 256, "deepspeed": "ds_configs/zero0.json",
    }  # fmt: skip
