"""Exact match and perplexity on held-out data, for one model or several."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.shards import ShardFolder
from pipeline.commands import train_command
from pipeline.errors import RecipeError, SampleError
from pipeline.loss.linear_ce import token_log_probs
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import Data
from pipeline.results.arguments import batches, open_non_empty, run_recipe
from pipeline.results.evaluate.answers import Exchange, QuestionOnly, Tally, last_exchange
from pipeline.results.generate import Vlm, decode_text, greedy, load, pad_left, require_model
from pipeline.runtime.batches import BadSamples, Rejected
from pipeline.runtime.folder import write_json
from pipeline.runtime.progress import StepProgress, say
from pipeline.vlm.backbone import run_backbone
from pipeline.vlm.families import final_norm, text_config
from pipeline.vlm.processing import Encoded, collate
from pipeline.vlm.verbalizer import LanguageHead

QUESTION_ONLY = "question_only"
BASELINE_SAMPLES = 50_000
"""Maximum number of training samples, evenly spaced, that the baseline reads. A majority needs no more."""


@dataclass(frozen=True)
class Plan:
    """Models, data and settings of one evaluation."""

    models: Mapping[str, Path]
    data: ShardFolder
    limit: int | None
    batch_size: int
    max_new_tokens: int
    limits: Data
    """The recipe's data section, for its limits on samples; without a run, the defaults."""
    baseline: ShardFolder | None = None
    """Data that the question-only baseline counts."""
    output: Path | None = None
    against: str | None = None
    """Name of the model that the others are compared with."""
    attention: str = "sdpa"
    """How the models compute their attention, as in the run's recipe."""

    def indices(self) -> range:
        """Indices of the samples that are read."""
        return range(len(self.data) if self.limit is None else min(self.limit, len(self.data)))


def make_plan(
    models: Sequence[str],
    run: Path | None,
    data: Path | None,
    baseline: Path | None,
    output: Path | None,
    max_bad_share: float | None = None,
    against: str | None = None,
    **sizes: Any,
) -> Plan:
    """Build a plan from command-line arguments. Raises RecipeError or DataError, before any model is loaded."""
    named = dict(_split_model_argument(text) for text in models)
    if len(named) < len(models):
        raise RecipeError(f"two models have one name ({', '.join(models)}); name them: --model NAME=DIR")
    limits: Data | None = None
    if run is not None:
        recipe = load_recipe(run_recipe(run)).recipe
        limits, sizes["attention"] = recipe.data, recipe.attention
        named = _run_models(run, recipe.teacher.path, recipe.student.path) | named
        data = data or recipe.data.held_out
        baseline, output = baseline or recipe.data.train, output or run / "evaluation.json"
    if not named:
        raise RecipeError("nothing to evaluate: give --model DIR (again for each model) or --run RUN")
    if data is None:
        raise RecipeError("no data: give --data SHARDS, a shard folder, or set data.held_out in the run's recipe")
    if QUESTION_ONLY in named:
        raise RecipeError(f"a model cannot be named {QUESTION_ONLY}: that is the baseline's name in the results")
    if against is not None and against not in named:
        raise RecipeError(f"--against {against}: no model of that name; the models are {', '.join(named)}")
    for folder in named.values():
        require_model(folder)
    sibling = data.parent / "train"
    if baseline is None and data.name != "train" and (sibling / "manifest.json").is_file():
        baseline = sibling
    baseline_data = None if baseline is None else open_non_empty(baseline)
    limits = limits or Data(train=data)
    if max_bad_share is not None:
        limits = limits.model_copy(update={"max_bad_share": max_bad_share})
    return Plan(
        named, open_non_empty(data), limits=limits, baseline=baseline_data, output=output, against=against, **sizes
    )


