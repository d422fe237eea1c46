"""Which commands a cell takes: data, stage 1, the arms, their evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.ladder.arms import Arm
from bench.ladder.cells import Cell, Task
from bench.ladder.jobs import Job, settings

OTHER_TASK = 200
"""Samples of the task outside the training mix."""

UNTRAINED = {"teacher": "teacher", "untouched": "student"}
"""Models that are evaluated beside the arms -> their folders in the pair."""


@dataclass(frozen=True)
class Tried:
    """An arm with the settings that the sweep compares."""

    arm: Arm
    learning_rate: float
    factor: float = 1.0

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.arm.name}-{self.learning_rate:g}" + ("" if self.factor == 1 else f"-{self.factor:g}")


class SeedFolder:
    """The jobs and results of one seed of a cell."""

    def __init__(self, folder: Path, cell: Cell, seed: int, other_task: bool):
        """other_task: whether the task outside the training mix is evaluated too."""
        self.folder, self.cell, self.seed, self.other_task = folder / f"seed-{seed}", cell, seed, other_task

    def jobs(self, tried: Iterable[Tried]) -> list[Job]:
        """All jobs that the arms need, and the evaluation of those that have no result yet."""
        tried = list(tried)
        jobs = {job.path: job for one in tried for job in self._training(one)}
        jobs |= {job.path: job for job in self._evaluation([one.name for one in tried])}
        if self.cell.wrong and any(one.arm.stage_1_name == "stage-1" and one.arm.uses_stage_1 for one in tried):
            jobs[self._suspects().path] = self._suspects()
        return list(jobs.values())

    def results(self, kind: str = "held_out") -> dict[str, dict[str, Any]]:
        """{run name: results of `evaluate`} of all evaluations that are done; kind: held_out or other.

        Without those of a run that was removed, or made again since.
        """
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{kind}-*.done")):
            results = json.loads(path.with_suffix(".json").read_text())
            found |= {name: result for name, result in results.items() if self._is_of_today(name, path)}
        return found

    def _is_of_today(self, name: str, evaluation: Path) -> bool:
        run = self.folder / f"{name}.done"
        return name in UNTRAINED or (run.exists() and run.stat().st_mtime <= evaluation.stat().st_mtime)

    def planted(self) -> list[bool]:
        """Whether each suspect was planted, the most suspicious first; empty where they were not ranked."""
        if not self._suspects().marker.exists():
            return []
        return [json.loads(line)["planted"] for line in self._ranking().read_text().splitlines()]

    def draw_entropy(self, one: Tried) -> float | None:
        """Mean entropy, in nats, of the first student layer's draw over all updates; None where nothing is drawn."""
        path = self.folder / one.name / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        entropies = [line["draw_entropy"][0] for line in lines if "draw_entropy" in line]
        return sum(entropies) / len(entropies) if entropies else None

    def seconds(self, one: Tried) -> dict[str, float]:
        """Processor seconds of a run, and of what it needed before: {"train": ..., "stage 1": ..., "answers": ...}."""
        parts = {"train": self._train_job(one)}
        if one.arm.uses_stage_1:
            parts["stage 1"] = self._stage_1(one.arm)
        if one.arm.answers:
            parts["answers"] = self._answers()
        return {name: job.seconds() for name, job in parts.items()}

    def bytes_of(self, one: Tried) -> int:
        """Bytes on disk that the arm's signal takes: its cache and its answers."""
        folders = [self._stage_1(one.arm).path / "cache"] if one.arm.uses_stage_1 else []
        folders += [self.folder / "answers"] if one.arm.answers else []
        return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())

    def _training(self, one: Tried) -> Iterator[Job]:
        yield self._data()
        if one.arm.uses_stage_1:
            if one.arm.verbalizers_wrong is not None:
                yield self._data(one.arm.verbalizers_wrong)
            yield self._stage_1(one.arm)
        if one.arm.answers:
            yield self._answers()
        yield self._train_job(one)

    def _data(self, wrong: float | None = None) -> Job:
        """wrong: the share of wrong answers, the cell's by default. Questions and right answers are the same."""
        cell, task = self.cell, self.cell.task
        folder = self.folder / ("data" if wrong is None else f"data-{100 * wrong:g}")
        return Job(folder, _shard(
            folder, task, self.seed, cell.samples, cell.held_out,
            "--noise", str(cell.wrong if wrong is None else wrong), *task.questions,
        ))  # fmt: skip

    def _other(self) -> Job:
        folder, task = self.folder / "other", self.cell.task
        return Job(folder, _shard(folder, task, self.seed, 0, OTHER_TASK, *task.other_questions))

    def _stage_1(self, arm: Arm) -> Job:
        run, needs = self.folder / arm.stage_1_name, [self._data()]
        steps = {} if self.cell.stage_1 is None else {"verbalize.steps": self.cell.stage_1}
        values = {
            **self._common(run),
            "verbalize.micro_batch_size": self.cell.task.micro_batch_size,
            **steps,
            **arm.stage_1,
        }
        if arm.verbalizers_wrong is not None:
            others = self._data(arm.verbalizers_wrong)
            values["verbalize.train"] = str(others.path / "train")
            needs.append(others)
        return Job(run, self._train(1, values), tuple(job.path for job in needs))

    def _ranking(self) -> Path:
        return self.folder / "suspects.jsonl"

    def _suspects(self) -> Job:
        stage_1 = self.folder / "stage-1"
        command = ("-m", "pipeline", "cache-info", str(stage_1), "--suspects", "--output", str(self._ranking()))
        return Job(self.folder / "suspects", command, (stage_1,))

    def _answers(self) -> Job:
        answers = self.folder / "answers"
        teacher = f"{self.cell.task.models}/teacher"
        command = ("-m", "pipeline", "answer", "--model", teacher, "--data", str(self._data().path / "train"))
        return Job(answers, (*command, "--output", str(answers), "--batch-size", "100"), (self._data().path,))

    def _train_job(self, one: Tried) -> Job:
        run, needs = self.folder / one.name, [self._data()]
        values = {**self._common(run), **one.arm.settings(self.cell.updates, one.learning_rate, one.factor)}
        values |= {f"{step}.micro_batch_size": self.cell.task.micro_batch_size for step in ("interact", "reinforce")}
        if one.arm.uses_stage_1:
            needs.append(self._stage_1(one.arm))
            values["stage_1"] = str(self._stage_1(one.arm).path)
        if one.arm.answers:
            needs.append(self._answers())
            values["reinforce.train"] = str(self._answers().path)
        return Job(run, self._train(2, values, one.arm.program), tuple(job.path for job in needs))

    def _evaluation(self, names: list[str]) -> Iterator[Job]:
        kinds = {"held_out": (self._data(), self._data().path / "held_out")}
        if self.other_task:
            kinds["other"] = (self._other(), self._other().path / "held_out")
        for kind, (data, shards) in kinds.items():
            known = self.results(kind)
            models = {name: self.folder / name / "student" for name in names if name not in known}
            if not models:
                continue
            if "teacher" not in known:
                models |= {name: Path(self.cell.task.models, role) for name, role in UNTRAINED.items()}
            taken = [int(one.stem.rpartition("-")[2]) for one in self.folder.glob(f"{kind}-*.done")]
            path = self.folder / f"{kind}-{1 + max(taken, default=-1)}"
            named = [argument for name, model in models.items() for argument in ("--model", f"{name}={model}")]
            command = ("-m", "pipeline", "evaluate", *named, "--data", str(shards), "--output", f"{path}.json")
            sizes = (
                "--batch-size",
                "100",
                "--max-new-tokens",
                "12",
                "--baseline-data",
                str(self._data().path / "train"),
            )
            yield data
            yield Job(path, (*command, *sizes), (data.path, self._data().path, *(self.folder / name for name in names)))

    def _common(self, run: Path) -> dict[str, object]:
        data = self._data().path
        shards = {"data.train": str(data / "train"), "data.held_out": str(data / "held_out")}
        return {"run": str(run), "seed": self.seed, **shards, **self.cell.task.common}

    def _train(self, stage: int, values: dict[str, object], program: str = Arm.program) -> tuple[str, ...]:
        return (*program.split(), "--stage", str(stage), "--recipe", self.cell.task.recipe, *settings(values))


def _shard(folder: Path, task: Task, seed: int, train: int, held_out: int, *more: str) -> tuple[str, ...]:
    sizes = ("--count", str(train), "--held-out-count", str(held_out), "--samples-per-shard", "100")
    return (*task.shard, "--seed", str(seed), *sizes, *more, "--output", str(folder))
