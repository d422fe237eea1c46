"""Label smoothing and generalised cross-entropy against dense autograd in float64."""

import pytest
import torch
from dense_losses import dense_ce, dense_logits, grads, make_h, make_head
from operations import Operations

from pipeline.loss.linear_ce import linear_cross_entropy
from pipeline.loss.robust_ce import generalised_cross_entropy, smoothed_cross_entropy
from pipeline.signal import Unembedding

HEADS = [{}, {"bias": True, "padding": 5}, {"scale": 0.3}, {"softcap": 3.0, "scale": 1.7}]


def random_labels(tokens, vocab):
    return torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(9))


def dense_smoothed(h, head, labels, smoothing):
    log_probs = dense_logits(h, head).log_softmax(-1)
    given = log_probs.gather(-1, labels.expand(len(h), -1)[..., None])[..., 0]
    return -((1 - smoothing) * given + smoothing * log_probs.mean(-1)).sum(1)


def dense_generalised(h, head, labels, power):
    p = dense_logits(h, head).softmax(-1).gather(-1, labels.expand(len(h), -1)[..., None])[..., 0]
    return ((1 - p**power) / power).sum(1)


PAIRS = [
    (smoothed_cross_entropy, dense_smoothed, 0.1),
    (smoothed_cross_entropy, dense_smoothed, 0.9),
    (generalised_cross_entropy, dense_generalised, 0.7),
    (generalised_cross_entropy, dense_generalised, 1.0),
]


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize(("ours", "naive", "value"), PAIRS)
@pytest.mark.parametrize(("layers", "tokens", "vocab", "chunk"), [(1, 7, 31, None), (3, 13, 50, 4)])
def test_equals_dense_autograd_in_float64(ours, naive, value, options, layers, tokens, vocab, chunk):
    head, labels = make_head(vocab, 6, **options), random_labels(tokens, vocab)
    h = make_h(layers, tokens, 6).requires_grad_()
    upstream = torch.arange(1.0, layers + 1, dtype=torch.float64)
    found, truth = ours(h, head, labels, value, chunk=chunk), naive(h, head, labels, value)
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(*(grads(x @ upstream, h)[0] for x in (found, truth)))


@pytest.mark.parametrize(("loss", "value"), [(smoothed_cross_entropy, 0.3), (generalised_cross_entropy, 0.6)])
def test_gradcheck_with_a_trained_head(loss, value):
    head, labels = make_head(9, 4, bias=True, scale=1.3, softcap=5.0), random_labels(3, 9)

    def summed(h, weight, bias):
        return loss(h, Unembedding(weight, 9, bias, head.scale, head.softcap), labels, value, chunk=2)

    inputs = [x.requires_grad_() for x in (make_h(1, 3, 4), head.weight, head.bias)]
    assert torch.autograd.gradcheck(summed, inputs)


def test_both_become_cross_entropy_in_the_limit():
    head, labels = make_head(31, 6), random_labels(7, 31)
    h = make_h(2, 7, 6).requires_grad_()
    truth = dense_ce(h, head, labels)
    for found in (
        smoothed_cross_entropy(h, head, labels, 0.0),
        generalised_cross_entropy(h, head, labels, 1e-9),
        linear_cross_entropy(h, head, labels),
    ):
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(*(grads(x.sum(), h)[0] for x in (found, truth)), rtol=1e-6, atol=1e-6)


def test_a_label_that_the_student_finds_unlikely_weighs_less():
    """The gradient of generalised cross-entropy is that of cross-entropy times p^q, token by token."""
    head, labels = make_head(31, 6), random_labels(7, 31)
    h = make_h(1, 7, 6).requires_grad_()
    p = dense_logits(h, head).softmax(-1)[0].gather(-1, labels[:, None]).detach()
    plain = grads(linear_cross_entropy(h, head, labels).sum(), h)[0][0]
    torch.testing.assert_close(grads(generalised_cross_entropy(h, head, labels, 0.7).sum(), h)[0][0], p**0.7 * plain)


@pytest.mark.parametrize(("loss", "value"), [(smoothed_cross_entropy, 0.3), (generalised_cross_entropy, 0.6)])
def test_a_label_outside_the_vocabulary_is_refused_and_no_token_is_no_error(loss, value):
    head = make_head(31, 6)
    with pytest.raises(ValueError, match="from 2 to 31, the common vocabulary from 0 to 30"):
        loss(make_h(1, 2, 6), head, torch.tensor([2, 31]), value)
    h = make_h(1, 0, 6).requires_grad_()
    assert loss(h, head, torch.empty(0, dtype=torch.long), value).tolist() == [0.0]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("loss", "value"), [(smoothed_cross_entropy, 0.3), (generalised_cross_entropy, 0.6)])
def test_no_more_logits_exist_at_once_than_those_of_one_chunk(loss, value, softcap):
    """A chunk in the weight's dtype, and in float32 as its tile; the slope of a soft-cap is as large as the tile."""
    tokens, vocab, width, chunk = 64, 5000, 6, 4
    head, labels = make_head(vocab, width, torch.bfloat16, softcap=softcap), random_labels(tokens, vocab)
    h = make_h(2, tokens, width, dtype=torch.bfloat16).requires_grad_()
    with Operations() as operations:
        loss(h, head, labels, value, chunk=chunk).sum().backward()
    logits = chunk * vocab * (2 + 4 + (0 if softcap is None else 4))
    assert logits <= operations.most_bytes < logits * 1.25 < tokens * vocab * 2
