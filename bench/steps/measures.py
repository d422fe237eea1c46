"""All measurements of bench.steps for one pair of models."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.steps.pairs import prepare
from bench.steps.ratios import PreparedRun, TimedCalls, cache_passes, sizes, student_steps, verbalize_steps
from bench.steps.startup import one_rank, start_up, train
from bench.timing import interleaved, peak_mib, ratio
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime import engine
from pipeline.runtime.folder import read_metrics
from pipeline.runtime.ranks import Ranks

WARMUP_UPDATES = 3
"""Updates at the start of stage 2 that are not counted for the data wait: loader workers start during them."""

RATIOS = {
    "interact_over_finetune": ("interact", "finetune"),
    "verbalize_over_forwards": ("verbalize", "forwards"),
    "live_teacher_over_cache": ("interact_live", "interact"),
    "cache_speed_over_forward": ("forward", "cache"),
    "cache_speed_over_forward_and_heads": ("forward_and_heads", "cache"),
}
"""{ratio: (numerator, denominator)}."""


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
"""Operation counts of attention on a CPU, which torch's counter lacks; from the shapes, as torch counts it on a GPU."""


def measure(name: str, rounds: int, updates: int, ranks: Ranks) -> dict[str, Any]:
    """A pair's entry in the JSON; the demo's entry also has the start-up time.

    updates: number of updates of stage 2 used to measure its data wait.
    """
    with TemporaryDirectory() as place:
        folder = Path(place)
        recipe = folder / "recipe.yaml"
        entry = prepare(name, folder, ranks.device)
        train("--stage", "1", "--recipe", str(recipe))
        entry = {"set_up": entry | sizes(PreparedRun(recipe, ranks)), "rounds": rounds}
        entry["peak_mib"] = {
            "cache": _peak_mib(recipe, ranks, live=False),
            "live_teacher": _peak_mib(recipe, ranks, live=True),
        }
        entry |= _ratios(recipe, ranks, folder / "written", rounds)
        if updates:
            waits = {f"{workers}_workers": data_wait(recipe, workers, updates) for workers in (1, 2)}
            entry["data_wait_share"] = waits
        if name == "demo":
            entry["start_up"] = start_up(recipe)
        return entry


def _ratios(recipe: Path, ranks: Ranks, scratch: Path, rounds: int) -> dict[str, Any]:
    """Times and operations of all calls, and the ratios of both."""
    seconds: dict[str, list[float]] = {}
    operations: dict[str, int] = {}
    for make in (student_steps, verbalize_steps, partial(cache_passes, scratch=scratch)):
        runs = make(PreparedRun(recipe, ranks))
        operations |= _operations(runs)
        seconds |= interleaved(runs, rounds, warm=True)
        del runs
        _free(ranks)
    ratios = {
        name: {
            "time": round(ratio(seconds[above], seconds[below]), 3),
            "operations": round(operations[above] / operations[below], 3),
        }
        for name, (above, below) in RATIOS.items()
    }
    return {**ratios, "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()}}


def _operations(runs: TimedCalls) -> dict[str, int]:
    """Additions and multiplications in matrix products, the lower bound of each time."""
    return {name: operations_of(run) for name, run in runs.items()}


def operations_of(run: Callable[[], object]) -> int:
    """Additions and multiplications in matrix products, including attention."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
        run()
    return counter.get_total_flops()


def _peak_mib(recipe: Path, ranks: Ranks, live: bool) -> float:
    """Peak memory of stage 2a in MiB, with model and optimizer: resident on a CPU, allocated on an accelerator."""
    _free(ranks)
    peak = peak_mib(partial(_prepared_updates, recipe, live, ranks if ranks.device != "cpu" else None))
    _free(ranks)
    return round(peak)


def _prepared_updates(recipe: Path, live: bool, ranks: Ranks | None) -> Callable[[], object]:
    """Two updates, to be run. Without `ranks` this is a fresh process, which first becomes the only rank."""
    if ranks is None:
        os.environ |= one_rank()
        ranks = engine.start()
    return partial(_two_updates, recipe, ranks, live)


def _two_updates(recipe: Path, ranks: Ranks, live: bool) -> None:
    run = student_steps(PreparedRun(recipe, ranks), live)["interact_live" if live else "interact"]
    run()
    run()


def _free(ranks: Ranks) -> None:
    gc.collect()
    if ranks.device != "cpu":
        torch.cuda.empty_cache()


def data_wait(recipe: Path, workers: int, updates: int) -> float:
    """Share of stage 2a's time spent on waiting for its loader."""
    run = load_recipe(recipe).recipe.run
    shutil.rmtree(run / "interact", ignore_errors=True)
    steps = ["--stage", "2", "--only", "interact", "--recipe", str(recipe)]
    train(*steps, "--set", f"interact.steps={WARMUP_UPDATES + updates}", f"data.workers={workers}")
    counted = [line for line in read_metrics(run) if line["step"] == "interact"][WARMUP_UPDATES:]
    data_wait_s = sum(line["data_wait"] * line["update_s"] for line in counted)
    return round(data_wait_s / sum(line["update_s"] for line in counted), 4)
