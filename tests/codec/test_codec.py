"""Codecs: decoded bytes give the teacher's distributions, and the tail states correctly what is left out."""

import numpy as np
import pytest
import torch
from random_teacher import (
    J,
    T,
    V,
    dense,
    hidden_and_head,
    kl,
    pack_streams,
    random_order,
    round_trip,
    sampled_codec,
    uniform_draws,
)

from pipeline.codec.registry import CODECS, make_codec
from pipeline.errors import CacheError
from pipeline.signal import Unembedding


@pytest.mark.parametrize("k", [1, 4, 39, 40, 64])
def test_topk_probabilities_are_exact_within_float16(k):
    hidden, head = hidden_and_head()
    truth = head.logits(hidden).double().softmax(-1)
    codec = make_codec("topk", k=k)
    signal = codec.decode(round_trip(codec, hidden, head))
    kept = truth.gather(-1, signal.ids)
    assert torch.equal(signal.ids, truth.topk(min(k, V)).indices)
    # Each log-probability is off by half a float16 step. Rescaling to the true mass may add as much to all of them.
    step = 2.0**-11 * kept.log().abs().clamp(min=2**-4).amax(-1, keepdim=True)
    assert ((signal.probs - kept).abs() <= 2 * step * kept + 1e-7).all()
    assert (signal.tail - (1 - kept.sum(-1))).abs().max() < 1e-6


@pytest.mark.parametrize("k", [1, 8, 40])
@pytest.mark.parametrize("sharp", [0.0, 1.0, 30.0])
def test_topk_is_a_distribution_and_its_kl_to_itself_is_zero(k, sharp):
    hidden, head = hidden_and_head(sharp=sharp)
    codec = make_codec("topk", k=k)
    signal = codec.decode(round_trip(codec, hidden, head))
    assert (signal.probs <= 1).all() and (signal.probs >= 0).all() and (signal.tail >= 0).all()
    assert (signal.probs.double().sum(-1) + signal.tail - 1).abs().max() < 1e-6
    # p as a dense distribution: the tail is spread evenly over the ids that were not kept.
    left = max(1, V - k)
    spread = (signal.tail.double() / left)[..., None].expand(T, J, V).scatter(-1, signal.ids, signal.probs.double())
    assert kl(signal, spread.log()).abs().max() < 1e-6
    # The KL to the true distribution comes only from float16 rounding: second order in 2^-11 |log p|.
    assert kl(signal, head.logits(hidden).log_softmax(-1)).abs().max() < 1e-5


