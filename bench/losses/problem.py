"""Inputs of the loss benchmarks: random tensors with the shapes of a small student and a large teacher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pipeline.loss.matching import STRATEGIES, search_ranges
from pipeline.loss.sparse_kl import kl_matrix, matched_kl
from pipeline.signal import SparseSignal, Unembedding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """Shapes of a measurement; by default a small student's head and a large teacher's layers."""

    tokens: int = 256
    width: int = 1536
    vocab: int = 151_936
    students: int = 7
    teachers: int = 20
    kept: int = 64
    """Ids per token and teacher layer; no tail, as in the default codec."""


def normal(*shape: int, std: float, seed: int) -> Tensor:
    """Normal random numbers in bfloat16, made without a float32 copy."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=std, generator=generator).to(DEVICE)


@cache
def head_weight(vocab: int, width: int) -> Tensor:
    """[V, d] head weight. Drawing it takes seconds, so all problems share one."""
    return normal(vocab, width, std=width**-0.5, seed=0)


class Problem:
    """Tensors of a case, in bfloat16. The student's distributions have an entropy of about ln V - 8 nat."""

    def __init__(self, case: Case, trained: bool = False):
        generator = torch.Generator().manual_seed(0)

        self.case = case
        self.h = normal(case.students, case.tokens, case.width, std=4.0, seed=1).requires_grad_()
        self.hidden = normal(case.tokens, case.width, std=4.0, seed=2)
        self.weight = head_weight(case.vocab, case.width).detach().requires_grad_(trained)
        self.head = Unembedding(self.weight, case.vocab)
        shape = (case.tokens, case.teachers, case.kept)
        ids = torch.randint(case.vocab, shape, generator=generator).to(DEVICE)
        probs = torch.full(shape, 1 / case.kept, device=DEVICE)
        tail = torch.zeros(shape[:2], device=DEVICE)
        self.signal = SparseSignal(ids, probs, tail, probs.log().mean(-1), has_tail=False)
        self.labels = ids[:, 0, 0].contiguous()
        self.ranges = search_ranges(case.students, case.teachers)

    def clear(self) -> None:
        """Drop gradients, so that every run allocates its own."""
        self.h.grad = self.weight.grad = None


def interaction(problem: Problem) -> tuple[Tensor, list[int]]:
    """This project's interaction loss: search, draw, and the gradient of the drawn candidates, for all student layers.

    Returns KL [S, J] and the match.
    """
    matrix = kl_matrix(problem.h, problem.head, problem.signal, problem.ranges)
    match = STRATEGIES["adaptive"].match(matrix.values / problem.case.tokens, torch.Generator().manual_seed(0))
    matched_kl(problem.h, problem.head, problem.signal, match, matrix).sum().backward()
    return matrix.values, [column for column in match if column is not None]
