"""`python -m pipeline status`: the progress of a run's steps, its disk usage, and the next command."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from data_prep import storage
from data_prep.schema import DataError
from data_prep.shards import read_manifest
from data_prep.storage import is_url
from pipeline.cache.paths import newest
from pipeline.commands import train_command
from pipeline.errors import RecipeError
from pipeline.recipe.checks import number_of_steps
from pipeline.recipe.presets import PRESETS
from pipeline.recipe.resolve import load_recipe, own_caches
from pipeline.recipe.schema import STEPS, Recipe
from pipeline.results import jobs_table
from pipeline.results.jobs import FOLDER, read_jobs
from pipeline.runtime.data.data_wait import WINDOW
from pipeline.runtime.display.progress import size_text
from pipeline.runtime.folder import HELD_OUT, begun_steps, done, read_kernels, read_metrics, read_requeue

# Fields of a metrics.jsonl line that are not losses.
_NOT_LOSSES = {"step", "update", "time", "learning_rate", "tokens", "tokens_per_s", "update_s", "data_wait"}
_NOT_LOSSES |= {"gradient_norm", "real_share", "checkpoint_s", "held_out_exact_match", "held_out_s"}
REFRESH_S = 10.0
"""Between two looks of `watch`: SLURM's controller should not be asked more often."""
STAGE = {"verbalize": 1, "cache": 1, "interact": 2, "reinforce": 2}


@dataclass(frozen=True)
class StepStatus:
    """Progress of one step of a run."""

    name: str
    state: str
    """"done", "begun" or "not begun"."""
    progress: str
    """Progress in the step's own unit; empty if not known."""
    losses: Mapping[str, float]
    """Losses of the last update, in nat per response token."""
    size: int
    """Bytes on disk."""
    held_out: str = ""
    """The newest measurement on held-out data; empty where there is none."""


def status(run: Path) -> tuple[list[StepStatus], str]:
    """The status of the four steps, and the exact command to run next.

    Raises RecipeError if the folder is not a run: it does not exist, or holds files but no recipe.yaml.
    """
    others = {path.name for path in run.iterdir()} - {FOLDER} if run.is_dir() else set()
    if not run.is_dir() or (others and not (run / "recipe.yaml").is_file()):
        raise RecipeError(
            f"{run} is no run: expected the folder that a recipe names as `run`, with recipe.yaml in it; found "
            + ("other files" if run.is_dir() else "no such folder")
        )
    if not (run / "recipe.yaml").is_file():
        steps = [StepStatus(name, "not begun", "", {}, 0) for name in STEPS]
        return steps, f"{train_command(1, 'RECIPE')}   (its `run` is this folder)"
    recipe = load_recipe(run / "recipe.yaml").recipe
    begun = begun_steps(run)
    steps = [_step(run, name, recipe, name in begun) for name in STEPS]
    for number, step in enumerate(steps):
        if (left := recipe.left_to_another_run().get(step.name)) is not None:
            steps[number] = replace(step, state=f"in {left[0]}", progress=str(left[1]))
    return steps, next_command(run, recipe, [step.name for step in steps if step.state == "done"])


def next_command(run: Path, recipe: Recipe, complete: list[str]) -> str:
    """The command to run next. Stage 1 is not needed without interaction (interact.steps: 0)."""
    own = [step for step in STEPS if step not in recipe.left_to_another_run()]
    for step in own if recipe.interact.steps != 0 else STEPS[2:]:
        if step not in complete:
            return train_command(STAGE[step], run / "recipe.yaml")
    if recipe.data.held_out is not None and not evaluated(run):
        return f"python -m pipeline evaluate --run {run}"
    if "verbalize" in complete or recipe.stage_1 is not None:
        return f"python -m pipeline trace --run {run} --image FILE --question TEXT"
    return f"nothing: the student is in {run}/student"


