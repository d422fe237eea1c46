"""Exact match and cross-entropy of one model on held-out samples: a batch at a time, then all batches together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.shards import ShardFolder
from pipeline.errors import SampleError
from pipeline.loss.linear_ce import token_log_probs
from pipeline.recipe.schema import Data, ModelParts
from pipeline.results.evaluate.answers import Exchange, Tally, is_right, last_exchange
from pipeline.results.evaluate.plan import Plan
from pipeline.results.generate import Vlm, decode_text, greedy, load, pad_left
from pipeline.runtime.data.bad_samples import BadSamples, Rejected, read_sample
from pipeline.runtime.display.progress import StepProgress
from pipeline.vlm.backbone import run_backbone
from pipeline.vlm.parts import final_norm, text_config
from pipeline.vlm.placement import Devices
from pipeline.vlm.processing import Encoded, collate
from pipeline.vlm.verbalizer import LanguageHead


@dataclass(frozen=True)
class Scored:
    """Whether one sample was answered correctly."""

    key: str
    question_type: str | None
    right: bool
    cut: bool
    """Whether the answer had not ended within max_new_tokens."""


@dataclass(frozen=True)
class BatchScore:
    """What one model made of one batch. read = scored + rejected."""

    scored: list[Scored]
    rejected: list[Rejected]
    nats: float
    """Cross-entropy summed over the response tokens of the scored samples."""
    tokens: int
    """Number of these tokens."""

    @property
    def read(self) -> int:
        """Samples of the batch."""
        return len(self.scored) + len(self.rejected)


class Scorer:
    """Scores batches of samples with one model."""

    def __init__(self, vlm: Vlm, data: ShardFolder, max_new_tokens: int):
        self.vlm, self.data, self.max_new_tokens = vlm, data, max_new_tokens

    def __call__(self, rows: Iterable[int]) -> BatchScore:
        """Answer the last question of each sample, all in one batch, and measure the given responses."""
        encoded, rejected = _encode(self.vlm, self.data, rows)
        answers = _greedy_answers(self.vlm, encoded, self.max_new_tokens)
        scored = [
            Scored(sample.chat.key, sample.exchange.question_type, is_right(answer, sample.exchange.answer), cut)
            for sample, (answer, cut) in zip(encoded, answers, strict=True)
        ]
        return BatchScore(scored, rejected, *response_loss(self.vlm, [sample.chat for sample in encoded]))


def load_scorer(
    folder: Path,
    limits: Data,
    data: ShardFolder,
    max_new_tokens: int,
    attention: str,
    parts: ModelParts | None,
    devices: Devices,
) -> Scorer:
    """Load a model onto devices, to score samples with it; parts: those that a recipe names."""
    return Scorer(load(folder, limits, devices, attention, parts), data, max_new_tokens)


def summarize(scores: Iterable[BatchScore], plan: Plan, name: str = "") -> dict[str, Any]:
    """One model's exact match, in total and by question type, and its perplexity. read = samples + rejected.

    "wrong" has the keys of the samples that it answered wrongly, so that two models can be compared sample by sample.
    "cut" counts the answers that had not ended within max_new_tokens.
    Raises DataError if the share of unusable samples exceeds max_bad_share, as soon as that is clear.
    """
    tally, nats, tokens, cut = Tally(), 0.0, 0, 0
    rejected: list[Rejected] = []
    wrong: list[str] = []
    bad_samples = bad_samples_of(plan)
    progress = StepProgress(name, len(plan.indices()))
    try:
        for batch in scores:
            bad_samples.count(batch.read, batch.rejected)
            rejected += batch.rejected
            for one in batch.scored:
                tally.count(one.question_type, one.right)
            cut += sum(one.cut for one in batch.scored)
            wrong += [one.key for one in batch.scored if not one.right]
            nats, tokens = nats + batch.nats, tokens + batch.tokens
            progress.advance(f"exact match {tally.summary()['exact_match']:.1%}", by=batch.read)
    finally:
        progress.close()
    bad_samples.check_whole()
    return {
        **tally.summary(),
        "perplexity": math.exp(min(nats / tokens, 700.0)) if tokens else None,
        "response_tokens": tokens,
        "read": len(plan.indices()),
        "wrong": wrong,
        "cut": cut,
        "rejected": [asdict(sample) for sample in rejected],
    }


def bad_samples_of(plan: Plan) -> BadSamples:
    """Counts one model's unusable samples, and raises DataError when their share is too large."""
    return BadSamples(plan.limits.max_bad_share, listed_in="--max-bad-share in python -m pipeline evaluate --help")


@torch.inference_mode()
def response_loss(vlm: Vlm, chats: Sequence[Encoded]) -> tuple[float, int]:
    """(cross-entropy in nat summed over all response tokens of the chats, number of these tokens)."""
    if not chats:
        return 0.0, 0
    batch = collate(chats, vlm.encoder.filler(), vlm.pad_id).to(vlm.device, vlm.dtype)
    config = text_config(vlm.model)
    (last,) = run_backbone(vlm.model, batch.inputs, [int(config.num_hidden_layers)], batch.positions)
    head = LanguageHead(vlm.model, int(config.vocab_size))
    device = head.weight.device  # of a model on several devices not always that of its last layer
    hidden, labels = final_norm(vlm.model)(last)[None].to(device), batch.labels.to(device)
    with torch.cuda.device_of(head.weight):  # Triton's kernels run on the current device; on a CPU this does nothing
        log_probs = head(token_log_probs, hidden, labels=labels)
    return -float(log_probs.double().sum()), len(batch.labels)


@dataclass(frozen=True)
class _EncodedSample:
    exchange: Exchange
    prompt: Mapping[str, Any]
    chat: Encoded


def _encode(vlm: Vlm, data: ShardFolder, rows: Iterable[int]) -> tuple[list[_EncodedSample], list[Rejected]]:
    """(encoded samples, samples that this model cannot use with the reason)."""
    encoded, rejected = [], []
    for index in rows:
        try:
            raw = read_sample(data, index)
            exchange = last_exchange(raw.record, raw.images)
            prompt = vlm.encode_question(exchange.messages, exchange.images)
            encoded.append(_EncodedSample(exchange, prompt, vlm.encoder(raw.key, raw.record["messages"], raw.images)))
        except SampleError as error:
            rejected.append(Rejected.of(data, index, error))
    return encoded, rejected


def _greedy_answers(vlm: Vlm, encoded: Sequence[_EncodedSample], max_new_tokens: int) -> list[tuple[str, bool]]:
    """(answer, whether it was cut at max_new_tokens) of each."""
    if not encoded:
        return []
    inputs = pad_left([sample.prompt for sample in encoded], vlm.encoder.filler(), vlm.pad_id)
    stops = vlm.stop_ids()
    return [(decode_text(vlm, ids), ids[-1] not in stops) for ids in greedy(vlm, inputs, max_new_tokens)]
