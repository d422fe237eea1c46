"""How likely the teacher finds a given answer, as far as a cache tells it.

y_t is a response token, and p_t the distribution of the teacher's last layer where it is predicted. The score of a
sample is the mean of log p_t(y_t) over its response tokens, in nats a token. What each codec tells of p = p_t(y_t):

    hidden    all of it: log softmax(logits)[y_t], through the stored head
    sampled   count / N, the share of the N points that fell on y_t. Without a point p < 1/N, and counts as 1/(2 N)
    topk      the stored probability. Of an id not kept p <= min(tail, smallest kept), and counts as half of that

T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.registry import Codec
from pipeline.codec.sampled import Sampled
from pipeline.signal import HiddenSignal, Signal, SparseSignal

CHUNK = 256
"""Tokens whose logits exist at a time (hidden codec)."""

TINY = torch.finfo(torch.float32).tiny
"""Lower bound of a probability: one that float16 rounded to 0 has a logarithm too."""


def score(log_probs: np.ndarray) -> tuple[float, float, int]:
    """Log-probabilities [T] of one sample's response tokens -> its score, the lowest one, and that one's position.

    Ranks go by the score, then by the lowest. Both are rounded to 1e-6 nat, about what float32 resolves: the last digit
    depends on what was decoded along with a token, and would decide between samples that are equal.
    """
    lowest = int(log_probs.argmin())
    return round(float(log_probs.mean(dtype=np.float64)), 6), round(float(log_probs[lowest]), 6), lowest + 1


def given_log_probs(signal: Signal, tokens: Tensor, codec: Codec) -> Tensor:
    """The natural logarithm [T] of the probability of the ids `tokens` [T] in the signal's last layer."""
    last = signal.part(slice(None), -1)
    if isinstance(last, HiddenSignal):
        chunks = zip(last.hidden.split(CHUNK), tokens.split(CHUNK), strict=True)
        head = last.unembedding
        return torch.cat([-torch.nn.functional.cross_entropy(head.logits(h), y, reduction="none") for h, y in chunks])
    kept = (last.probs * (last.ids == tokens[:, None])).sum(-1)
    return torch.where(kept > 0, kept, _bound(last, codec) / 2).clamp(min=TINY).log()


def _bound(last: SparseSignal, codec: Codec) -> Tensor:
    """[T] the largest probability that an id can have which the record does not hold."""
    if isinstance(codec, Sampled):
        return torch.full_like(last.tail, 1 / codec.points)
    return torch.minimum(last.tail, last.probs.amin(-1))


def explanation(codec: Mapping[str, Any]) -> str:
    """For a legend: how the probability of a token is known from the records of a codec (its name and parameters)."""
    if codec["name"] == "hidden":
        return "exactly, through the cached head."
    if codec["name"] == "sampled":
        points = codec["points"]
        return f"estimated: points on the token, of {points}; a token without one counts as 1/{2 * points}."
    return "as stored; a token that is not kept counts as half of the smaller of the tail and the smallest kept one."
