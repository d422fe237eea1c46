"""Run benchmarks on models, one after the other, and write the scores after each."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from pipeline.cache.fingerprint import compare, files_fingerprint
from pipeline.errors import BenchmarkError, RecipeError
from pipeline.results.benchmarks.columns import Benchmark
from pipeline.results.benchmarks.harness import Place, command, place, run_to_log, versions
from pipeline.results.benchmarks.model_classes import model_arguments, model_class
from pipeline.results.benchmarks.outcome import LOG, outcome
from pipeline.results.benchmarks.plan import Plan, check_judge, judge
from pipeline.results.identity import model_identity
from pipeline.runtime.display.progress import say
from pipeline.runtime.folder import write_json

Scores = dict[str, dict[str, dict[str, Any]]]
"""{model: {benchmark: what `outcome` found, with "identity", "versions", "date" and "seconds"}}"""


def run(plan: Plan) -> Scores:
    """The scores of the plan's models and of others in its output file.

    A score that is there already is kept while the model, the task's settings and lmms-eval are the same. A benchmark
    that fails does not keep the others from being run. Raises BenchmarkError at the end, with each that failed, and
    RecipeError before the first is started where something is missing that all of them need.
    """
    installed = versions(plan.settings.python)
    scores = _read(plan.output)
    identities = _identities(plan, installed)
    missing = [
        (name, benchmark)
        for name in plan.models
        for benchmark in plan.benchmarks
        if _differs(scores.get(name, {}).get(benchmark.name), identities[name, benchmark.name], name, benchmark)
    ]
    check_judge([benchmark for _, benchmark in missing])
    where = {name: place(plan.models[name], plan.processes) for name in dict(missing)}
    failures: list[str] = []
    for name, benchmark in missing:
        scores.setdefault(name, {}).pop(benchmark.name, None)
        try:
            found = _run_one(plan, name, benchmark, where[name])
        except BenchmarkError as error:
            say(f"{name}: {benchmark.name} failed")
            failures.append(f"{name}: {error}")
            continue
        scores[name][benchmark.name] = {**found, "versions": installed, "identity": identities[name, benchmark.name]}
        write_json(plan.output, scores)
    if failures:
        raise BenchmarkError("\n".join([*failures, "Scores that were found are kept; the same command tries the rest"]))
    return scores


def _run_one(plan: Plan, name: str, benchmark: Benchmark, where: Place) -> dict[str, Any]:
    """Run lmms-eval in a folder of its own, which is empty before: an older result cannot be taken for this one's."""
    folder = plan.output.with_suffix("") / name / benchmark.name.replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = plan.models[name]
    arguments = model_arguments(model, plan.limits)
    words = command(plan.settings, model_class(model).name, arguments, benchmark, where, folder)
    say(f"{name}: {benchmark.name} begins; its output is in {folder / LOG}")
    begun = time.monotonic()
    code = run_to_log(words, folder / LOG)
    found = outcome(folder, benchmark, code)
    seconds = time.monotonic() - begun
    say(f"{name}: {benchmark.name} {benchmark.shown(found['score'])} in {timedelta(seconds=round(seconds))}")
    return {**found, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seconds": round(seconds, 1)}


def _identities(plan: Plan, installed: Mapping[str, str | None]) -> dict[tuple[str, str], dict[str, str]]:
    """{(model, benchmark): what its score depends on}.

    Not the batch size and the number of processes: they change rounding errors only. Of a folder of further tasks its
    YAML and Python files, not the data that they name.
    """
    common = {"lmms-eval": str(installed["lmms-eval"]), "limit": str(plan.settings.limit)}
    if plan.settings.include_path is not None:
        files = sorted(path for path in plan.settings.include_path.rglob("*") if path.suffix in (".yaml", ".py"))
        common["own_tasks"] = files_fingerprint(files)
    identities = {}
    for name, folder in plan.models.items():
        asked = model_arguments(folder, plan.limits)
        arguments = {key: value for key, value in asked.items() if key != "pretrained"}
        model = {**model_identity(folder), **common, "model_args": json.dumps(arguments)}
        for benchmark in plan.benchmarks:
            task = {"task": benchmark.task, "metrics": " + ".join(benchmark.metrics)}
            judged = {"judge": judge()} if benchmark.judged else {}
            identities[name, benchmark.name] = {**model, **task, **judged}
    return identities


def _differs(earlier: Mapping[str, Any] | None, now: Mapping[str, str], name: str, benchmark: Benchmark) -> bool:
    if earlier is None:
        return True
    differing = [mismatch.name for mismatch in compare(now, earlier["identity"])]
    if differing:
        say(f"{name}: {benchmark.name} is run again: it was run with another {', '.join(differing)}")
    else:
        say(f"{name}: {benchmark.name} is kept: {benchmark.shown(earlier['score'])}")
    return bool(differing)


def _read(output: Path) -> Scores:
    if not output.exists():
        return {}
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
        results = [result for of_model in found.values() for result in of_model.values()]
        if not all({"score", "identity"} <= result.keys() for result in results):
            raise ValueError("it has no scores of benchmarks")
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"--output {output}: expected no file or the scores of earlier benchmarks, found something else ({error}). "
            "Remove it, or give another --output"
        ) from None
    return found
