"""Chunked linear cross-entropy against dense autograd in float64."""

import pytest
import torch
from dense_losses import as_dtype, assert_as_accurate, dense_ce, dense_logits, grads, make_h, make_head
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.loss import chunks
from pipeline.loss.chunks import ROW_BLOCK, row_chunks, rows_per_chunk, wide_logits
from pipeline.loss.linear_ce import linear_cross_entropy, token_log_probs
from pipeline.signal import Unembedding

HEADS = [
    {},
    {"bias": True},
    {"padding": 5},
    {"scale": 0.3},
    {"softcap": 3.0},
    {"padding": 3, "bias": True, "scale": 1.7, "softcap": 4.0},
]


def random_labels(tokens, vocab):
    return torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize(("layers", "tokens", "vocab", "chunk"), [(1, 7, 31, None), (3, 13, 50, 4), (2, 5, 17, 100)])
def test_equals_dense_autograd_in_float64(options, layers, tokens, vocab, chunk):
    head, labels = make_head(vocab, 6, **options), random_labels(tokens, vocab)
    h = make_h(layers, tokens, 6).requires_grad_()
    upstream = torch.arange(1.0, layers + 1, dtype=torch.float64)  # each layer has another weight
    ours, truth = linear_cross_entropy(h, head, labels, chunk), dense_ce(h, head, labels)
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(*(grads(x @ upstream, h)[0] for x in (ours, truth)))


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_a_trained_head_gets_gradients_and_its_padding_rows_get_zero(options):
    head, labels = make_head(23, 6, **options), random_labels(11, 23)
    h = make_h(1, 11, 6).requires_grad_()
    trained = [h, head.weight.requires_grad_()] + ([] if head.bias is None else [head.bias.requires_grad_()])
    ours = grads(2.5 * linear_cross_entropy(h, head, labels, 4)[0], *trained)
    truth = grads(2.5 * dense_ce(h, head, labels)[0], *trained)
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine in ours[1:]:
        assert not mine[23:].any()


def test_gradcheck():
    head, labels = make_head(9, 4, bias=True, scale=1.3, softcap=5.0), random_labels(3, 9)

    def loss(h, weight, bias):
        return linear_cross_entropy(h, Unembedding(weight, 9, bias, head.scale, head.softcap), labels, 2)

    inputs = [x.requires_grad_() for x in (make_h(1, 3, 4), head.weight, head.bias)]
    assert torch.autograd.gradcheck(loss, inputs)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ragged_shapes_equal_dense_autograd_in_float64(data):
    """Any shape and chunk size, a trained head, a few tokens or none."""
    tokens, vocab, width = (data.draw(st.integers(*ends)) for ends in ((0, 9), (1, 300), (1, 5)))
    head, h = make_head(vocab, width, **data.draw(st.sampled_from(HEADS))), make_h(1, tokens, width)
    labels, inputs = random_labels(tokens, vocab), [h.requires_grad_(), head.weight.requires_grad_()]
    ours = linear_cross_entropy(h, head, labels, data.draw(st.one_of(st.none(), st.integers(1, 10))))
    truth = dense_ce(h, head, labels)
    torch.testing.assert_close(ours, truth)
    for found, expected in zip(*(grads(x.sum(), *inputs) for x in (ours, truth)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(252, 507, 64), (33, 123, 17)])
def test_the_error_is_at_most_the_naive_one_of_the_same_dtype(dtype, shape):
    tokens, vocab, width = shape
    head, h, labels = (
        make_head(vocab, width, dtype),
        make_h(1, tokens, width, dtype=dtype),
        random_labels(tokens, vocab),
    )
    exact = as_dtype(head, torch.float64)
    results = []
    for loss, x, w in (
        (lambda x, w: linear_cross_entropy(x, Unembedding(w, vocab), labels, 100), h, head.weight),
        (lambda x, w: dense_ce(x, Unembedding(w, vocab), labels), h, head.weight),
        (lambda x, w: dense_ce(x, Unembedding(w, vocab), labels), h.double(), exact.weight),
    ):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        value = loss(x, w)
        results.append((value.detach(), *grads(value.sum() / tokens, x, w)))
    for ours, naive, truth in zip(*results, strict=True):
        assert_as_accurate(ours, naive, truth, tiny=2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2e-6)


def test_weight_gradient_of_many_small_chunks_is_summed_in_float32():
    head, h, labels = make_head(40, 8, torch.bfloat16), make_h(1, 600, 8, dtype=torch.bfloat16), random_labels(600, 40)
    head.weight.requires_grad_()
    gradients = [grads(linear_cross_entropy(h, head, labels, chunk).sum(), head.weight)[0] for chunk in (1, 600)]
    exact = as_dtype(head, torch.float64)
    exact.weight.requires_grad_()
    (truth,) = grads(dense_ce(h.double(), exact, labels).sum(), exact.weight)
    many, one = ((x.double() - truth).norm() / truth.norm() for x in gradients)
    assert many <= one + 2 * torch.finfo(torch.bfloat16).eps


