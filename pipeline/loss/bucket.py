"""The bucket of a mapped vocabulary: its part of the KL, and the teacher's probability in it.

T response tokens, J teacher layers, d width, c rows of a chunk, U ids outside (the student's ids that no teacher id
means). p_B is the teacher's probability in the bucket, and for one token of the student

    q_B = logits.softmax(-1)[outside].sum()
    kl  = sum over mapped ids of p (log p - log q) + p_B (log p_B - log max(q_B, BUCKET_FLOOR))

Both sides are distributions over the mapped ids and the bucket. Joining ids can only lose information, so (where the
floor is not reached) this is a lower bound of the KL to any student distribution that differs from q inside the bucket
alone: the log-sum inequality (Cover and Thomas, Elements of Information Theory, theorem 2.7.1), as for `topk`'s tail.
The gradient at the logits is that of the mapped ids, plus p_B (q - q restricted to outside / q_B).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.loss.chunks import Workspace, accumulator, exp_, product_gradients, times_weight
from pipeline.rows import row_states
from pipeline.vocabulary_map import MappedHead

BUCKET_FLOOR = 1e-6
"""Lower bound of the student's share of the bucket. Below it the KL stops growing, and its gradient is that of the
mapped ids alone. A student may have no id outside, or only some that mean nothing, such as padding rows."""


@dataclass(frozen=True)
class StudentBucket:
    """The student's ids outside, for some rows of its logits."""

    log_sum: Tensor
    """[c, 1] log-sum-exp of their logits."""
    share: Tensor
    """[c, U] their probabilities among themselves."""

    @classmethod
    def of(cls, logits: Tensor, outside: Tensor) -> StudentBucket:
        """From the student's logits [c, V], before they are overwritten, and the ids [U]."""
        inside = logits.index_select(1, outside)
        log_sum = inside.logsumexp(1, keepdim=True)
        return cls(log_sum, inside.sub_(log_sum).exp_())

    def terms(self, log_total: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """-p_B log max(q_B, BUCKET_FLOOR) [c] in nats; and p_B where q_B is above the floor, elsewhere 0 [c].

        log_total: [c, 1] log-sum-exp of all logits. mass: [c] p_B.
        """
        log_q = (self.log_sum - log_total)[:, 0]
        floor = math.log(BUCKET_FLOOR)
        return -mass * log_q.clamp_min(floor), mass * (log_q > floor)


@torch.no_grad()
def bucket_surprisal(h: Tensor, workspace: Workspace, outside: Tensor) -> tuple[Tensor, Tensor]:
    """-log max(q_B, BUCKET_FLOOR) of a student layer h [T, d]: [T] in nats, and its gradient at h [T, d].

    It does not depend on the teacher: each candidate layer's part of the KL is its p_B times this.
    """
    weight, vocab = workspace.unembedding.weight, workspace.unembedding.vocab
    surprisal = h.new_empty(len(h), dtype=accumulator(weight.dtype))
    gradient = torch.empty_like(h, dtype=weight.dtype)

    def loss(rows: slice, logits: Tensor) -> None:
        bucket = StudentBucket.of(logits, outside)
        _, log_total, total = exp_(logits, outside.new_empty(len(logits), 0))
        surprisal[rows], pull = bucket.terms(log_total, torch.ones_like(log_total[:, 0]))
        logits.div_(total).index_add_(1, outside, bucket.share, alpha=-1).mul_(pull[:, None])

    for rows, products in product_gradients(h, workspace, loss):
        gradient[rows] = times_weight(products, weight[:vocab]).to(weight.dtype)
    return surprisal, gradient


@dataclass(frozen=True, eq=False)
class BucketShare:
    """The teacher's probability in the bucket, summed over tokens. `+` adds that of two batches, shards or jobs."""

    tokens: int
    """Number of tokens."""
    mass: np.ndarray
    """[J] float64: the sum of p_B of each layer."""

    def __add__(self, other: BucketShare) -> BucketShare:
        """The sums over both sets of tokens."""
        return BucketShare(self.tokens + other.tokens, self.mass + other.mass)

    def means(self) -> list[float]:
        """[J] mean of p_B; 0 where there is no token."""
        return (self.mass / max(1, self.tokens)).tolist()

    def to_json(self) -> dict[str, Any]:
        """The sums, with all digits."""
        return {"tokens": self.tokens, "mass": self.mass.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BucketShare:
        """The inverse of `to_json`. Raises KeyError where a sum is missing."""
        return cls(int(values["tokens"]), np.asarray(values["mass"], np.float64))

    @classmethod
    def read(cls, sums: Tensor) -> BucketShare:
        """From what `bucket_mass` returned. Waits until the device has computed it."""
        tokens, *mass = sums.tolist()
        return cls(int(tokens), np.asarray(mass))


@torch.no_grad()
def bucket_mass(hidden: Tensor, head: MappedHead, chunk: int) -> Tensor:
    """Hidden states [T, J, d] -> [1 + J] float64: the number of tokens, and each layer's sum of p_B over them.

    Tokens with a state that is not finite are left out: their samples will be skipped. chunk: rows whose logits exist
    at one time. Nothing here waits for the device.
    """
    usable = hidden.isfinite().flatten(1).all(1)
    shares: Sequence[Tensor] = [_share(head.logits(states), head.groups.bucket) for states in row_states(hidden, chunk)]
    whole = torch.cat([*shares, hidden.new_zeros(0, dtype=torch.float64)]).view(hidden.shape[:2])
    mass = torch.where(usable[:, None], whole, 0.0).sum(0)
    return torch.cat((usable.sum()[None].double(), mass))


def _share(logits: Tensor, bucket: int) -> Tensor:
    return (logits[:, bucket] - logits.logsumexp(1)).double().exp()
