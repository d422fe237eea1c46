"""Codecs: what comes back from bytes is what the teacher said, and honest about what it leaves out."""

import numpy as np
import pytest
import torch
from random_teacher import J, T, V, dense, draw, kl, order_of, packed, sampled, speech, stored

from pipeline.codec.registry import CODECS, make_codec
from pipeline.errors import CacheError
from pipeline.signal import Unembedding


@pytest.mark.parametrize("k", [1, 4, 39, 40, 64])
def test_topk_tells_the_truth_within_float16(k):
    hidden, head = speech()
    truth = head.logits(hidden).double().softmax(-1)
    codec = make_codec("topk", k=k)
    signal = codec.decode(stored(codec, hidden, head))
    kept = truth.gather(-1, signal.ids)
    assert torch.equal(signal.ids, truth.topk(min(k, V)).indices)
    # Each log-probability is off by float16's half step, and all by one more such share, for the mass to be right.
    step = 2.0**-11 * kept.log().abs().clamp(min=2**-4).amax(-1, keepdim=True)
    assert ((signal.probs - kept).abs() <= 2 * step * kept + 1e-7).all()
    assert (signal.tail - (1 - kept.sum(-1))).abs().max() < 1e-6


@pytest.mark.parametrize("k", [1, 8, 40])
@pytest.mark.parametrize("sharp", [0.0, 1.0, 30.0])
def test_topk_is_a_distribution_with_kl_zero_on_itself(k, sharp):
    hidden, head = speech(sharp=sharp)
    codec = make_codec("topk", k=k)
    signal = codec.decode(stored(codec, hidden, head))
    assert (signal.probs <= 1).all() and (signal.probs >= 0).all() and (signal.tail >= 0).all()
    assert (signal.probs.double().sum(-1) + signal.tail - 1).abs().max() < 1e-6
    # p as a dense distribution: the tail spread over the ids that were not kept.
    left = max(1, V - k)
    spread = (signal.tail.double() / left)[..., None].expand(T, J, V).scatter(-1, signal.ids, signal.probs.double())
    assert kl(signal, spread.log()).abs().max() < 1e-6
    # and of the true distribution only what float16 moved it by: second order in 2^-11 |log p|.
    assert kl(signal, head.logits(hidden).log_softmax(-1)).abs().max() < 1e-5


