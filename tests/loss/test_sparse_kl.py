"""The interaction loss against dense autograd in float64."""

from dataclasses import replace

import pytest
import torch
from dense_losses import (
    as_dtype,
    assert_as_accurate,
    dense_kl,
    dense_logits,
    grads,
    make_h,
    make_head,
    random_probs,
    topk_signal,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.loss import chunks, sparse_kl
from pipeline.loss.matching import STRATEGIES
from pipeline.loss.sparse_kl import TAIL_FLOOR, column_kl, kl_matrix, matched_kl
from pipeline.signal import HiddenSignal, SparseSignal, Unembedding

HEADS = [
    {},
    {"bias": True},
    {"padding": 5},
    {"scale": 0.3},
    {"softcap": 3.0},
    {"padding": 3, "bias": True, "scale": 1.7, "softcap": 4.0},
]
KINDS = ["tail", "no tail", "all kept", "padded", "sampled", "hidden"]
TOKENS, TEACHERS, VOCAB = 11, 5, 83  # more than HEAVY ids
WINDOW = [range(0, 3), range(1, 4), range(2, 5)]


def make_signal(kind, tokens=TOKENS, teachers=TEACHERS, vocab=VOCAB):
    if kind == "hidden":
        head = make_head(vocab, 7, padding=2, scale=1.5, softcap=6.0, seed=3)
        return HiddenSignal(make_h(tokens, teachers, 7, seed=4), head)
    probs = random_probs(tokens, teachers, vocab)
    if kind == "sampled":  # drawn with replacement: some ids occur twice, and there is no tail
        ids = torch.multinomial(probs.flatten(0, 1), 9, True, generator=torch.Generator().manual_seed(5))
        p = torch.full((tokens, teachers, 9), 1 / 9, dtype=torch.float64)
        return SparseSignal(ids.view(p.shape), p, torch.zeros_like(p[..., 0]), (p * p.log()).sum(-1), has_tail=False)
    signal = topk_signal(probs, {"all kept": vocab, "no tail": 6}.get(kind, 9), tail=kind != "no tail")
    if kind == "padded":
        pad = torch.zeros_like(signal.ids[..., :4])
        return SparseSignal(
            torch.cat((pad, signal.ids), -1),
            torch.cat((pad.double(), signal.probs), -1),
            signal.tail,
            signal.neg_entropy,
        )
    return signal


def dense_matrix(h, head, signal, window):
    values = torch.full((len(h), TEACHERS), torch.inf, dtype=torch.float64)
    for i, columns in enumerate(window):
        for j in columns:
            values[i, j] = dense_kl(h[i], head, signal, j).sum()
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_both_passes_equal_dense_autograd_in_float64(kind, options):
    head, signal = make_head(VOCAB, 6, **options), make_signal(kind)
    h = make_h(3, TOKENS, 6).requires_grad_()
    matrix = kl_matrix(h, head, signal, WINDOW, chunk=4)
    torch.testing.assert_close(matrix.values, dense_matrix(h.detach(), head, signal, WINDOW))
    assert not matrix.values.requires_grad
    upstream = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)  # each layer has another weight
    for match in ([0, 1, 2], [2, 3, 4], [1, 1, 4]):
        ours = matched_kl(h, head, signal, match, matrix)
        truth = torch.stack([dense_kl(x, head, signal, j).sum() for x, j in zip(h, match, strict=True)])
        torch.testing.assert_close(ours, truth)
        torch.testing.assert_close(*(grads(x @ upstream, h)[0] for x in (ours, truth)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_last_layer_with_a_trained_head_equals_dense_autograd(kind, options):
    head, signal = make_head(VOCAB, 6, **options), make_signal(kind)
    h = make_h(TOKENS, 6).requires_grad_()
    trained = [h, head.weight.requires_grad_()] + ([] if head.bias is None else [head.bias.requires_grad_()])
    ours, truth = column_kl(h, head, signal, -1, chunk=4), dense_kl(h, head, signal, TEACHERS - 1).sum()
    torch.testing.assert_close(ours, truth)
    for mine, theirs in zip(grads(3 * ours, *trained), grads(3 * truth, *trained), strict=True):
        torch.testing.assert_close(mine, theirs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_ragged_shapes_equal_dense_autograd_in_float64(data):
    """Any shape, chunk size and tile size, also single rows and no rows."""
    tokens, vocab, width = (data.draw(st.integers(*ends)) for ends in ((0, 13), (2, 60), (1, 5)))
    students = data.draw(st.integers(1, 3))
    teachers = data.draw(st.integers(students, 5))
    kept, tail = data.draw(st.integers(1, vocab)), data.draw(st.booleans())
    signal = topk_signal(random_probs(tokens, teachers, vocab), kept, tail and kept < vocab)
    head = make_head(vocab, width, **data.draw(st.sampled_from(HEADS)))
    h = make_h(students, tokens, width, spread=0.5).requires_grad_()  # no student tail below TAIL_FLOOR
    window = STRATEGIES["adaptive"].window(students, teachers)
    match = [data.draw(st.sampled_from(columns)) for columns in window]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "TILE_ELEMENTS", vocab * data.draw(st.integers(1, 5)))
        matrix = kl_matrix(h, head, signal, window, data.draw(st.integers(1, 14)))
        ours = matched_kl(h, head, signal, match, matrix)
    truth = torch.stack([dense_kl(x, head, signal, j).sum() for x, j in zip(h, match, strict=True)])
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(matrix.values[range(students), match], truth.detach())
    torch.testing.assert_close(*(grads(x.sum(), h)[0] for x in (ours, truth)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ragged_shapes_of_the_last_layer_equal_dense_autograd_in_float64(data):
    """A trained head, every kind of signal, any shape and chunk size, a few tokens or none."""
    tokens, vocab, width = (data.draw(st.integers(*ends)) for ends in ((0, 9), (10, 60), (1, 5)))
    kind, options = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(HEADS))
    signal, head = make_signal(kind, tokens, 2, vocab), make_head(vocab, width, **options)
    h = make_h(tokens, width, spread=0.5)  # no student tail below TAIL_FLOOR
    inputs = [x.requires_grad_() for x in (h, head.weight, head.bias) if x is not None]
    ours = column_kl(h, head, signal, 1, data.draw(st.integers(1, 10)))
    truth = dense_kl(h, head, signal, 1).sum()
    torch.testing.assert_close(ours, truth)
    for found, expected in zip(grads(ours, *inputs), grads(truth, *inputs, unused=True), strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if expected is None else expected)


def test_a_token_s_weight_scales_its_probabilities_tail_and_entropy():
    """So a weighted mean needs no code of its own: both passes and all gradients are then weighted."""
    head, h, weights = make_head(VOCAB, 6, scale=1.2), make_h(2, TOKENS, 6).requires_grad_(), torch.rand(TOKENS) * 3
    signal = make_signal("tail")
    scaled = replace(
        signal,
        probs=signal.probs * weights[:, None, None],
        tail=signal.tail * weights[:, None],
        neg_entropy=signal.neg_entropy * weights[:, None],
    )
    matrix = kl_matrix(h, head, scaled, [range(2), range(3)])
    ours = torch.cat((matched_kl(h, head, scaled, [1, 2], matrix), column_kl(h[0], head, scaled, 1)[None]))
    truth = torch.stack([(weights * dense_kl(x, head, signal, j)).sum() for x, j in ((h[0], 1), (h[1], 2), (h[0], 1))])
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(*(grads(x.sum(), h)[0] for x in (ours, truth)))


@pytest.mark.parametrize("kind", ["tail", "sampled", "hidden"])
def test_adapters_on_the_head_get_their_gradient(kind):
    """With LoRA on the head, its weight is W + B A, and its gradient reaches A and B."""
    frozen, h, signal = make_head(VOCAB, 6, padding=3), make_h(TOKENS, 6).requires_grad_(), make_signal(kind)
    b, a = make_h(VOCAB + 3, 2, spread=0.3, seed=8).requires_grad_(), make_h(2, 6, spread=0.3, seed=9).requires_grad_()
    head = replace(frozen, weight=frozen.weight + b @ a)
    ours, truth = column_kl(h, head, signal, 1, chunk=5), dense_kl(h, head, signal, 1).sum()
    for found, expected in zip(*(grads(x, h, b, a) for x in (ours, truth)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["tail", "sampled", "hidden"])
def test_gradients_equal_finite_differences(kind):
    signal = make_signal(kind, tokens=2, teachers=2, vocab=41)
    head = make_head(41, 4, bias=True, scale=1.3, softcap=5.0)

    def last(h, weight, bias):
        return column_kl(h, Unembedding(weight, 41, bias, head.scale, head.softcap), signal, 1, 1)

    def matched(h):
        return matched_kl(h, head, signal, [1], kl_matrix(h, head, signal, [range(2)]))

    assert torch.autograd.gradcheck(matched, [make_h(1, 2, 4).requires_grad_()])
    assert torch.autograd.gradcheck(last, [x.requires_grad_() for x in (make_h(2, 4), head.weight, head.bias)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 4.0, 12.0])  # from a flat student to an almost certain one
@pytest.mark.parametrize("kind", ["tail", "sampled", "hidden"])
def test_the_error_is_at_most_the_naive_one_of_the_same_dtype(dtype, spread, kind):
    tokens, vocab, width = 60, 507, 33
    signal = make_signal(kind, tokens, 2, vocab)
    if kind == "hidden":
        signal = HiddenSignal(signal.hidden.to(dtype), as_dtype(signal.unembedding, dtype))
    head, h = make_head(vocab, width, dtype), make_h(1, tokens, width, dtype=dtype, spread=spread)
    assert_matched_kl_is_as_accurate(h, head, signal, dtype)


def assert_matched_kl_is_as_accurate(h, head, signal, dtype):
    exact = as_dtype(head, torch.float64)
    h = h.requires_grad_()
    h64 = h.detach().double().requires_grad_()
    ours = matched_kl(h, head, signal, [1], kl_matrix(h, head, signal, [range(2)], chunk=25))[0]
    truth = dense_kl(h64[0], exact, signal, 1).sum()
    naive = naive_low_dtype(h, head, signal)
    tiny = 2 * torch.finfo(torch.bfloat16).eps if dtype == torch.bfloat16 else 2e-6
    assert_as_accurate(ours.detach(), naive.detach(), truth.detach(), tiny)
    assert_as_accurate(*(grads(loss, x)[0] for loss, x in ((ours, h), (naive, h), (truth, h64))), tiny)


def naive_low_dtype(h, head, signal):
    """The usual implementation: product in the low dtype, softmax in float32, and autograd for the rest."""
    identity = Unembedding(torch.eye(head.vocab), head.vocab)
    if isinstance(signal, HiddenSignal):
        logits = dense_logits(signal.hidden, signal.unembedding)
        signal = HiddenSignal(logits.float(), identity)
    return dense_kl(dense_logits(h, head)[0].float(), identity, signal, 1).sum()


@pytest.mark.parametrize("tail", [True, False])
def test_a_confident_token_in_bfloat16_keeps_its_gradient(tail):
    """Student and teacher are both almost certain of one id, so E_q[W] - W[id] would be only rounding error."""
    vocab, width, dtype = 300, 16, torch.bfloat16
    head = make_head(vocab, width, dtype)
    generator = torch.Generator().manual_seed(3)
    certain_ids = torch.randint(vocab, (40,), generator=generator)
    h = (50 * torch.nn.functional.normalize(head.weight[certain_ids].double())).to(dtype)[None]
    logits = dense_logits(h.double(), as_dtype(head, torch.float64))[0]
    probs = torch.softmax(logits * 0.8, -1)[:, None].expand(-1, 2, -1)
    assert probs.amax(-1).median() > 0.999
    assert_matched_kl_is_as_accurate(h, head, topk_signal(probs, 12, tail), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_chunk_size_changes_no_number(kind):
    head, signal, h = make_head(VOCAB, 6), make_signal(kind), make_h(3, TOKENS, 6).requires_grad_()
    results = []
    for chunk in (1, 4, TOKENS, None):
        matrix = kl_matrix(h, head, signal, WINDOW, chunk)
        loss = matched_kl(h, head, signal, [1, 2, 4], matrix, chunk).sum() + column_kl(h[2], head, signal, 4, chunk)
        results.append((matrix.values, loss.detach(), *grads(loss, h)))
    for result in results[1:]:
        for value, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(value, first, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_tile_size_changes_no_number(kind, monkeypatch):
    head, signal, h = make_head(VOCAB, 6, softcap=4.0), make_signal(kind), make_h(3, TOKENS, 6).requires_grad_()
    results = []
    for rows in (1, 4, TOKENS):
        monkeypatch.setattr(chunks, "TILE_ELEMENTS", rows * VOCAB)
        matrix = kl_matrix(h, head, signal, WINDOW)
        loss = matched_kl(h, head, signal, [1, 2, 4], matrix).sum() + column_kl(h[2], head, signal, 4)
        results.append((matrix.values, loss.detach(), *grads(loss, h)))
    for result in results[1:]:
        for value, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(value, first, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["tail", "sampled", "hidden"])
def test_micro_batches_add_up_to_the_whole_batch(kind):
    """Even with unequal sizes: the functions return sums, never means."""
    head, signal, h = make_head(VOCAB, 6), make_signal(kind), make_h(3, TOKENS, 6).requires_grad_()

    def value_loss_gradient(rows):
        x, part = h[:, rows].detach().requires_grad_(), signal.part(rows)
        matrix = kl_matrix(x, head, part, WINDOW)
        loss = matched_kl(x, head, part, [0, 2, 3], matrix).sum() + column_kl(x[2], head, part, -1)
        return matrix.values, loss.detach(), *grads(loss, x)

    whole = value_loss_gradient(slice(None))
    values, losses, gradients = zip(*map(value_loss_gradient, (slice(0, 3), slice(3, 4), slice(4, None))), strict=True)
    for parts, one in zip((sum(values), sum(losses), torch.cat(gradients, 1)), whole, strict=True):
        torch.testing.assert_close(parts, one)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "sampled"])
def test_the_kl_is_never_negative(kind):
    head, signal = make_head(VOCAB, 6), make_signal(kind)
    for seed in range(5):
        values = kl_matrix(make_h(3, TOKENS, 6, seed=seed), head, signal, WINDOW).values
        assert (values >= 0).all()


@pytest.mark.parametrize("kept", [1, 9, 40, VOCAB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kl_to_itself_and_its_gradient_are_zero(kept, dtype):
    head, h = make_head(VOCAB, 6, dtype, scale=1.2, softcap=9.0), make_h(1, TOKENS, 6, dtype=dtype).requires_grad_()
    signal = topk_signal(dense_logits(h.detach()[0].double(), as_dtype(head, torch.float64)).softmax(-1)[:, None], kept)
    loss = matched_kl(h, head, signal, [0], kl_matrix(h, head, signal, [range(1)]))
    tiny = 1e-6 if dtype == torch.float32 else 1e-9
    assert abs(loss.item()) <= tiny * TOKENS
    assert grads(loss.sum(), h)[0].abs().max() <= tiny
    assert grads(column_kl(h[0], head, signal, 0), h)[0].abs().max() <= tiny


def test_the_exact_kl_to_itself_is_zero_to_the_last_bit_in_bfloat16():
    head, h = make_head(VOCAB, 6, torch.bfloat16), make_h(1, TOKENS, 6, dtype=torch.bfloat16).requires_grad_()
    signal = HiddenSignal(h.detach().transpose(0, 1), head)
    matrix = kl_matrix(h, head, signal, [range(1)])
    loss = matched_kl(h, head, signal, [0], matrix)
    assert matrix.values.item() == loss.item() == 0.0
    assert not grads(loss.sum(), h)[0].any()


def test_shifting_all_logits_changes_nothing():
    head, signal, h = make_head(VOCAB, 6, bias=True), make_signal("tail"), make_h(3, TOKENS, 6)
    shifted = Unembedding(head.weight, VOCAB, head.bias + 100.0)
    values = [kl_matrix(h, x, signal, WINDOW).values for x in (head, shifted)]
    torch.testing.assert_close(*values)


def test_the_kl_grows_with_the_kept_ids_up_to_the_dense_kl():
    head, h, probs = make_head(VOCAB, 6), make_h(1, TOKENS, 6), random_probs(TOKENS, 1, VOCAB)
    values = [kl_matrix(h, head, topk_signal(probs, k), [range(1)]).values.item() for k in (1, 5, 20, 60, VOCAB)]
    assert values == sorted(values)
    log_q = dense_logits(h, head)[0].log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, probs[:, 0], reduction="sum").item()
    assert values[-1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("tail", [0.0, 1e-9, 1e-6, 1e-3, 0.3])
@pytest.mark.parametrize("logit", [5.0, 14.0, 20.0, 80.0])  # the student's tail: 3e-2, 4e-6, 1e-8, 0 in float32
def test_tails_near_zero_stay_finite_and_bounded(tail, logit):
    r = torch.tensor([tail])
    neg_entropy = torch.special.xlogy(1 - r, 1 - r) + torch.special.xlogy(r, r)
    signal = SparseSignal(torch.tensor([[[0]]]), (1 - r).view(1, 1, 1), r.view(1, 1), neg_entropy.view(1, 1))
    head = Unembedding(torch.eye(6), 6)
    h = torch.tensor([[[logit, 0, 0, 0, 0, 0.0]]], requires_grad=True)
    losses = matched_kl(h, head, signal, [0], kl_matrix(h, head, signal, [range(1)])), column_kl(h[0], head, signal, 0)
    student = float(5 / (torch.tensor(logit, dtype=torch.float64).exp() + 5))
    floored = max(student, TAIL_FLOOR)
    exact = (1 - tail) * torch.tensor((1 - tail) / (1 - student)).log() + torch.special.xlogy(r, r / floored)
    for loss in losses:
        gradient = grads(loss.sum(), h)[0].flatten()
        noise = 3e-7 + tail * 3e-7 / floored  # of 1 - q in float32
        assert loss.item() == pytest.approx(exact.item(), abs=noise)
        assert gradient[0].item() == pytest.approx(tail - student, abs=noise)  # q - p: lowers an overconfident logit
        pull = student - tail if student > TAIL_FLOOR else 0.0  # distributed over the ids of the tail
        assert gradient[1:].tolist() == pytest.approx([pull / 5] * 5, abs=noise)


@pytest.mark.parametrize("kind", ["tail", "sampled"])
def test_a_token_of_weight_zero_has_exactly_no_loss_and_no_gradient(kind):
    head, signal, h = make_head(VOCAB, 6), make_signal(kind), make_h(1, TOKENS, 6).requires_grad_()
    for field in (signal.probs, signal.tail, signal.neg_entropy):
        field[4] = 0.0
    loss = matched_kl(h, head, signal, [2], kl_matrix(h, head, signal, [range(5)])).sum()
    loss = loss + column_kl(h[0], head, signal, -1)
    (gradient,) = grads(loss, h)
    assert not gradient[0, 4].any()
    assert gradient[0, [0, 3, 5]].abs().amin(1).min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_zeros_and_zero_gradients(kind):
    head, signal, h = make_head(VOCAB, 6), make_signal(kind).part(slice(0, 0)), make_h(3, 0, 6).requires_grad_()
    head.weight.requires_grad_()
    matrix = kl_matrix(h, head, signal, WINDOW)
    assert matrix.values[0].tolist() == [0, 0, 0, torch.inf, torch.inf]
    loss = matched_kl(h, head, signal, [0, 1, 2], matrix)
    assert loss.tolist() == [0, 0, 0]
    (loss.sum() + column_kl(h[0], head, signal, -1)).backward()
    assert h.grad.shape == h.shape
    assert not head.weight.grad.any()


def test_a_layer_matched_to_none_gives_zero_with_a_graph():
    head, signal, h = make_head(VOCAB, 6), make_signal("tail"), make_h(3, TOKENS, 6).requires_grad_()
    strategy = STRATEGIES["last_only"]
    matrix = kl_matrix(h, head, signal, strategy.window(3, 5))
    assert matrix.values.isinf().all()
    loss = matched_kl(h, head, signal, strategy.match(matrix.values, torch.Generator()), matrix)
    assert loss.tolist() == [0, 0, 0]
    assert not grads(loss.sum(), h)[0].any()


@pytest.mark.parametrize("kind", ["tail", "hidden"])
def test_intermediate_layers_give_a_trained_head_no_gradient(kind):
    head, signal, h = make_head(VOCAB, 6), make_signal(kind), make_h(3, TOKENS, 6).requires_grad_()
    head.weight.requires_grad_()
    matched_kl(h, head, signal, [0, 1, 2], kl_matrix(h, head, signal, WINDOW)).sum().backward()
    assert h.grad.any() and head.weight.grad is None


def test_the_backward_pass_needs_no_weight():
    """Under ZeRO-3 the head is released by then."""
    head, signal, h = make_head(VOCAB, 6), make_signal("tail"), make_h(3, TOKENS, 6).requires_grad_()
    loss = matched_kl(h, head, signal, [0, 1, 2], kl_matrix(h, head, signal, WINDOW)).sum() + column_kl(
        h[2], head, signal, -1
    )
    (expected,) = torch.autograd.grad(loss, h, retain_graph=True)
    head.weight.data = torch.empty(0, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, h)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["all kept", "tail", "sampled", "hidden"])
def test_the_adaptive_draw_equals_that_from_dense_divergences(kind):
    head, signal, h = make_head(VOCAB, 6, torch.float32), make_signal(kind), make_h(3, TOKENS, 6, dtype=torch.float32)
    if kind == "hidden":
        signal = HiddenSignal(signal.hidden.float(), as_dtype(signal.unembedding, torch.float32))
    ours = kl_matrix(h, head, signal, WINDOW).values / TOKENS
    dense = dense_matrix(h.double(), as_dtype(head, torch.float64), signal, WINDOW) / TOKENS
    for seed in range(50):
        draws = [STRATEGIES["adaptive"].match(kl, torch.Generator().manual_seed(seed)) for kl in (ours, dense)]
        assert draws[0] == draws[1]


def test_no_tensor_has_the_size_of_all_tokens_times_the_vocabulary(monkeypatch):
    """The largest tensor that torch creates is that of a chunk."""
    head, signal = make_head(VOCAB, 6), make_signal("tail", tokens=64)
    h = make_h(3, 64, 6).requires_grad_()
    with LargestTensor() as largest:
        loss = matched_kl(h, head, signal, [0, 1, 2], kl_matrix(h, head, signal, WINDOW, 4), 4).sum()
        (loss + column_kl(h[2], head, signal, -1, 4)).backward()
    limit = max(4 * VOCAB, 64 * TEACHERS * signal.ids.shape[2], 64 * sparse_kl.HEAVY * signal.ids.shape[2])
    assert 4 * VOCAB <= largest.elements <= limit


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_different_numbers_of_tokens_are_an_error():
    with pytest.raises(ValueError, match=r"\(3, 4, 6\).*signal has 11 tokens"):
        kl_matrix(make_h(3, 4, 6), make_head(VOCAB, 6), make_signal("tail"), WINDOW)


def test_different_vocabularies_are_an_error_with_both():
    with pytest.raises(ValueError, match=r"teacher's head is cut to 83 ids, the student's to 80.*common vocabulary"):
        column_kl(make_h(TOKENS, 6), make_head(80, 6), make_signal("hidden"), 0)


def test_a_match_outside_the_window_is_an_error():
    head, signal, h = make_head(VOCAB, 6), make_signal("tail"), make_h(3, TOKENS, 6)
    with pytest.raises(
        ValueError, match=r"student layer 1 is matched to teacher layer 4, outside its window range\(1, 4\)"
    ):
        matched_kl(h, head, signal, [0, 4, 4], kl_matrix(h, head, signal, WINDOW))
