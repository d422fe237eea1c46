"""Scores of labels against the naive formula in float64, whatever the chunk."""

from __future__ import annotations

import pytest
import torch

from pipeline.loss.label_scores import label_scores
from pipeline.signal import Unembedding

T, D, V = 37, 16, 301


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, Unembedding, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(rows, D, generator=generator).to(dtype) for rows in (T, V))
    labels = torch.randint(V, (T,), generator=generator)
    labels[::3] = (h.double() @ weight.double().T).argmax(1)[::3]
    return h, Unembedding(weight, V), labels


@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_naive_ones(dtype, chunk):
    h, unembedding, labels = problem(dtype)
    log_probs, likeliest = label_scores(h, unembedding, labels, chunk)
    logits = h.double() @ unembedding.weight.double().T
    truth = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    rounded = (h @ unembedding.weight.T).float().log_softmax(1).gather(1, labels[:, None])[:, 0]
    assert ((log_probs - truth).abs() <= (rounded - truth).abs() + 1e-5).all()
    assert likeliest.dtype == torch.bool and (likeliest == (logits.argmax(1) == labels)).all()
    assert likeliest.sum() >= T // 3 and not likeliest.all()


def test_no_labels_have_no_scores():
    h, unembedding, labels = problem(torch.float32)
    log_probs, likeliest = label_scores(h[:0], unembedding, labels[:0])
    assert log_probs.shape == likeliest.shape == (0,)