def test_topk_never_exceeds_the_dense_kl_and_never_renormalises():
    hidden, head = speech(sharp=1.0)
    student = torch.randn(T, J, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    log_p = head.logits(hidden).double().log_softmax(-1)
    exact = (log_p.exp() * (log_p - student.double())).sum(-1)
    codec = make_codec("topk", k=4)
    signal = codec.decode(stored(codec, hidden, head))
    assert (kl(signal, student) <= exact + 1e-3).all()
    assert (signal.tail > 0.01).any(), "the tail is there, so the kept ids do not sum to 1"


def test_a_sharp_distribution_has_a_true_tail_not_rounding_noise():
    head = Unembedding(torch.eye(4), 4)
    codec = make_codec("topk", k=1)
    signal = codec.decode(stored(codec, torch.tensor([[[40.0, 0, 0, 0]]]), head))
    torch.testing.assert_close(signal.tail[0, 0].double(), 3 * torch.tensor(-40.0).double().exp(), rtol=1e-5, atol=0)


def test_chunks_change_nothing():
    hidden, head = speech()
    codec = make_codec("topk", k=6)
    whole, pieces = codec.encode(hidden, head, draw()), codec.encode(hidden, head, draw(), chunk=2)
    assert torch.equal(whole["ids"], pieces["ids"])
    # A matrix product of other height rounds otherwise: float32's last bits, at most one step of float16.
    torch.testing.assert_close(whole["logprobs"], pieces["logprobs"], rtol=2**-10, atol=0)
    torch.testing.assert_close(whole["tail"], pieces["tail"], rtol=1e-5, atol=0)
    whole, pieces = (sampled().encode(hidden, head, draw(), chunk=chunk) for chunk in (1024, 2))
    assert torch.equal(whole["ranks"], pieces["ranks"])
    torch.testing.assert_close(whole["entropy"], pieces["entropy"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_comes_back_bit_for_bit(dtype):
    hidden, head = speech(dtype=getattr(torch, dtype))
    codec = make_codec("hidden", dtype=dtype)
    signal = codec.decode(stored(codec, hidden, head), head)
    assert torch.equal(signal.hidden, hidden)
    assert torch.equal(signal.unembedding.logits(signal.hidden), head.logits(hidden))


def test_hidden_does_not_decode_without_the_head():
    hidden, head = speech()
    codec = make_codec("hidden")
    with pytest.raises(ValueError, match="decodes through the teacher's head: pass its unembedding"):
        codec.decode(stored(codec, hidden, head))
    with pytest.raises(ValueError, match="pass its unembedding"):
        codec.empty(J)


@pytest.mark.parametrize("name", CODECS)
def test_a_layer_says_the_same_whichever_others_come_along(name):
    hidden, head = speech()
    codec = make_codec(name, order=order_of(V))
    arrays = stored(codec, hidden, head)
    everything, some = (codec.decode({n: a[:, c] for n, a in arrays.items()}, head) for c in ([0, 1, 2], [2, 0]))
    if name == "hidden":
        assert torch.equal(some.hidden, everything.hidden[:, [2, 0]])
    else:
        assert torch.equal(dense(some), dense(everything)[:, [2, 0]])
        assert torch.equal(some.tail, everything.tail[:, [2, 0]])
        assert torch.equal(some.neg_entropy, everything.neg_entropy[:, [2, 0]])


@pytest.mark.parametrize("name", CODECS)
def test_nothing_has_the_type_of_something(name):
    hidden, head = speech()
    codec = make_codec(name, order=order_of(V))
    nothing, something = codec.empty(J, head), codec.decode(stored(codec, hidden, head), head)
    for field in ("hidden",) if name == "hidden" else ("ids", "probs", "tail", "neg_entropy"):
        none, some = getattr(nothing, field), getattr(something, field)
        assert none.dtype == some.dtype and none.shape[:2] == (0, J) and none.ndim == some.ndim


@pytest.mark.parametrize(
    ("vocab", "dtype", "size"), [(2**8, "uint8", 1), (2**16, "uint16", 2), (2**16 + 8, "int32", 4)]
)
def test_ids_take_no_more_bytes_than_they_need(vocab, dtype, size):
    head = Unembedding(torch.linspace(0, 1, vocab)[:, None], vocab)
    codec = make_codec("topk", k=3)
    streams = packed(codec, torch.ones(2, 1, 1), head)
    assert len(streams[f"ids.{dtype}"]) == 2 * 3 * size
    signal = codec.decode(codec.unpack(streams, 2, 1))
    assert signal.ids[0, 0].tolist() == [vocab - 1, vocab - 2, vocab - 3]


@pytest.mark.parametrize("name", ["topk", "hidden"])
def test_streams_that_do_not_fit_are_errors(name):
    hidden, head = speech()
    codec = make_codec(name)
    streams = packed(codec, hidden, head)
    for stream in streams:
        with pytest.raises(ValueError):
            codec.unpack({**streams, stream: streams[stream][:-1]}, T, J)
        with pytest.raises(ValueError, match="numbers of type pickle; expected one of uint8"):
            codec.unpack({**streams, f"{stream.partition('.')[0]}.pickle": b""}, T, J)


def test_unknown_codecs_and_parameters_are_refused():
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


def test_sampled_without_the_order_has_only_a_name():
    codec = make_codec("sampled", points=16)
    assert codec.params == {"points": 16, "seed": 0}
    with pytest.raises(ValueError, match="needs the order of the vocabulary"):
        codec.decode({"ranks": np.zeros((1, 1, 1), "u1"), "counts": np.ones((1, 1, 1), "u1"), "entropy": None})