def evaluate(plan: Plan) -> dict[str, dict[str, Any]]:
    """{model name: results}, the question-only baseline last; if plan.output is set, written there after each model.

    Raises DataError if the share of unusable samples exceeds max_bad_share.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, folder in plan.models.items():
        vlm = load(folder, plan.limits, plan.attention)
        results[name] = {"model": str(folder), **score(vlm, plan, name), "data": str(plan.data.path)}
        del vlm
        gc.collect()  # the next model may need all of the memory
        _write(plan, results)
    if plan.baseline is not None:
        results[QUESTION_ONLY] = score_question_only(plan, plan.baseline)
        _write(plan, results)
    return results


def score(vlm: Vlm, plan: Plan, name: str = "") -> dict[str, Any]:
    """One model's exact match, in total and by question type, and its perplexity. read = samples + rejected.

    "wrong" has the keys of the samples that it answered wrongly, so that two models can be compared sample by sample.
    """
    tally, nats, tokens = Tally(), 0.0, 0
    rejected: list[Rejected] = []
    wrong: list[str] = []
    bad_samples = BadSamples(
        plan.limits.max_bad_share, listed_in="--max-bad-share in python -m pipeline evaluate --help"
    )
    progress = StepProgress(name, len(plan.indices()))
    try:
        for rows in batches(plan.indices(), plan.batch_size):
            encoded, bad = _encode(vlm, plan.data, rows)
            rejected += bad
            bad_samples.count(len(rows), bad)
            for sample, answer in zip(encoded, _greedy_answers(vlm, encoded, plan.max_new_tokens), strict=True):
                if not tally.add(sample.exchange, answer):
                    wrong.append(sample.chat.key)
            loss, count = response_loss(vlm, [sample.chat for sample in encoded])
            nats, tokens = nats + loss, tokens + count
            progress.advance(f"exact match {tally.summary()['exact_match']:.1%}", by=len(rows))
    finally:
        progress.close()
    return {
        **tally.summary(),
        "perplexity": math.exp(min(nats / tokens, 700.0)) if tokens else None,
        "response_tokens": tokens,
        "read": len(plan.indices()),
        "wrong": wrong,
        "rejected": [asdict(sample) for sample in rejected],
    }


@torch.inference_mode()
def response_loss(vlm: Vlm, chats: Sequence[Encoded]) -> tuple[float, int]:
    """(cross-entropy in nat summed over all response tokens of the chats, number of these tokens)."""
    if not chats:
        return 0.0, 0
    batch = collate(chats, vlm.encoder.filler(), vlm.pad_id).to(vlm.device, vlm.dtype)
    config = text_config(vlm.model)
    (last,) = run_backbone(vlm.model, batch.inputs, [int(config.num_hidden_layers)], batch.positions)
    head = LanguageHead(vlm.model, int(config.vocab_size))
    log_probs = head(token_log_probs, final_norm(vlm.model)(last)[None], labels=batch.labels)
    return -float(log_probs.double().sum()), len(batch.labels)


def score_question_only(plan: Plan, learn_from: ShardFolder) -> dict[str, Any]:
    """Exact match of the baseline on the same samples."""
    spacing = math.ceil(len(learn_from) / BASELINE_SAMPLES)
    guess = QuestionOnly(learn_from.read(index).record for index in range(0, len(learn_from), max(1, spacing)))
    tally = Tally()
    for index in plan.indices():
        raw = plan.data.read(index)
        with suppress(SampleError):  # the models' results list this sample
            exchange = last_exchange(raw.record, raw.images)
            tally.add(exchange, guess(exchange.question))
    return {**tally.summary(), "learnt_from": str(learn_from.path), "data": str(plan.data.path)}


@dataclass(frozen=True)
class _EncodedSample:
    exchange: Exchange
    prompt: Mapping[str, Any]
    chat: Encoded


def _write(plan: Plan, results: Mapping[str, Any]) -> None:
    if plan.output is not None:
        write_json(plan.output, results)


def _encode(vlm: Vlm, data: ShardFolder, rows: Iterable[int]) -> tuple[list[_EncodedSample], list[Rejected]]:
    """(encoded samples, samples that this model cannot use with the reason)."""
    encoded, rejected = [], []
    for index in rows:
        raw = data.read(index)
        try:
            exchange = last_exchange(raw.record, raw.images)
            prompt = vlm.encode_question(exchange.messages, exchange.images)
            encoded.append(_EncodedSample(exchange, prompt, vlm.encoder(raw.key, raw.record["messages"], raw.images)))
        except SampleError as error:
            rejected.append(Rejected.of(data, index, error))
    return encoded, rejected


def _greedy_answers(vlm: Vlm, encoded: Sequence[_EncodedSample], max_new_tokens: int) -> list[str]:
    if not encoded:
        return []
    inputs = pad_left([sample.prompt for sample in encoded], vlm.encoder.filler(), vlm.pad_id)
    return [decode_text(vlm, ids) for ids in greedy(vlm, inputs, max_new_tokens)]


def _split_model_argument(text: str) -> tuple[str, Path]:
    """Split 'NAME=DIR' or 'DIR'; a '/' before the '=' means that the '=' belongs to the folder name."""
    name, equals, folder = text.partition("=")
    if equals and name and folder and "/" not in name:
        return name, Path(folder)
    return Path(text).resolve().name, Path(text)


def _run_models(run: Path, teacher: Path, student: Path) -> dict[str, Path]:
    named = {"teacher": teacher, "untouched": student}
    if (run / "student").is_dir():
        return named | {"distilled": run / "student"}
    make = train_command(2, run / "recipe.yaml")
    say(f"distilled is left out: no {run}/student; {make}")
    return named
