"""The methods that are compared, as commands; the pairs of models with their data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.ladder.arms import BY_NAME
from bench.ladder.cells import TASKS, Task
from bench.ladder.jobs import settings

SHARED = ("bench/peers/chats.py", "bench/peers/settings.py")


@dataclass(frozen=True)
class Size:
    """How much is trained and evaluated."""

    samples: int
    held_out: int
    updates: int
    stage_1: int
    """Updates of the verbalizers."""


@dataclass(frozen=True)
class Pair:
    """Teacher and student, and what the student learns."""

    task: Task
    text: str
    """The samples, for the table."""
    learning_rate: float
    """The recipe's, for all methods: none has a sweep here. bench.ladder sweeps it for each."""
    sizes: Mapping[str, Size]
    bf16: bool = False

    def model(self, role: str) -> Path:
        """Folder of the teacher or the student."""
        return Path(self.task.models, role)


PAIRS: Mapping[str, Pair] = {
    "puzzles": Pair(
        TASKS["puzzles"], "puzzles", 3e-3,
        {"full": Size(1000, 500, 300, 120), "small": Size(1000, 500, 100, 40), "smoke": Size(64, 16, 4, 2)},
    ),
    "real": Pair(
        TASKS["real"], "questions on pictures", 3e-4,
        {"full": Size(1200, 600, 150, 75), "small": Size(1200, 600, 75, 40), "smoke": Size(64, 16, 2, 2)},
        bf16=True,
    ),
}  # fmt: skip


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


def data_command(pair: Pair, size: Size, seed: int, output: Path) -> list[str]:
    """Shards of the pair's samples, 40 % of the training answers wrong."""
    return [
        *pair.task.shard, "--noise", "0.4", "--seed", str(seed), "--count", str(size.samples),
        "--held-out-count", str(size.held_out), "--samples-per-shard", "100", "--output", str(output),
    ]  # fmt: skip


def stage_1_command(pair: Pair, size: Size, seed: int, place: Path) -> list[str]:
    """Ours: verbalizers and the teacher's cache."""
    values = {**_common(pair, seed, place, "stage_1"), "verbalize.steps": size.stage_1}
    values["verbalize.micro_batch_size"] = pair.task.micro_batch_size
    return ["launch/train.py", "--stage", "1", "--recipe", pair.task.recipe, *settings(values)]


def train_command(pair: Pair, method: Method, updates: int, seed: int, place: Path, name: str) -> list[str]:
    """Train the student into place/NAME/student."""
    if method.program:
        models = ["--student", str(pair.model("student"))]
        if "gkd" in method.name:
            models += ["--teacher", str(pair.model("teacher"))]
        return [
            "-m", method.program, *models, "--data", str(place / "data" / "train"), "--output", str(place / name),
            "--updates", str(updates), "--learning-rate", str(pair.learning_rate), "--seed", str(seed),
            "--batch-size", str(pair.task.micro_batch_size), *(["--bf16"] if pair.bf16 else []),
        ]  # fmt: skip
    values = {**_common(pair, seed, place, name), **BY_NAME[method.arm].settings(updates, pair.learning_rate, 1.0)}
    values |= {f"{step}.micro_batch_size": pair.task.micro_batch_size for step in ("interact", "reinforce")}
    if method.stage_1:
        values["stage_1"] = str(place / "stage_1")
    return ["launch/train.py", "--stage", "2", "--recipe", pair.task.recipe, *settings(values)]


def evaluate_command(pair: Pair, names: list[str], place: Path) -> list[str]:
    """Exact match of the students, the teacher and the untouched student on the held-out samples."""
    untrained = {"teacher": pair.model("teacher"), "untouched": pair.model("student")}
    models = {**untrained, **{name: place / name / "student" for name in names}}
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


def lines_written(pair: Pair, method: Method) -> int:
    """Lines that a user writes: of a peer its programs', of ours the recipe's and one command for each stage.

    Without empty lines, comments and docstrings.
    """
    if method.files:
        return sum(_code_lines(Path(file)) for file in method.files)
    lines = Path(pair.task.recipe).read_text().splitlines()
    recipe = [line for line in lines if line.strip() and not line.strip().startswith("#")]
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


def _common(pair: Pair, seed: int, place: Path, name: str) -> dict[str, object]:
    data = place / "data"
    return {
        "run": str(place / name), "seed": seed, "data.train": str(data / "train"),
        "data.held_out": str(data / "held_out"), **pair.task.common,
    }  # fmt: skip
