"""A cache's fidelity, against dense KL and autograd in float64."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_losses import dense_kl, dense_logits, make_h, make_head, topk_signal
from operations import Operations, Waits

from pipeline.loss import fidelity
from pipeline.loss.fidelity import Fidelity
from pipeline.loss.matching import search_ranges
from pipeline.signal import HiddenSignal, SparseSignal, Unembedding

TOKENS, LAYERS, VOCAB, WIDTH = 5, 6, 41, 7
HEADS = [{}, {"padding": 3, "bias": True, "scale": 1.7, "softcap": 4.0}]
KINDS = ["tail", "renormalised", "padded", "sampled", "some tails", "hidden"]
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # logits are float32, and sums go over a few tokens of a few nats


def measure(hidden, head, signal):
    return fidelity.measure(hidden, head, signal).read()


def make_hidden(tokens=TOKENS, layers=LAYERS, width=WIDTH, spread=1.5):
    return make_h(tokens, layers, width, spread=spread)


def make_signal(kind, hidden, head):
    if kind == "hidden":  # in lower precision
        return HiddenSignal(hidden.bfloat16(), head)
    probs = dense_logits(hidden, head).softmax(-1)
    if kind == "sampled":  # with replacement: some ids occur twice; the stored entropy is the true one
        ids = torch.multinomial(probs.flatten(0, 1), 16, True, generator=torch.Generator().manual_seed(5))
        p = torch.full((*probs.shape[:2], 16), 1 / 16, dtype=torch.float64)
        return SparseSignal(ids.view(p.shape), p, torch.zeros_like(p[..., 0]), torch.xlogy(probs, probs).sum(-1))
    signal = topk_signal(probs, 9, tail=kind != "renormalised")
    if kind == "padded":
        pad = torch.zeros_like(signal.ids[..., :4])
        ids, p = torch.cat((pad, signal.ids), -1), torch.cat((pad.double(), signal.probs), -1)
        return SparseSignal(ids, p, signal.tail, signal.neg_entropy)
    if kind == "some tails":
        without_tail = torch.arange(probs.shape[1]).expand(probs.shape[:2]) % 2 == 0
        without_tail[0] = ~without_tail[0]
        return SparseSignal(signal.ids, signal.probs, signal.tail.masked_fill(without_tail, 0.0), signal.neg_entropy)
    return signal


def cached_kl(h, head, signal, column):
    """dense_kl, but with the stored negative entropy."""
    kl = dense_kl(h, head, signal, column)
    if isinstance(signal, HiddenSignal):
        return kl
    p, r = signal.probs[:, column], signal.tail[:, column]
    return kl + signal.neg_entropy[:, column] - torch.xlogy(p, p).sum(-1) - torch.xlogy(r, r)


def reference(hidden, head, signal):
    """The sums of `Fidelity`, computed layer by layer."""
    exact = HiddenSignal(hidden, head)
    probs = dense_logits(hidden, head).softmax(-1)
    sums = {name: np.zeros(LAYERS) for name in fidelity.SUMS}
    for j in range(LAYERS):
        h = hidden[:, 1 if j == 0 else j - 1].clone().requires_grad_()
        true, cached = dense_kl(h, head, exact, j), cached_kl(h, head, signal, j)
        gradient, found = (torch.autograd.grad(kl.sum(), h)[0] for kl in (true, cached))
        true, cached = true.detach(), cached.detach()
        sums["entropy"][j] = -torch.xlogy(probs[:, j], probs[:, j]).sum()
        sums["kl_error"][j] = (cached - true).sum()
        sums["kl_error_squared"][j] = ((cached - true) ** 2).sum()
        sums["gradient_error_squared"][j] = ((found - gradient) ** 2).sum()
        sums["gradient_squared"][j] = (gradient**2).sum()
        for t in range(len(hidden)):
            if isinstance(signal, HiddenSignal):
                sums["mass"][j] += 1.0
            else:
                ids = set(signal.ids[t, j][signal.probs[t, j] > 0].tolist())
                sums["mass"][j] += sum(float(probs[t, j, i]) for i in ids)
    matrices = {"kl_true": np.zeros((3, LAYERS - 1)), "kl_cached": np.zeros((3, LAYERS - 1))}
    for row, columns in enumerate(search_ranges(3, LAYERS - 1)):
        for j in columns:
            matrices["kl_true"][row, j] = dense_kl(hidden[:, 2 * row], head, exact, j).sum()
            matrices["kl_cached"][row, j] = cached_kl(hidden[:, 2 * row], head, signal, j).sum()
    return {**sums, **matrices}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_sums_equal_dense_kl_and_autograd(kind, options):
    hidden, head = make_hidden(), make_head(VOCAB, WIDTH, **options)
    signal = make_signal(kind, hidden, head)
    found = measure(hidden, head, signal)
    for name, truth in reference(hidden, head, signal).items():
        np.testing.assert_allclose(getattr(found, name), truth, **FLOAT32, err_msg=name)


def test_the_summary_has_the_means():
    hidden, head = make_hidden(), make_head(VOCAB, WIDTH)
    signal = make_signal("renormalised", hidden, head)
    truth, summary = reference(hidden, head, signal), measure(hidden, head, signal).summary()
    assert summary["tokens"] == TOKENS and len(summary["layers"]) == LAYERS
    for j, layer in enumerate(summary["layers"]):
        assert layer["entropy"] == pytest.approx(truth["entropy"][j] / TOKENS, rel=1e-5)
        assert layer["mass"] == pytest.approx(truth["mass"][j] / TOKENS, rel=1e-5)
        assert layer["kl_bias"] == pytest.approx(truth["kl_error"][j] / TOKENS, rel=1e-4)
        assert layer["kl_rms"] == pytest.approx((truth["kl_error_squared"][j] / TOKENS) ** 0.5, rel=1e-4)
        ratio = truth["gradient_error_squared"][j] / truth["gradient_squared"][j]
        assert layer["gradient_error"] == pytest.approx(ratio**0.5, rel=1e-4)
    distances = []
    for row, columns in enumerate(search_ranges(3, LAYERS - 1)):
        draws = []
        for name in ("kl_true", "kl_cached"):
            kl = truth[name][row, list(columns)] / TOKENS
            weights = np.exp(-kl * (kl.max() - kl.min() + 1e-6) / 2)
            draws.append(weights / weights.sum())
        distances.append(abs(draws[0] - draws[1]).sum() / 2)
    assert min(distances) > 1e-4
    assert summary["draw_tv"] == pytest.approx(np.mean(distances), rel=1e-4)


def test_a_bias_computed_by_hand():
    """p = 1/2, 1/4, 1/8, 1/8, with a uniform stand-in. The cache has the first two ids, renormalised."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    hidden = torch.stack((torch.full((4,), 0.25), p)).log()[None]
    probs = torch.tensor([[[0.5, 0.5], [2 / 3, 1 / 3]]])
    signal = SparseSignal(torch.tensor([[[0, 1], [0, 1]]]), probs, torch.zeros(1, 2), torch.xlogy(probs, probs).sum(-1))
    deep = measure(hidden, Unembedding(torch.eye(4), 4), signal).summary()["layers"][1]
    entropy = 1.75 * math.log(2)
    kept_entropy = math.log(3) - 2 / 3 * math.log(2)
    assert deep["entropy"] == pytest.approx(entropy)
    assert deep["mass"] == pytest.approx(0.75)
    assert deep["kl_bias"] == pytest.approx((math.log(4) - kept_entropy) - (math.log(4) - entropy))
    assert deep["kl_rms"] == pytest.approx(deep["kl_bias"])
    error = np.array([1 / 2 - 2 / 3, 1 / 4 - 1 / 3, 1 / 8, 1 / 8])
    gradient = np.array([1 / 4 - 1 / 2, 0, 1 / 8, 1 / 8])
    assert deep["gradient_error"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(gradient))


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_same_hidden_states_have_no_error(dtype, tiny):
    """Both sides compute logits in the head's dtype, in products of different heights: only that may differ."""
    hidden, head = make_hidden().to(dtype), make_head(VOCAB, WIDTH, dtype, padding=2)
    summary = measure(hidden, head, HiddenSignal(hidden, head)).summary()
    for layer in summary["layers"]:
        assert layer["mass"] == pytest.approx(1.0, abs=1e-12)
        assert max(layer["kl_rms"], layer["gradient_error"], summary["draw_tv"]) < tiny


