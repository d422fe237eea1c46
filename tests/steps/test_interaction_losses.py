"""The losses of one micro-batch of interaction, and what is logged of its draw, against the naive forms in float64."""

import math

import pytest
import torch
from dense_losses import dense_ce, dense_kl, grads, make_h, make_head, random_probs, topk_signal
from operations import Waits

from pipeline.loss import matching
from pipeline.loss.matching import matching_rule
from pipeline.signal import SparseSignal, Unembedding
from pipeline.steps.interact import Draw, interaction_losses

S, J, T, V, D = 2, 4, 9, 23, 6


@pytest.fixture
def problem():
    head = make_head(V, D)
    h = make_h(S + 1, T, D).requires_grad_()
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(3))
    signal = topk_signal(random_probs(T, J + 1, V), V, tail=False)
    return h, head, signal, labels


def losses_of(problem, name="adaptive", temperature=None, **flags):
    h, head, signal, labels = problem
    draw = Draw(matching_rule(name, temperature), torch.Generator().manual_seed(5), **flags)
    return interaction_losses(h, head, signal, labels, draw)


def test_each_layer_follows_its_match_and_the_last_the_last(problem):
    h, head, signal, _ = problem
    found = losses_of(problem)
    for layer, column in enumerate(found["match"].tolist()):
        torch.testing.assert_close(found["matched"][layer], dense_kl(h[layer], head, signal, column).sum())
    torch.testing.assert_close(found["last"], dense_kl(h[-1], head, signal, J).sum())
    assert "cross_entropy" not in found and "deep_supervision" not in found


def test_deep_supervision_is_the_cross_entropy_of_each_target_layer_and_trains_no_head(problem):
    h, head, _, labels = problem
    head.weight.requires_grad_()
    found = losses_of(problem, "last_only", cross_entropy=True, deep_supervision=True)
    torch.testing.assert_close(found["deep_supervision"], dense_ce(h[:-1], head, labels))
    torch.testing.assert_close(found["cross_entropy"], dense_ce(h[-1:], head, labels)[0])
    ours, truth = (grads(x.sum(), h)[0] for x in (found["deep_supervision"], dense_ce(h[:-1], head, labels)))
    torch.testing.assert_close(ours, truth)
    assert grads(found["deep_supervision"].sum(), head.weight, unused=True) == (None,)
    assert grads(found["cross_entropy"], head.weight)[0].any()


def test_the_entropy_of_each_draw_is_there_where_something_is_drawn(problem):
    uniform = losses_of(problem, "random")
    first = uniform["match"][0].item()
    assert uniform["entropy"].tolist() == pytest.approx([math.log(3), math.log(3 - first)], abs=1e-6)
    cold = losses_of(problem, "adaptive", temperature=1e-6)
    assert cold["entropy"].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert losses_of(problem, "ordered_argmin")["entropy"].numel() == 0


@pytest.mark.parametrize("has_tail", [True, False])
@pytest.mark.parametrize(("name", "reads"), [("adaptive", 2), ("ordered_argmin", 1), ("uniform", 0)])
def test_only_the_draw_waits_for_the_device_and_before_it_has_the_losses_to_compute(name, reads, has_tail, monkeypatch):
    ids, probs, tail = (torch.empty(T, J + 1, *kept, device="meta") for kept in ((5,), (5,), ()))
    signal = SparseSignal(ids.long(), probs, tail, tail, has_tail)
    h = torch.empty(S + 1, T, D, device="meta", requires_grad=True)
    head, labels = Unembedding(torch.empty(V, D, device="meta"), V), torch.empty(T, dtype=torch.int64, device="meta")
    draw = Draw(matching_rule(name), torch.Generator().manual_seed(5), cross_entropy=True)
    operations_before = []
    monkeypatch.setattr(matching, "_matrix", _noting(matching._matrix, lambda: operations_before.append(waits.total)))
    with Waits() as waits:
        losses = interaction_losses(h, head, signal, labels, draw)
        (losses["matched"].sum() + losses["last"] + losses["cross_entropy"]).backward()
    assert sum(waits.places.values()) == len(operations_before) == reads, waits.places
    if reads == 2:  # the second read finds the device idle: between the two, only the CPU has drawn
        assert operations_before[1] - operations_before[0] < 60 < waits.total - operations_before[1]


def _noting(function, note):
    def noting(*args):
        note()
        return function(*args)

    return noting