def test_chunk_size_changes_no_number():
    head, labels, h = make_head(31, 6), random_labels(12, 31), make_h(2, 12, 6).requires_grad_()
    values = [linear_cross_entropy(h, head, labels, chunk) for chunk in (1, 5, 12, None)]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(
            *(grads(x.sum(), h)[0] for x in (value, linear_cross_entropy(h, head, labels, 1))),
            rtol=1e-12,
            atol=1e-14,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tile_and_slice_size_change_no_number(dtype, monkeypatch):
    head, labels, h = make_head(31, 6, dtype, padding=3, bias=True, scale=1.2), random_labels(12, 31), make_h(1, 12, 6)
    trained = [h.to(dtype).requires_grad_(), head.weight.requires_grad_(), head.bias.requires_grad_()]
    results = []
    for tile, rows in ((1, 1), (5, 7), (12, 34)):
        monkeypatch.setattr(chunks, "TILE_ELEMENTS", tile * 31)
        monkeypatch.setattr(chunks, "SLICE_ELEMENTS", rows * 6)
        loss = linear_cross_entropy(trained[0], head, labels, 9)
        results.append((loss.detach(), *grads(0.7 * loss.sum(), *trained)))
    for result in results[1:]:
        for value, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(value, first)


@pytest.mark.parametrize(("total", "rows"), [(0, 4), (1, 4), (4, 4), (5, 4), (450, 441), (7, 1)])
def test_row_chunks_cover_the_rows_with_nearly_equal_sizes(total, rows):
    sizes = [chunk.stop - chunk.start for chunk in row_chunks(total, rows)]
    assert [i for chunk in row_chunks(total, rows) for i in range(total)[chunk]] == list(range(total))
    assert len(sizes) == -(-total // rows)
    assert max(sizes, default=0) <= rows and max(sizes, default=0) - min(sizes, default=0) <= len(sizes)


def test_row_chunks_keep_whole_blocks():
    assert [chunk.stop - chunk.start for chunk in row_chunks(4096, 13 * ROW_BLOCK)] == [1408, 1408, 1280]
    assert [chunk.stop - chunk.start for chunk in row_chunks(600, 13 * ROW_BLOCK)] == [600]


def test_shifting_all_logits_changes_nothing():
    head, labels, h = make_head(31, 6, bias=True), random_labels(12, 31), make_h(2, 12, 6)
    shifted = Unembedding(head.weight, 31, head.bias + 100.0)
    torch.testing.assert_close(linear_cross_entropy(h, shifted, labels), linear_cross_entropy(h, head, labels))


def test_no_tokens_give_zeros_and_gradients_of_zero():
    head, h = make_head(31, 6, padding=2), make_h(1, 0, 6).requires_grad_()
    head.weight.requires_grad_()
    loss = linear_cross_entropy(h, head, torch.empty(0, dtype=torch.int64))
    assert loss.tolist() == [0.0]
    loss.sum().backward()
    assert h.grad.shape == h.shape
    assert head.weight.grad.shape == head.weight.shape and not head.weight.grad.any()


def test_no_gradient_is_computed_where_none_is_required():
    head, labels, h = make_head(31, 6), random_labels(12, 31), make_h(2, 12, 6).requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(h, head, labels).requires_grad
    assert not linear_cross_entropy(h.detach(), head, labels).requires_grad


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_token_log_probs_sum_to_the_loss(options):
    head, labels, h = make_head(31, 6, **options), random_labels(12, 31), make_h(2, 12, 6)
    log_probs = token_log_probs(h, head, labels, 5)
    assert log_probs.shape == (2, 12) and log_probs.dtype == torch.float32
    torch.testing.assert_close(-log_probs.sum(1), linear_cross_entropy(h, head, labels).float())


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_wide_logits_equal_unembedding_logits(options):
    head, h = make_head(31, 6, torch.float32, **options), make_h(12, 6, dtype=torch.float32)
    torch.testing.assert_close(wide_logits(h, head), head.logits(h))
    torch.testing.assert_close(wide_logits(h, head), dense_logits(h, head))


def test_rows_per_chunk_limits_the_elements():
    rows = rows_per_chunk(152_064)
    assert rows * 152_064 <= 2**26 < (rows + ROW_BLOCK) * 152_064 and rows % ROW_BLOCK == 0
    assert rows_per_chunk(2**30) == 1


def test_a_trained_head_with_several_layers_is_an_error():
    head, h = make_head(31, 6), make_h(2, 3, 6)
    head.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"one layer a call, got 2.*Call it layer by layer, or detach"):
        linear_cross_entropy(h, head, random_labels(3, 31))


@pytest.mark.parametrize("wrong", [31, -100])
def test_a_label_outside_the_vocabulary_is_an_error(wrong):
    labels = torch.tensor([1, wrong])
    with pytest.raises(ValueError, match=f"{wrong}.*common vocabulary from 0 to 30.*gather the response tokens"):
        linear_cross_entropy(make_h(1, 2, 6), make_head(31, 6), labels)


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"expected h \[L, T, d\] and labels \[T\], got \(1, 2, 6\) and \(3,\)"):
        linear_cross_entropy(make_h(1, 2, 6), make_head(31, 6), random_labels(3, 31))