def test_a_cache_of_all_ids_has_no_error():
    hidden, head = make_hidden(), make_head(VOCAB, WIDTH, padding=2)
    summary = measure(hidden, head, topk_signal(dense_logits(hidden, head).softmax(-1), VOCAB)).summary()
    for layer in summary["layers"]:
        assert layer["mass"] == pytest.approx(1.0, abs=1e-12)
        assert max(layer["kl_rms"], layer["gradient_error"], summary["draw_tv"]) < 1e-6


def test_a_small_gradient_error_is_measured_with_a_bfloat16_head():
    """Two separate products in the head's dtype would differ by rounding, 4e-3: several times the error here."""
    hidden, head = make_hidden().bfloat16(), make_head(VOCAB, WIDTH, torch.bfloat16)
    p = head.logits(hidden).double().softmax(-1)
    moved = p * torch.exp(1e-3 * make_h(*p.shape, spread=1.0, seed=6))
    moved /= moved.sum(-1, keepdim=True)
    ids = torch.arange(VOCAB).expand(p.shape)
    signal = SparseSignal(ids, moved, torch.zeros_like(p[..., 0]), torch.xlogy(moved, moved).sum(-1))
    weight = head.weight.double()
    for j, layer in enumerate(measure(hidden, head, signal).summary()["layers"]):
        q = p[:, 1 if j == 0 else j - 1]
        truth = ((moved - p)[:, j] @ weight).norm() / ((q - p[:, j]) @ weight).norm()
        assert truth < 2e-3
        assert layer["gradient_error"] == pytest.approx(float(truth), rel=0.02)


