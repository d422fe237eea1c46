"""Results that an earlier evaluation left in the output file, and whether they still hold.

A result has its identity: fingerprints of the model and the data, and the settings. With an equal one it is used again,
so that the same command goes on where it was ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.cache.fingerprint import compare
from pipeline.errors import RecipeError
from pipeline.results.evaluate.comparison import asked
from pipeline.results.evaluate.plan import QUESTION_ONLY, Plan
from pipeline.results.evaluate.scoring import bad_samples_of
from pipeline.results.identity import model_identity, question_identity
from pipeline.runtime.data.bad_samples import Rejected
from pipeline.runtime.display.progress import say


def identity_of(plan: Plan, name: str) -> dict[str, str]:
    """What the result of one of the plan's models depends on. Raises CacheError where the model has no safetensors."""
    return {**model_identity(plan.models[name]), **questions_of(plan)}


def questions_of(plan: Plan) -> dict[str, str]:
    """The part of the identity that all models of a plan have in common."""
    asked = question_identity(plan.data, plan.limits, plan.max_new_tokens)
    return {**asked, "samples": plan.samples()}


def earlier_results(plan: Plan) -> dict[str, dict[str, Any]]:
    """Results of the output file that hold: of the plan's models, and of others on the same questions.

    Says which of the plan's models are evaluated again, and why. Raises RecipeError where the file holds something
    else.
    """
    kept = {}
    for name, result in _read(plan).items():
        if name in plan.models:
            now = identity_of(plan, name)
        elif name == QUESTION_ONLY:
            continue  # made anew: it needs no model
        else:
            now = questions_of(plan)
        # What the result was asked in addition, such as a limit on pixels that this command does not have, counts too.
        found = result.get("identity", {})
        differing = [mismatch.name for mismatch in compare(dict.fromkeys(asked(result), "none") | now, found)]
        if not differing:
            kept[name] = result
        elif name in plan.models:
            say(f"{name} is evaluated again: {plan.output} has it with another {', '.join(differing)}")
    for name in kept.keys() & plan.models.keys():
        _check_rejects(plan, kept[name])
    if kept:
        say(f"kept from {plan.output}: {', '.join(kept)}")
    return kept


def _read(plan: Plan) -> dict[str, dict[str, Any]]:
    if plan.output is None or not plan.output.exists():
        return {}
    try:
        found = json.loads(plan.output.read_text(encoding="utf-8"))
        if not all(isinstance(result, Mapping) and "exact_match" in result for result in found.values()):
            raise ValueError("it has no exact match of models")
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"--output {plan.output}: expected no file or the results of an earlier evaluation, found something else "
            f"({error}). Remove it, or give another --output"
        ) from None
    return found


def _check_rejects(plan: Plan, result: Mapping[str, Any]) -> None:
    """Raise DataError where a result has more unusable samples than this command allows."""
    bad_samples = bad_samples_of(plan)
    bad_samples.count(result["read"], [Rejected(**one) for one in result["rejected"]])
    bad_samples.check_whole()