def test_topk_never_exceeds_the_dense_kl_and_never_renormalises():
    hidden, head = hidden_and_head(sharp=1.0)
    student = torch.randn(T, J, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    log_p = head.logits(hidden).double().log_softmax(-1)
    exact = (log_p.exp() * (log_p - student.double())).sum(-1)
    codec = make_codec("topk", k=4)
    signal = codec.decode(round_trip(codec, hidden, head))
    assert (kl(signal, student) <= exact + 1e-3).all()
    assert (signal.tail > 0.01).any(), "there is a tail, so the kept ids do not sum to 1"


def test_the_tail_of_a_sharp_distribution_is_exact_and_not_rounding_noise():
    head = Unembedding(torch.eye(4), 4)
    codec = make_codec("topk", k=1)
    signal = codec.decode(round_trip(codec, torch.tensor([[[40.0, 0, 0, 0]]]), head))
    torch.testing.assert_close(signal.tail[0, 0].double(), 3 * torch.tensor(-40.0).double().exp(), rtol=1e-5, atol=0)


def test_chunk_size_changes_no_number():
    hidden, head = hidden_and_head()
    codec = make_codec("topk", k=6)
    whole, pieces = codec.encode(hidden, head, uniform_draws()), codec.encode(hidden, head, uniform_draws(), chunk=2)
    assert torch.equal(whole["ids"], pieces["ids"])
    # A matrix product of another height rounds differently in float32's last bits: at most one step of float16.
    torch.testing.assert_close(whole["logprobs"], pieces["logprobs"], rtol=2**-10, atol=0)
    torch.testing.assert_close(whole["tail"], pieces["tail"], rtol=1e-5, atol=0)
    whole, pieces = (sampled_codec().encode(hidden, head, uniform_draws(), chunk=chunk) for chunk in (1024, 2))
    assert torch.equal(whole["ranks"], pieces["ranks"])
    torch.testing.assert_close(whole["entropy"], pieces["entropy"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_round_trip_is_bit_exact(dtype):
    hidden, head = hidden_and_head(dtype=getattr(torch, dtype))
    codec = make_codec("hidden", dtype=dtype)
    signal = codec.decode(round_trip(codec, hidden, head), head)
    assert torch.equal(signal.hidden, hidden)
    assert torch.equal(signal.unembedding.logits(signal.hidden), head.logits(hidden))


def test_hidden_needs_the_head_to_decode():
    hidden, head = hidden_and_head()
    codec = make_codec("hidden")
    with pytest.raises(ValueError, match="decodes through the teacher's head: pass its unembedding"):
        codec.decode(round_trip(codec, hidden, head))
    with pytest.raises(ValueError, match="pass its unembedding"):
        codec.empty(J)


@pytest.mark.parametrize("name", CODECS)
def test_a_layers_signal_does_not_depend_on_the_other_layers(name):
    hidden, head = hidden_and_head()
    codec = make_codec(name, order=random_order(V))
    arrays = round_trip(codec, hidden, head)
    all_layers, some = (codec.decode({n: a[:, c] for n, a in arrays.items()}, head) for c in ([0, 1, 2], [2, 0]))
    if name == "hidden":
        assert torch.equal(some.hidden, all_layers.hidden[:, [2, 0]])
    else:
        assert torch.equal(dense(some), dense(all_layers)[:, [2, 0]])
        assert torch.equal(some.tail, all_layers.tail[:, [2, 0]])
        assert torch.equal(some.neg_entropy, all_layers.neg_entropy[:, [2, 0]])


@pytest.mark.parametrize("name", CODECS)
def test_an_empty_signal_has_the_dtypes_and_shape_of_a_full_one(name):
    hidden, head = hidden_and_head()
    codec = make_codec(name, order=random_order(V))
    empty, full = codec.empty(J, head), codec.decode(round_trip(codec, hidden, head), head)
    for field in ("hidden",) if name == "hidden" else ("ids", "probs", "tail", "neg_entropy"):
        no_tokens, some = getattr(empty, field), getattr(full, field)
        assert no_tokens.dtype == some.dtype and no_tokens.shape[:2] == (0, J) and no_tokens.ndim == some.ndim


@pytest.mark.parametrize(
    ("vocab", "dtype", "size"), [(2**8, "uint8", 1), (2**16, "uint16", 2), (2**16 + 8, "int32", 4)]
)
def test_ids_are_stored_in_the_narrowest_dtype(vocab, dtype, size):
    head = Unembedding(torch.linspace(0, 1, vocab)[:, None], vocab)
    codec = make_codec("topk", k=3)
    streams = pack_streams(codec, torch.ones(2, 1, 1), head)
    assert len(streams[f"ids.{dtype}"]) == 2 * 3 * size
    signal = codec.decode(codec.unpack(streams, 2, 1))
    assert signal.ids[0, 0].tolist() == [vocab - 1, vocab - 2, vocab - 3]


@pytest.mark.parametrize("name", ["topk", "hidden"])
def test_streams_that_do_not_fit_are_errors(name):
    hidden, head = hidden_and_head()
    codec = make_codec(name)
    streams = pack_streams(codec, hidden, head)
    for stream in streams:
        with pytest.raises(ValueError):
            codec.unpack({**streams, stream: streams[stream][:-1]}, T, J)
        with pytest.raises(ValueError, match="numbers of type pickle; expected one of uint8"):
            codec.unpack({**streams, f"{stream.partition('.')[0]}.pickle": b""}, T, J)


def test_unknown_codecs_and_parameters_are_errors():
    with pytest.raises(CacheError, match=r"codec 'tree' is not known here; expected one of sampled, topk, hidden"):
        make_codec("tree", n=64)
    with pytest.raises(CacheError, match=r"codec 'topk' does not take .*'k': 0.*at least one id"):
        make_codec("topk", k=0)
    with pytest.raises(CacheError, match=r"codec 'hidden' does not take .*'k': 3"):
        make_codec("hidden", k=3)
    with pytest.raises(CacheError, match="bfloat16 or float32, asked for int8"):
        make_codec("hidden", dtype="int8")
    for points in (15, 1025):
        with pytest.raises(CacheError, match=f"sampled draws 16 to 1024 points, asked for points={points}"):
            make_codec("sampled", points=points)


def test_sampled_without_an_order_has_parameters_but_cannot_decode():
    codec = make_codec("sampled", points=16)
    assert codec.params == {"points": 16, "seed": 0}
    with pytest.raises(ValueError, match="needs the order of the vocabulary"):
        codec.decode({"ranks": np.zeros((1, 1, 1), "u1"), "counts": np.ones((1, 1, 1), "u1"), "entropy": None})
