"""A cache over more ids than a student has, cut to the student's: what a teacher of those ids alone would have said."""

import math
from dataclasses import replace

import pytest
import torch
from random_teacher import V, dense, hidden_and_head, kl, round_trip, sampled_codec
from torch.testing import assert_close

from pipeline.cache.cut import cut_to
from pipeline.codec.registry import make_codec
from pipeline.loss.sparse_kl import column_kl
from pipeline.signal import Unembedding

COMMON = V - 6
EPS = torch.finfo(torch.float32).eps


def co_hosted(hidden, head):
    """[T, J, V'] float64: the softmax over the common ids, which a teacher beside this student is asked for."""
    return replace(head, vocab=COMMON).logits(hidden).double().softmax(-1)


def rounding(hidden, head):
    """What a few roundings of the largest logit do to a probability, relative to it."""
    return 16 * EPS * float(head.logits(hidden).abs().max())


def test_states_are_read_through_the_common_rows_alone():
    hidden, head = hidden_and_head()
    signal = cut_to(make_codec("hidden").decode(round_trip(make_codec("hidden"), hidden, head), head), COMMON)
    logits = signal.unembedding.logits(signal.hidden)
    assert torch.equal(logits, replace(head, vocab=COMMON).logits(signal.hidden))


def test_where_every_id_is_kept_it_is_the_softmax_over_the_common_ids():
    hidden, head = hidden_and_head()
    codec = make_codec("topk", k=V)
    whole = codec.decode(round_trip(codec, hidden, head), head)
    stored, cut = dense(whole), cut_to(whole, COMMON)
    expected = stored[..., :COMMON]
    expected = expected / (expected.sum(-1, keepdim=True) + whole.tail.double()[..., None])
    assert (stored[..., COMMON:].sum(-1) > 1e-4).any() and not dense(cut)[..., COMMON:].any()
    assert_close(dense(cut)[..., :COMMON], expected, rtol=rounding(hidden, head), atol=EPS)
    own = torch.special.xlogy(expected, expected).sum(-1)
    assert_close(cut.neg_entropy.double(), own, rtol=0, atol=V * rounding(hidden, head) + _of_tail(cut))


def _of_tail(signal):
    tail = signal.tail.double()
    return float(torch.special.xlogy(tail, tail).abs().max())


def test_samples_give_the_kl_that_a_teacher_beside_this_student_would_have_given():
    """Averaged over a grid of u a count is exact; that of the common ids is off by at most a point an id above."""
    hidden, head = hidden_and_head()
    points, grid = 1024, 32
    codec, truth = sampled_codec(points=points), co_hosted(hidden, head)
    logits = torch.randn(*truth.shape, generator=torch.Generator().manual_seed(3)).double()
    log_q = torch.cat([logits.log_softmax(-1), torch.full((*truth.shape[:2], V - COMMON), -torch.inf)], -1)
    found = torch.zeros(truth.shape[:2], dtype=torch.float64)
    for step in range(grid):
        u = torch.full(truth.shape[:2], (step + 0.5) / grid, dtype=torch.float64)
        found += kl(cut_to(codec.decode(round_trip(codec, hidden, head, u)), COMMON), log_q) / grid
    share = head.logits(hidden).double().softmax(-1)[..., :COMMON].sum(-1)
    expected = (truth * (truth.log() - log_q[..., :COMMON])).sum(-1)
    lost = (V - COMMON) / points / share  # ids above are counted to a point each; so is the entropy that they take away
    allowed = lost * (log_q[..., :COMMON].abs().amax(-1) + math.log(points) + 1)
    assert ((found - expected).abs() <= allowed).all() and (share < 0.999).any()


def test_samples_without_a_point_above_stay_bit_for_bit():
    hidden, head = hidden_and_head()
    head = replace(head, bias=head.bias.index_fill(0, torch.arange(COMMON, len(head.bias)), -1000.0), softcap=None)
    codec = sampled_codec()
    whole = codec.decode(round_trip(codec, hidden, head))
    cut = cut_to(whole, COMMON)
    assert (whole.ids[whole.probs > 0] < COMMON).all()
    for name in ("probs", "tail", "neg_entropy"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)), name
    assert torch.equal(dense(cut), dense(whole))


@pytest.mark.parametrize("name", ["sampled", "topk"])
def test_a_distribution_above_the_common_ids_alone_pulls_at_nothing(name):
    """As of a token that the teacher alone has."""
    hidden, head = hidden_and_head()
    head = replace(head, bias=head.bias.index_fill(0, torch.tensor([V - 1]), 1000.0), softcap=None)
    codec = sampled_codec() if name == "sampled" else make_codec("topk", k=4)
    signal = cut_to(codec.decode(round_trip(codec, hidden, head), head), COMMON)
    student = torch.randn(len(hidden), 8, requires_grad=True)
    loss = column_kl(student, Unembedding(torch.randn(COMMON, 8), COMMON), signal, 0)
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()