def evaluated(run: Path) -> bool:
    """Whether evaluation.json has the results of all models that its newest command was to evaluate.

    It is written after each model, the smallest first, so one of a command that was ended lacks some of them.
    """
    try:
        results = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        asked = {name for result in results.values() for name in result.get("asked", ())}
    except (OSError, ValueError, AttributeError, TypeError):  # missing or damaged: the command itself says which
        return False
    return {"untouched", "distilled", *asked} <= results.keys()


def show(run: Path, steps: list[StepStatus], following: str) -> None:
    """Print the steps, the sizes, the jobs and the next command."""
    Console(highlight=False, soft_wrap=True).print(render(run, steps, following))


def watch(run: Path) -> None:
    """Print the status and renew it every REFRESH_S seconds, until the user interrupts."""
    console = Console(highlight=False, soft_wrap=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            shown = render(run, *status(run))
            console.clear()
            console.print(shown)
            time.sleep(REFRESH_S)


def render(run: Path, steps: list[StepStatus], following: str) -> RenderableType:
    """The steps, the sizes, the jobs and the next command."""
    table = Table(title=str(run), title_justify="left")
    for heading in ("step", "state", "progress", "last losses (nat a token)"):
        table.add_column(heading)
    table.add_column("on disk", justify="right")
    for step in steps:
        size = size_text(step.size) if step.size else ""
        losses = "\n".join(filter(None, (_format_losses(step.losses), step.held_out)))
        table.add_row(step.name, step.state, step.progress, losses, size)
    parts = [f"{name} {size_text(size)}" for name, size in _other_parts(run)]
    lines = {
        "on disk:": ", ".join([*parts, f"total {size_text(size_of(run))}"]),
        "preset: ": preset_of(run),
        "data:   ": data_of(run),
        "kernels:": read_kernels(run) or "",
        "stopped:": read_requeue(run) or "",
        "next:   ": following,
    }
    shown = [Text(f"{name} {text}") for name, text in lines.items() if text]
    jobs = read_jobs(run)
    return Group(table, *([jobs_table.render(jobs)] if jobs else []), *shown)


def preset_of(run: Path) -> str:
    """A run's preset and what it means; empty for a folder without a recipe."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return ""
    name = load_recipe(path).recipe.preset
    return f"{name}: {PRESETS[name].text}"


def data_of(run: Path) -> str:
    """How well data kept up in the newest updates of the step that ran last; empty where no step has trained."""
    lines = [line for line in read_metrics(run) if "real_share" in line]
    lines = [line for line in lines if line["step"] == lines[-1]["step"]][-WINDOW:]
    if not lines:
        return ""
    newest_line = lines[-1]
    if newest_line["step"] == "cache":  # its lines are of all the job's batches so far
        return _data_text("cache, newest job", newest_line["data_wait"], newest_line["real_share"], newest_line)
    waited = sum(line["data_wait"] * line["update_s"] for line in lines) / sum(line["update_s"] for line in lines)
    real = sum(line["real_share"] for line in lines) / len(lines)
    return _data_text(f"{newest_line['step']}, last {len(lines)} updates", waited, real, newest_line)


def _data_text(what: str, waited: float, real: float, line: Mapping[str, Any]) -> str:
    return (
        f"{what}: {waited:.0%} of the time waiting for data ({line['loader_workers']} loader workers a rank), "
        f"{real:.0%} of the computed tokens real"
    )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder or behind a URL; none of those that a job removes meanwhile."""
    if not is_url(path) and path.is_file():
        return storage.size_of(path) or 0
    return sum(storage.listed(path).values())


def _step(run: Path, name: str, recipe: Recipe, begun: bool) -> StepStatus:
    summary, lines = done(run / name), read_metrics(run, name)
    losses = (summary or {}).get("losses") or _newest_losses(lines)
    state = "done" if summary is not None else "begun" if begun or lines else "not begun"
    elsewhere = name == "cache" and recipe.cache.folder is not None and name not in recipe.left_to_another_run()
    folder = own_caches(recipe) if elsewhere else run / name
    size = size_of(folder)
    if name == "cache":
        progress = _shard_progress(folder, planned(recipe, name)) if begun or elsewhere else ""
    elif summary is not None:
        progress = f"{summary['updates']} updates" if summary["updates"] else "left out (0 updates)"
    else:
        progress = _update_progress(lines, planned(recipe, name)) if lines else ""
    return StepStatus(name, state, progress, losses, size, _newest_held_out(lines))


def _update_progress(lines: list[dict[str, Any]], of: int | str) -> str:
    """How far a step is, and how long the rest takes at the pace of its newest updates."""
    update, newest_lines = lines[-1]["update"], [line for line in lines[-WINDOW:] if "update_s" in line]
    text = f"update {update} of {of}"
    if not newest_lines or not isinstance(of, int):
        return text
    left = (of - update) * sum(line["update_s"] for line in newest_lines) / len(newest_lines)
    return f"{text}, {duration_text(left)} left"


def duration_text(seconds: float) -> str:
    """93784 -> "26 h 03 min"; below an hour minutes, below a minute seconds."""
    minutes = int(seconds) // 60
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"


def _shard_progress(root: Path, of: int | str) -> str:
    """Progress of the cache that was begun last; and the time left, at the pace from its first shard to its newest."""
    if (cache := newest(root)) is None:
        return ""
    shards = storage.listed(cache, "*.tar")
    text = f"{len(shards)} of {of} shards"
    if is_url(cache):  # to ask for each shard's time would be a request each
        return text
    made = sorted(map(storage.modified, shards))
    if len(made) < 2 or not isinstance(of, int) or len(made) >= of:
        return text
    each = (made[-1] - made[0]) / (len(made) - 1)
    return f"{text}, {duration_text((of - len(made)) * each)} left"


def planned(recipe: Recipe, name: str) -> int | str:
    """Number of updates or cache shards of the complete step; "?" if the training data is not available."""
    training = getattr(recipe, name)
    if getattr(training, "steps", None) is not None:
        return training.steps
    try:
        manifest = read_manifest(recipe.samples_of(name))
    except DataError:
        return "?"
    return len(manifest["shards"]) if name == "cache" else number_of_steps(training, manifest["samples"])


def _format_losses(losses: Mapping[str, float]) -> str:
    """{"teacher/1": 2.0, "teacher/2": 1.5, "last": 1.0} -> one line of text for each group."""
    groups: dict[str, list[str]] = {}
    for name, value in losses.items():
        group, slash, layer = name.rpartition("/")
        groups.setdefault(group or name, []).append(f"{layer}: {value:.3f}" if slash else f"{value:.3f}")
    return "\n".join(f"{group}  {'  '.join(values)}" for group, values in groups.items())


def _newest_losses(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Those of the last update that was not skipped, on the data that it trained on."""
    newest: dict[str, Any] = next((line for line in reversed(lines) if not line.get("skipped")), {})
    return {name: value for name, value in losses_of_line(newest).items() if name not in HELD_OUT}


def _newest_held_out(lines: list[dict[str, Any]]) -> str:
    found = next((line for line in reversed(lines) if HELD_OUT[0] in line), None)
    if found is None:
        return ""
    loss, right = (found.get(name) for name in HELD_OUT)
    answers = "" if right is None else f", {right:.1%} right"  # none where max_length has cut all of them
    return f"held out  {loss:.3f}{answers} (update {found['update']})"


def losses_of_line(line: Mapping[str, Any]) -> dict[str, float]:
    """The losses of a line of metrics.jsonl, in nat a token."""
    return {name: value for name, value in line.items() if name not in _NOT_LOSSES and isinstance(value, float)}


def _other_parts(run: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(run.iterdir()):
        if path.name not in STEPS:
            yield path.name, size_of(path)
