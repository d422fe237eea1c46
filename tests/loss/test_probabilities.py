"""The most likely id, found by blocks, and the probabilities of a chunk."""

import pytest
import torch
from dense_losses import dense_logits, make_h, make_head

from pipeline.loss import chunks
from pipeline.loss.chunks import Workspace, times_weight
from pipeline.loss.probabilities import BLOCK, blocked_max, probability_chunks


@pytest.mark.parametrize("vocab", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("place", ["anywhere", "first", "last", "everywhere"])
def test_blocked_max_returns_the_maximum_and_one_of_its_ids(vocab, place):
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab))
    if place == "everywhere":
        logits.fill_(-3.0)
    elif place != "anywhere":
        logits[:, 0 if place == "first" else -1] = 9.0
    top, ids = blocked_max(logits)
    torch.testing.assert_close(top, logits.amax(1, keepdim=True), rtol=0, atol=0)
    torch.testing.assert_close(logits.gather(1, ids), top, rtol=0, atol=0)


@pytest.mark.parametrize("vocab", [83, 2 * BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("heavy", [1, 4])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "softcap": 5.0}, {"bias": True, "padding": 3}], ids=str)
def test_probability_chunks_follow_the_naive_form(vocab, heavy, options):
    """The docstring's naive form in float64, over chunks that share their memory."""
    tokens = 11
    head, h = make_head(vocab, 6, **options), make_h(tokens, 6)
    ids = torch.randint(vocab, (tokens, 5), generator=torch.Generator().manual_seed(3))
    logits = dense_logits(h, head)
    expected_ids = logits.topk(heavy).indices
    slope = head.scale * (1 if head.softcap is None else 1 - (logits / head.softcap) ** 2)
    expected = (logits - logits.amax(1, keepdim=True)).exp().scatter(1, expected_ids, 0) * slope
    log_q, rows_found = torch.zeros(tokens, heavy + 5, dtype=torch.float64), []

    def collect(rows, heavy_ids, chunk_log_q, log_sum):
        torch.testing.assert_close(heavy_ids, expected_ids[rows])
        torch.testing.assert_close(log_sum, logits[rows].logsumexp(1, keepdim=True))
        log_q[rows] = chunk_log_q

    for rows, gradient in probability_chunks(h, Workspace(head, 4), ids, heavy, collect):
        torch.testing.assert_close(gradient, expected[rows])
        rows_found += range(rows.start, rows.stop)
    assert rows_found == list(range(tokens))
    torch.testing.assert_close(log_q, logits.log_softmax(1).gather(1, torch.cat((expected_ids, ids), 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [7, 64, 65, 200])
def test_the_blocked_product_with_the_head_is_at_least_as_accurate(dtype, vocab, monkeypatch):
    monkeypatch.setattr(chunks, "PRODUCT_BLOCK", 64)
    gradient, weight = make_h(9, vocab, dtype=dtype), make_h(vocab, 33, dtype=dtype, seed=2)
    truth = gradient.double() @ weight.double()
    error, naive = ((x.double() - truth).norm() for x in (times_weight(gradient, weight), gradient @ weight))
    assert error <= naive + 1e-12
