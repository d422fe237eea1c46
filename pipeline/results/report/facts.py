"""What a run's folder tells of it: also while it runs, and after it has died."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.cache.paths import newest
from pipeline.errors import CacheError
from pipeline.recipe.resolve import caches_of, load_recipe
from pipeline.recipe.schema import STEPS
from pipeline.results.arguments import run_recipe
from pipeline.results.cache.info import MEASURES, contents, fidelity
from pipeline.results.cache.on_disk import inspect_cache
from pipeline.results.evaluate.changes import read_evaluation
from pipeline.results.status import StepStatus, preset_of, status
from pipeline.runtime.display.progress import size_text
from pipeline.runtime.folder import read_kernels, read_metrics
from pipeline.runtime.versions import read_environment

TRAINED = ("verbalize", "interact", "reinforce")
"""The steps that train, in running order."""


@dataclass(frozen=True)
class CacheFacts:
    """The teacher cache that a run uses: its own, or another run's."""

    folder: str
    contents: Mapping[str, str]
    """As cache-info prints it: state, samples, bytes."""
    fidelity: Sequence[tuple[int, Sequence[float | None]]]
    """(teacher layer, its values of MEASURES); empty where nothing was measured."""


@dataclass(frozen=True)
class RunFacts:
    """One run."""

    name: str
    folder: Path
    recipe: str
    """Text of recipe.yaml, in which each value has its origin."""
    steps: Sequence[StepStatus]
    following: str
    """The command to run next."""
    preset: str
    kernels: str | None
    environments: Mapping[str, Mapping[str, Any]]
    """Step -> the code, packages and machine that it ran with, of the steps that have begun."""
    lines: Mapping[str, Sequence[Mapping[str, Any]]]
    """Step -> its lines of metrics.jsonl, one an update."""
    cache: CacheFacts | None
    evaluation: Mapping[str, Mapping[str, Any]]
    """Model -> its results, as in evaluation.json; empty before it was evaluated."""
    rejects: Sequence[tuple[str, int, str]]
    """(reason, how many samples, the key of one), the commonest first."""

    @property
    def hours(self) -> Mapping[str, float]:
        """Hours that each step's updates took, waiting for data included."""
        return {step: sum(line["update_s"] for line in lines) / 3600 for step, lines in self.lines.items() if lines}

    @property
    def settings(self) -> dict[str, str]:
        """{dotted key: value} of the recipe."""
        return dict(_flat(yaml.safe_load(self.recipe)))


def read_run(folder: Path) -> RunFacts:
    """Read a run's folder; a step that has left nothing is absent. Raises RecipeError if the folder is no run."""
    recipe = run_recipe(folder)
    steps, following = status(folder)
    return RunFacts(
        name=folder.resolve().name,
        folder=folder,
        recipe=recipe.read_text(encoding="utf-8"),
        steps=steps,
        following=following,
        preset=preset_of(folder),
        kernels=read_kernels(folder),
        environments={step: found for step in STEPS if (found := read_environment(folder, step)) is not None},
        lines={step: read_metrics(folder, step) for step in TRAINED},
        cache=_cache(load_recipe(recipe).recipe.model_copy(update={"run": folder}).teacher_stage_1),
        evaluation=read_evaluation(folder),
        rejects=_rejects(folder / "rejects.jsonl"),
    )


def differences(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of the settings that are not the same in all; a run's own folder is none."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    values = {key: [one.get(key, "-") for one in settings] for key in keys if key != "run"}
    return [(key, found) for key, found in values.items() if len(set(found)) > 1]


def _cache(run: Path) -> CacheFacts | None:
    """The newest cache of the run whose cache is used."""
    folder = newest(caches_of(run))
    if folder is None:
        return None
    try:
        cache = inspect_cache(folder, run)
    except CacheError as error:
        return CacheFacts(str(folder), {"state": str(error)}, [])
    measured = fidelity(cache)
    rows: list[tuple[int, Sequence[float | None]]] = []
    if measured is not None and measured.tokens:
        layers = zip(cache.identity.layers, measured.summary()["layers"], strict=True)
        rows = [(layer, [values[name] for name in MEASURES]) for layer, values in layers]
    return CacheFacts(str(folder), contents(cache), rows)


def _rejects(path: Path) -> list[tuple[str, int, str]]:
    if not path.is_file():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    first = {one["reason"]: one["key"] for one in reversed(found)}
    return [(reason, count, first[reason]) for reason, count in Counter(one["reason"] for one in found).most_common()]


def _flat(value: Any, prefix: str = ""):
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, json.dumps(value)


def bytes_text(count: int) -> str:
    """A size as a page shows it; empty for nothing."""
    return size_text(count) if count else ""
