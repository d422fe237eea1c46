"""What a run of lmms-eval left: its score, or why there is none.

lmms-eval ends with exit code 0 when it crashes, and some of its model classes write an empty answer where generation
failed. So nothing but a finite number in its results, from a run whose log tells of no such answer, is a score.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from pipeline.errors import BenchmarkError
from pipeline.results.benchmarks.columns import Benchmark

LOG = "log.txt"
"""File in a run's folder with what lmms-eval printed."""
SWALLOWED = (
    r"Error .* in generating",  # llava_hf, internvl_hf: the answer is then empty
    r"Failed to process PIL image",  # the classes for Qwen: the question is then asked without its picture
    r"failed to get a score",  # mmvet, mmvetv2: the judge did not answer, and the sample counts as 0
    r"Failed to get response after",  # llava_wilder: the judge did not answer
    r"attempts failed\. Last error message",  # hallusion_bench: the judge did not answer
    r"Server evaluation failed",  # mathvista: the judge did not answer
)
"""Patterns of lmms-eval's log where it went on with an answer or a score that is none."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception)\b: .+")
_LINES = 25


def outcome(folder: Path, benchmark: Benchmark, exit_code: int) -> dict[str, Any]:
    """The score of a benchmark from the folder of its run, with all metrics, versions and numbers of samples.

    Raises BenchmarkError, with the end of the log, where there is none.
    """
    log = _COLOURS.sub("", (folder / LOG).read_text(encoding="utf-8", errors="replace"))
    files = sorted(folder.rglob("*_results.json"))
    if exit_code or len(files) != 1:
        raise _failure(folder, benchmark, f"lmms-eval left no results (exit code {exit_code})", log)
    swallowed = [line for line in log.splitlines() if re.search("|".join(SWALLOWED), line)]
    if swallowed:
        what = f"{len(swallowed)} samples or requests failed and were counted as answered: {swallowed[0].strip()}"
        raise _failure(folder, benchmark, what, log)
    results = json.loads(files[0].read_text(encoding="utf-8"))
    metrics = results["results"].get(benchmark.task, {})
    numbers = {key: value for key, value in metrics.items() if _is_score(value)}
    wrong = [f"{key} is {metrics.get(key, 'missing')!r}" for key in benchmark.metrics if key not in numbers]
    if wrong:
        what = f"{'; '.join(wrong)}; metrics with a number: {', '.join(numbers) or 'none'}"
        raise _failure(folder, benchmark, what, log)
    counts = results["n-samples"].values()
    return {
        "score": benchmark.scale * sum(numbers[key] for key in benchmark.metrics),
        "task": benchmark.task,
        "metrics": numbers,
        "samples": sum(count["effective"] for count in counts),
        "of_samples": sum(count["original"] for count in counts),
        "task_versions": results["versions"],
        "model_args": results["config"]["model_args"],
        "model_backend": results["config"]["model_backend"],
        "results": str(files[0]),
    }


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _failure(folder: Path, benchmark: Benchmark, what: str, log: str) -> BenchmarkError:
    lines = log.splitlines()
    raised = next((f" ({line})" for line in lines if _EXCEPTION.match(line)), "")  # later ones often only wrap it
    end = "\n".join(f"  | {line}" for line in lines[-_LINES:])
    expected = f"{benchmark.name} (task {benchmark.task}): expected {' and '.join(benchmark.metrics)}"
    return BenchmarkError(f"{expected}, but {what}{raised}. The end of {folder / LOG}:\n{end}")
