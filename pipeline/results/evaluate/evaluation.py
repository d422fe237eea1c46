"""Evaluate models on held-out data, the smallest first, and write the results after each."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from data_prep.shards import ShardFolder
from pipeline.errors import SampleError
from pipeline.results.arguments import batches
from pipeline.results.evaluate.answers import QuestionOnly, Tally, is_right, last_exchange
from pipeline.results.evaluate.earlier import earlier_results, identity_of
from pipeline.results.evaluate.plan import QUESTION_ONLY, Plan
from pipeline.results.evaluate.scoring import load_scorer, summarize
from pipeline.results.workers import Machine, Workers, places
from pipeline.runtime.data.bad_samples import read_sample
from pipeline.runtime.display.progress import say
from pipeline.runtime.folder import write_json
from pipeline.vlm.placement import Devices

BASELINE_SAMPLES = 50_000
"""Maximum number of training samples, evenly spaced, that the baseline reads. A majority needs no more."""

Results = dict[str, dict[str, Any]]


def evaluate(plan: Plan) -> Results:
    """{model name: results}, in the plan's order, the question-only baseline last.

    If plan.output is set, results that are there already and still hold are kept, and it is written after each model.
    Raises RecipeError, before the first model is loaded, where one has no room on the devices at hand, and DataError if
    the share of unusable samples exceeds max_bad_share.
    """
    results = earlier_results(plan)
    machine = Machine()
    missing = [name for name in plan.models if name not in results]
    missing.sort(key=lambda name: machine.weights(plan.models[name]))
    groups = {name: machine.groups(plan.models[name], plan.processes) for name in missing}
    if plan.baseline is not None:
        results[QUESTION_ONLY] = score_question_only(plan, plan.baseline)
    _write(plan, results)
    for name in missing:
        begun = time.monotonic()
        results[name] = _evaluate_one(plan, name, groups[name])
        _write(plan, results)
        say(f"{name}: done in {_since(begun)} by {places(groups[name])}{_written_to(plan)}")
    return _in_order(plan, results)


def score_question_only(plan: Plan, learn_from: ShardFolder) -> dict[str, Any]:
    """Exact match of the baseline on the same samples."""
    spacing = math.ceil(len(learn_from) / BASELINE_SAMPLES)
    guess = QuestionOnly(_records(learn_from, range(0, len(learn_from), max(1, spacing))))
    tally = Tally()
    for index in plan.indices():
        with suppress(SampleError):  # the models' results list this sample
            raw = read_sample(plan.data, index)
            exchange = last_exchange(raw.record, raw.images)
            tally.count(exchange.question_type, is_right(guess(exchange.question), exchange.answer))
    return {**tally.summary(), "learnt_from": str(learn_from.path), "data": str(plan.data.path)}


def _records(folder: ShardFolder, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
    for index in indices:
        with suppress(SampleError):
            yield read_sample(folder, index).record


def _evaluate_one(plan: Plan, name: str, groups: Sequence[Devices]) -> dict[str, Any]:
    folder = plan.models[name]
    identity = identity_of(plan, name) if plan.output is not None else None  # hashing takes a while
    rows = list(batches(plan.indices(), plan.batch_size))
    settings = (plan.limits, plan.data, plan.max_new_tokens, plan.attention, plan.parts.get(name))
    make = functools.partial(load_scorer, folder, *settings)
    with Workers(make, groups[: len(rows)]) as workers:
        summary = summarize(workers.map(rows), plan, name)
    found = {"model": str(folder), **summary, "data": str(plan.data.path)}
    return found if identity is None else {**found, "identity": identity}


def _in_order(plan: Plan, results: Mapping[str, dict[str, Any]]) -> Results:
    """Each of the plan's models also says which models were asked for with it: `status` sees whether one is lacking."""
    others = [name for name in results if name not in plan.models and name != QUESTION_ONLY]
    own = {name: {**results[name], "asked": [*plan.models]} for name in plan.models if name in results}
    order = (*others, *plan.models, QUESTION_ONLY)
    return {name: own.get(name, results[name]) for name in order if name in results}


def _write(plan: Plan, results: Results) -> None:
    if plan.output is not None:
        write_json(plan.output, _in_order(plan, results))


def _written_to(plan: Plan) -> str:
    return "" if plan.output is None else f"; written to {plan.output}"


def _since(begun: float) -> str:
    return str(timedelta(seconds=round(time.monotonic() - begun)))