@pytest.mark.parametrize("kind", ["tail", "sampled", "hidden"])
def test_sums_add_over_batches_of_any_size(kind, monkeypatch):
    hidden, head = make_hidden(), make_head(VOCAB, WIDTH, softcap=5.0)
    signal = make_signal(kind, hidden, head)
    whole = measure(hidden, head, signal)
    for cut in (0, 2, TOKENS):
        parts = (measure(hidden[rows], head, signal.part(rows)) for rows in (slice(0, cut), slice(cut, None)))
        assert_same(next(parts) + next(parts), whole)
    monkeypatch.setattr(fidelity, "FLOATS_PER_LOGIT", 2**40)  # memory for one token at a time
    assert_same(measure(hidden, head, signal), whole)


def assert_same(found: Fidelity, expected: Fidelity):
    assert found.tokens == expected.tokens
    for name, values in expected.to_json().items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("layers", [2, 3, LAYERS])
def test_json_keeps_all_digits(layers):
    hidden, head = make_hidden(layers=layers), make_head(VOCAB, WIDTH)
    found = measure(hidden, head, make_signal("tail", hidden, head))
    again = Fidelity.from_json(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()
    assert (again + found).to_json() == (found + found).to_json()
    assert again.summary() == found.summary()


def test_no_token_gives_an_empty_summary_and_adds_nothing():
    hidden, head = make_hidden(), make_head(VOCAB, WIDTH)
    signal = make_signal("tail", hidden, head)
    none, some = measure(hidden[:0], head, signal.part(slice(0))), measure(hidden, head, signal)
    assert none.tokens == 0 and none.summary()["draw_tv"] is None
    assert set(none.summary()["layers"][0].values()) == {None}
    assert (none + some).to_json() == some.to_json()


def test_a_token_that_is_not_finite_is_left_out():
    hidden, head = make_hidden(), make_head(VOCAB, WIDTH)
    signal = make_signal("tail", hidden, head)
    broken = hidden.clone()
    broken[1, 2, 0], broken[3, 0, 1] = torch.nan, torch.inf
    rest = [0, 2, 4]
    assert_same(measure(broken, head, signal), measure(hidden[rest], head, signal.part(rest)))


def on_meta(kind, layers):
    """Arguments of `measure` on a device without values."""
    hidden, head = make_hidden(layers=layers), make_head(VOCAB, WIDTH, softcap=4.0)
    signal = make_signal(kind, hidden, head)
    head = replace(head, weight=head.weight.to("meta"))
    if isinstance(signal, HiddenSignal):
        return hidden.to("meta"), head, HiddenSignal(signal.hidden.to("meta"), head)
    moved = {name: getattr(signal, name).to("meta") for name in ("ids", "probs", "tail", "neg_entropy")}
    return hidden.to("meta"), head, replace(signal, **moved)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device_and_more_layers_are_no_more_operations(kind):
    """Layer by layer, 21 layers were 6,200 operations with views, and 300 waits, for each chunk of a token or two."""
    counted = []
    for layers in (6, 21):
        arguments = on_meta(kind, layers)
        with Waits() as waits:
            fidelity.measure(*arguments)
        assert not waits.places
        counted.append(waits.total)
    assert counted[0] == counted[1] < 160


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_takes_the_memory_that_is_planned_for_it(kind, monkeypatch):
    head, layers, rows = make_head(2003, WIDTH, torch.float32, softcap=4.0), 6, 3
    hidden = make_hidden(8, layers).float()
    signal = make_signal(kind, hidden, head)
    planned = fidelity.FLOATS_PER_LOGIT * layers * head.vocab
    monkeypatch.setattr(fidelity, "CHUNK_ELEMENTS", rows * planned)
    with Operations() as operations:
        fidelity.measure(hidden, head, signal)
    assert operations.most_bytes < 4 * rows * planned * 1.05  # and what is small beside [c, J, V]


def test_one_target_layer_has_no_draw_to_compare():
    hidden, head = make_hidden(layers=2), make_head(VOCAB, WIDTH)
    summary = measure(hidden, head, make_signal("renormalised", hidden, head)).summary()
    assert summary["draw_tv"] is None and all(layer["kl_bias"] > 0 for layer in summary["layers"])


def test_errors_have_the_numbers():
    hidden, head = make_hidden(), make_head(VOCAB, WIDTH)
    signal = make_signal("tail", hidden, head)
    with pytest.raises(ValueError, match="cached signal has 5 tokens and 6 layers, the teacher has 4 and 6"):
        measure(hidden[1:], head, signal)
    with pytest.raises(ValueError, match="two cached layers"):
        measure(hidden[:, :1], head, make_signal("tail", hidden[:, :1], head))
    fewer = measure(hidden[:, :3], head, make_signal("tail", hidden[:, :3], head))
    with pytest.raises(ValueError, match="of 6 layers cannot be added to that of 3"):
        measure(hidden, head, signal) + fewer
