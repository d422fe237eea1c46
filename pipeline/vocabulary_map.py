"""Teacher ids as student ids: where the two tokenizers differ (recipe: vocabulary: mapped).

V_t ids (rows of the teacher's head), V_s ids of the student. A teacher id that means exactly one student id becomes
that id; all others go into one bucket, whose id is V_s. So the teacher's distribution p becomes one over V_s + 1 ids:

    p'(i) = sum of p(t) over the teacher ids t with class_of[t] = i        i = 0 .. V_s, the bucket last

This is linear in p, so an unbiased sample of p' estimates what it says of p without bias too. The student's side is its
q over the student ids that some teacher id means, and the sum of its q over all others, `outside`, as its bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.signal import Bucket, SparseSignal, Unembedding

NO_LOGIT = -1e30
"""Logit of an id that no teacher id means: its probability is exactly 0. An infinite one would make p log p NaN."""


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Which student id each teacher id means."""

    class_of: np.ndarray
    """[V_t] int32: a student id, or `bucket`."""
    bucket: int
    """V_s, the number of the student's ids, and the id of the bucket."""

    def __post_init__(self) -> None:
        """Raise ValueError where an id is neither one of the student's nor the bucket."""
        if not len(self.class_of) or not 0 <= self.class_of.min() <= self.class_of.max() <= self.bucket:
            raise ValueError(f"expected student ids from 0 to {self.bucket - 1}, or {self.bucket} for the bucket")

    @property
    def size(self) -> int:
        """V_s + 1: the ids that mapped distributions are over."""
        return self.bucket + 1

    @cached_property
    def outside(self) -> np.ndarray:
        """[U] int64: the student ids that no teacher id means, in ascending order."""
        return np.setdiff1d(np.arange(self.bucket), self.class_of)

    @property
    def digest(self) -> str:
        """SHA-256 of the map: what it adds to a cache's identity."""
        return hashlib.sha256(f"{self.bucket} ".encode() + self.class_of.astype("<i4").tobytes()).hexdigest()

    def describe(self) -> str:
        """A sentence with the numbers of ids that are mapped and that are not."""
        mapped, outside = int((self.class_of < self.bucket).sum()), len(self.outside)
        return (
            f"mapped vocabulary: {mapped:,} of the teacher's {len(self.class_of):,} ids mean one of the student's "
            f"{self.bucket:,}; {len(self.class_of) - mapped:,} of the teacher's and {outside:,} of the student's are "
            "in the bucket"
        )

    def to_student(self, signal: SparseSignal) -> SparseSignal:
        """A signal over V_s + 1 ids -> over the student's ids, with the bucket apart.

        Where the signal has a tail, the bucket becomes a part of it: one bucket holds both, which is coarser, and its
        KL again a lower bound.
        """
        at = signal.ids == self.bucket
        mass = (signal.probs * at).sum(-1)
        ids, probs = signal.ids.masked_fill(at, 0), signal.probs.masked_fill(at, 0.0)
        if not signal.has_tail:
            outside = torch.from_numpy(self.outside).to(ids.device)
            return replace(signal, ids=ids, probs=probs, bucket=Bucket(mass, outside))
        tail = signal.tail + mass
        neg_entropy = torch.special.xlogy(probs, probs).sum(-1) + torch.special.xlogy(tail, tail)
        return replace(signal, ids=ids, probs=probs, tail=tail, neg_entropy=neg_entropy)


class TeacherGroups:
    """The teacher ids of each student id and of the bucket, as index tensors on one device."""

    def __init__(self, mapping: VocabularyMap, device: torch.device | str = "cpu"):
        class_of = torch.from_numpy(mapping.class_of).long()
        self.size, self.bucket = mapping.size, mapping.bucket
        self.class_of = class_of.to(device)
        first, more = _rounds(class_of, mapping.bucket)
        self._in_bucket = torch.nonzero(class_of == mapping.bucket)[:, 0].to(device)
        self._empty = torch.nonzero(first < 0)[:, 0].to(device)
        self._first = first.clamp(min=0).to(device)
        self._more = [(ids.to(device), classes.to(device)) for ids, classes in more]

    def logits(self, logits: Tensor) -> Tensor:
        """The teacher's logits [..., V_t] -> [..., V_s + 1], whose softmax is the mapped distribution.

        log-sum-exp over the teacher ids of each, without atomic sums: equal inputs give equal bytes on a GPU too.
        """
        mapped = logits.index_select(-1, self._first).index_fill_(-1, self._empty, NO_LOGIT)
        for ids, classes in self._more:
            mapped[..., classes] = torch.logaddexp(mapped[..., classes], logits[..., ids])
        if len(self._in_bucket):
            mapped[..., self.bucket] = logits.index_select(-1, self._in_bucket).logsumexp(-1)
        return mapped


def _rounds(class_of: Tensor, bucket: int) -> tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]:
    """The first teacher id of each class [bucket + 1], -1 for none and for the bucket; the others, in rounds.

    A round is (teacher ids, their classes) and names no class twice.
    """
    ids = torch.nonzero(class_of < bucket)[:, 0]
    order = class_of[ids].argsort(stable=True)
    ids, classes = ids[order], class_of[ids][order]
    number = torch.arange(len(ids)) - torch.searchsorted(classes, classes)  # among the ids of its class
    first = torch.full((bucket + 1,), -1)
    first[classes[number == 0]] = ids[number == 0]
    rounds = range(1, int(number.max()) + 1 if len(number) else 1)
    return first, [(ids[number == n], classes[number == n]) for n in rounds]


@dataclass(frozen=True, kw_only=True)
class MappedHead(Unembedding):
    """The teacher's head with its logits over the student's ids and the bucket: `vocab` is V_s + 1, `weight` [V_t, d].

    Codecs take it as they take any head. Its products are logits already, in float32.
    """

    groups: TeacherGroups

    @classmethod
    def of(cls, head: Unembedding, groups: TeacherGroups) -> MappedHead:
        """A teacher's head, mapped. Raises ValueError where the map is for a head of another size."""
        if head.vocab != len(groups.class_of):
            raise ValueError(f"the map is for a head of {len(groups.class_of)} ids, this one has {head.vocab}")
        return cls(head.weight, groups.size, head.bias, head.scale, head.softcap, groups=groups)

    @property
    def teacher(self) -> Unembedding:
        """The head itself, over the teacher's ids."""
        return Unembedding(self.weight, len(self.groups.class_of), self.bias, self.scale, self.softcap)

    def at_teacher_ids(self, gradient: Tensor, teacher_logits: Tensor) -> Tensor:
        """A gradient at the logits [..., V_s + 1] -> at the teacher's [..., V_t], from which they were joined.

        d mapped_i / d z_t is t's share of p'(i), softmax over the teacher ids of i.
        """
        mapped, class_of = self.groups.logits(teacher_logits), self.groups.class_of
        share = (teacher_logits - mapped.index_select(-1, class_of)).exp_()
        return gradient.index_select(-1, class_of).mul_(share)

    def buffer(self, rows: int) -> Tensor:
        """Memory for the logits of so many rows, in float32."""
        return self.weight.new_empty(rows, self.vocab, dtype=torch.float32)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [..., d] -> logits [..., V_s + 1] in float32."""
        return self.groups.logits(self.teacher.logits(hidden))

    def products(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """The same, written to `out` where it is given: `scale_and_cap_` has nothing left to do."""
        return self.logits(hidden) if out is None else out.copy_(self.logits(hidden))

    def scale_and_cap_(self, products: Tensor) -> Tensor:
        """Mapped logits as they are: scale and soft-cap are applied before ids are joined."""
        return products
