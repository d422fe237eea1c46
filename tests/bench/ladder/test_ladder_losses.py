"""The losses of the arms that have a program of their own, against naive float64 forms and autograd."""

from types import SimpleNamespace

import pytest
import torch
from dense_losses import dense_kl, dense_logits, grads, make_h, make_head, random_probs, topk_signal

from bench.ladder.distil_lens import DistilLens, jensen_shannon
from bench.ladder.features_l2 import FeaturesL2
from pipeline.signal import HiddenSignal
from pipeline.vlm.verbalizer import StoredHead

S, J, T, V, D, WIDE = 2, 5, 7, 23, 6, 8
PAIRS = [1, 4]  # floor((i + 1) J / S) - 1


@pytest.fixture
def problem():
    head, teacher = make_head(V, D), make_head(V, WIDE, seed=2)
    head.weight.requires_grad_()
    return make_h(S + 1, T, D).requires_grad_(), head, HiddenSignal(make_h(T, J + 1, WIDE, seed=4), teacher)


def made(module, problem):
    _, head, signal = problem
    student = SimpleNamespace(layers=tuple(range(1, S + 1)), head=SimpleNamespace(weight=head.weight))
    return module(student, StoredHead(signal.unembedding))


def losses_of(module, problem):
    h, head, signal = problem
    return module.losses(h, head, signal, torch.zeros(T, dtype=torch.int64), None)


def naive_jsd(h, head, signal, column):
    q, p = (dense_logits(*of).softmax(-1) for of in ((h, head), (signal.hidden[:, column], signal.unembedding)))
    m = (p + q) / 2
    return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2


def assert_equal_grads(ours, naive, *inputs):
    for found, truth in zip(grads(ours, *inputs), grads(naive, *inputs), strict=True):
        assert truth.any()
        torch.testing.assert_close(found, truth)


def test_lenses_are_the_mean_jensen_shannon_divergence_of_fixed_pairs(problem):
    h, head, signal = problem
    found = losses_of(made(DistilLens, problem), problem)
    naive = torch.stack([naive_jsd(h[i], head, signal, column) for i, column in enumerate(PAIRS)]) / S
    torch.testing.assert_close(found["matched"], naive)
    assert found["match"].tolist() == PAIRS
    assert_equal_grads(found["matched"].sum(), naive.sum(), h, head.weight)


def test_jensen_shannon_is_symmetric_and_between_zero_and_log_2():
    p, q = (make_h(T, V, spread=5.0, seed=seed) for seed in (1, 2))
    torch.testing.assert_close(jensen_shannon(p, q), jensen_shannon(q, p))
    assert jensen_shannon(p, p + 3.0).abs().max() < 1e-12
    apart = torch.full((1, V), -1e3).index_fill(1, torch.tensor([0]), 0.0)
    torch.testing.assert_close(jensen_shannon(apart, apart.roll(1)), torch.tensor([2.0]).log())


def test_features_are_the_mean_square_behind_a_map_of_each_layer(problem):
    h, _, signal = problem
    module = made(FeaturesL2, problem)
    found = losses_of(module, problem)
    naive = torch.stack(
        [
            sum(((one.weight @ h[i, t] + one.bias - signal.hidden[t, column]) ** 2).sum() / WIDE for t in range(T))
            for i, (one, column) in enumerate(zip(module.maps, PAIRS, strict=True))
        ]
    )
    torch.testing.assert_close(found["matched"], naive)
    assert_equal_grads(found["matched"].sum(), naive.sum(), h, *module.maps.parameters())


@pytest.mark.parametrize("module", [DistilLens, FeaturesL2])
def test_the_last_layers_follow_by_forward_kl(problem, module):
    h, head, signal = problem
    found, naive = losses_of(made(module, problem), problem)["last"], dense_kl(h[-1], head, signal, J).sum()
    torch.testing.assert_close(found, naive)
    assert_equal_grads(found, naive, h, head.weight)


def test_a_cache_of_distributions_is_refused(problem):
    h, head, _ = problem
    sparse = topk_signal(random_probs(T, J + 1, V), V, tail=False)
    with pytest.raises(ValueError, match="cache.codec.name=hidden"):
        losses_of(made(DistilLens, problem), (h, head, sparse))
    with pytest.raises(ValueError, match="cache.codec.name=hidden"):
        FeaturesL2(made(FeaturesL2, problem).student, None)
