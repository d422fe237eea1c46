"""What the benches of the losses work on: random numbers of a small student's shape beside a large teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pipeline.loss.matching import adaptive, search_ranges
from pipeline.loss.sparse_kl import kl_matrix, matched_kl
from pipeline.signal import SparseSignal, Unembedding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """What is measured: by default a small student's head beside a large teacher's layers."""

    tokens: int = 256
    width: int = 1536
    vocab: int = 151_936
    students: int = 7
    teachers: int = 20
    kept: int = 64
    """Ids a teacher layer names for a token; no tail, as the default codec."""


def normal(*shape: int, spread: float, seed: int) -> Tensor:
    """Random numbers in bfloat16, without a float32 copy in between."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=spread, generator=generator).to(DEVICE)


@cache
def head_weight(vocab: int, width: int) -> Tensor:
    """[V, d]; drawing it takes seconds, and all problems may have the same."""
    return normal(vocab, width, spread=width**-0.5, seed=0)


class Problem:
    """Tensors of a case, in bfloat16; the student's distributions have an entropy of about ln V - 8 nat."""

    def __init__(self, case: Case, trained: bool = False):
        generator = torch.Generator().manual_seed(0)

        self.case = case
        self.h = normal(case.students, case.tokens, case.width, spread=4.0, seed=1).requires_grad_()
        self.hidden = normal(case.tokens, case.width, spread=4.0, seed=2)
        self.weight = head_weight(case.vocab, case.width).detach().requires_grad_(trained)
        self.head = Unembedding(self.weight, case.vocab)
        said = (case.tokens, case.teachers, case.kept)
        ids = torch.randint(case.vocab, said, generator=generator).to(DEVICE)
        probs = torch.full(said, 1 / case.kept, device=DEVICE)
        tail = torch.zeros(said[:2], device=DEVICE)
        self.signal = SparseSignal(ids, probs, tail, probs.log().mean(-1), has_tail=False)
        self.labels = ids[:, 0, 0].contiguous()
        self.windows = search_ranges(case.students, case.teachers)

    def clear(self) -> None:
        """Forget gradients, so that every run allocates its own."""
        self.h.grad = self.weight.grad = None


def interaction(problem: Problem) -> tuple[Tensor, list[int]]:
    """Ours: search, draw, and the gradient of what was drawn, for all student layers. KL [S, J] and the match."""
    matrix = kl_matrix(problem.h, problem.head, problem.signal, problem.windows)
    match = adaptive(matrix.values / problem.case.tokens, torch.Generator().manual_seed(0))
    matched_kl(problem.h, problem.head, problem.signal, match, matrix).sum().backward()
    return matrix.values, [column for column in match if column is not None]
