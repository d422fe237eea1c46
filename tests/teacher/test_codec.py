"""Codecs: what comes back from bytes is what the teacher said, and honest about what it leaves out."""

import numpy as np
import pytest
import torch

from pipeline.errors import CacheError
from pipeline.teacher.codec import from_bytes, make_codec, to_bytes
from pipeline.teacher.signal import Unembedding

T, J, D, V = 5, 3, 16, 40


def speech(vocab=V, sharp=3.0, dtype=torch.float32):
    """Hidden states and a head with padding rows, a bias, a scale and a soft-cap."""
    generator = torch.Generator().manual_seed(7)
    hidden = sharp * torch.randn(T, J, D, generator=generator)
    weight = torch.randn(vocab + 3, D, generator=generator) / 4
    bias = torch.randn(vocab + 3, generator=generator)
    head = Unembedding(weight.to(dtype), vocab, bias.to(dtype), scale=1.5, softcap=20.0)
    return hidden.to(dtype), head


def stored(codec, hidden, head, **options):
    """Through bytes and back, with one record's [T, J]."""
    return from_bytes(to_bytes(codec.encode(hidden, head, **options)), *hidden.shape[:2])


def kl(signal, log_q):
    """sum p log p - sum p log q - tail log(1 - sum q), float64, for log_q [T, J, V]."""
    log_q = log_q.double()
    kept = log_q.gather(-1, signal.ids)
    rest = log_q.scatter(-1, signal.ids, -torch.inf).logsumexp(-1)
    tail = signal.tail.double()
    cross = (signal.probs.double() * kept).sum(-1) + torch.where(tail > 0, tail * rest, 0.0)
    return signal.neg_entropy.double() - cross


@pytest.mark.parametrize("k", [1, 4, 39, 40, 64])
def test_topk_tells_the_truth_within_float16(k):
    hidden, head = speech()
    truth = head.logits(hidden).double().softmax(-1)
    codec = make_codec("topk", k=k)
    signal = codec.decode(stored(codec, hidden, head), range(J))
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
    signal = codec.decode(stored(codec, hidden, head), range(J))
    assert (signal.probs <= 1).all() and (signal.probs >= 0).all() and (signal.tail >= 0).all()
    assert (signal.probs.double().sum(-1) + signal.tail - 1).abs().max() < 1e-6
    # p as a dense distribution: the tail spread over the ids that were not kept.
    left = max(1, V - k)
    dense = (signal.tail.double() / left)[..., None].expand(T, J, V).scatter(-1, signal.ids, signal.probs.double())
    assert kl(signal, dense.log()).abs().max() < 1e-6
    # and of the true distribution only what float16 moved it by: second order in 2^-11 |log p|.
    assert kl(signal, head.logits(hidden).log_softmax(-1)).abs().max() < 1e-5


def test_topk_never_exceeds_the_dense_kl_and_never_renormalises():
    hidden, head = speech(sharp=1.0)
    student = torch.randn(T, J, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    log_p = head.logits(hidden).double().log_softmax(-1)
    dense = (log_p.exp() * (log_p - student.double())).sum(-1)
    codec = make_codec("topk", k=4)
    signal = codec.decode(stored(codec, hidden, head), range(J))
    assert (kl(signal, student) <= dense + 1e-3).all()
    assert (signal.tail > 0.01).any(), "the tail is there, so the kept ids do not sum to 1"


def test_a_sharp_distribution_has_a_true_tail_not_rounding_noise():
    head = Unembedding(torch.eye(4), 4)
    codec = make_codec("topk", k=1)
    signal = codec.decode(stored(codec, torch.tensor([[[40.0, 0, 0, 0]]]), head), [0])
    torch.testing.assert_close(signal.tail[0, 0].double(), 3 * torch.tensor(-40.0).double().exp(), rtol=1e-5, atol=0)


def test_chunks_change_nothing():
    hidden, head = speech()
    codec = make_codec("topk", k=6)
    whole, pieces = codec.encode(hidden, head), codec.encode(hidden, head, chunk=2)
    assert torch.equal(whole["ids"], pieces["ids"])
    # A matrix product of other height rounds otherwise: float32's last bits, at most one step of float16.
    torch.testing.assert_close(whole["logprobs"], pieces["logprobs"], rtol=2**-10, atol=0)
    torch.testing.assert_close(whole["tail"], pieces["tail"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_comes_back_bit_for_bit(dtype):
    hidden, head = speech(dtype=getattr(torch, dtype))
    codec = make_codec("hidden", dtype=dtype)
    signal = codec.decode(stored(codec, hidden, head), [2, 0], head)
    assert torch.equal(signal.hidden, hidden[:, [2, 0]])
    assert torch.equal(signal.unembedding.logits(signal.hidden), head.logits(hidden[:, [2, 0]]))


def test_layers_come_in_the_order_asked():
    hidden, head = speech()
    codec = make_codec("topk", k=5)
    arrays = stored(codec, hidden, head)
    everything, some = codec.decode(arrays, range(J)), codec.decode(arrays, [2, 0])
    assert torch.equal(some.probs, everything.probs[:, [2, 0]]) and torch.equal(some.tail, everything.tail[:, [2, 0]])


@pytest.mark.parametrize(("vocab", "dtype", "size"), [(2**16, "uint16", 2), (2**16 + 8, "int32", 4)])
def test_ids_take_two_bytes_where_they_fit(vocab, dtype, size):
    head = Unembedding(torch.linspace(0, 1, vocab)[:, None], vocab)
    codec = make_codec("topk", k=3)
    members = to_bytes(codec.encode(torch.ones(2, 1, 1), head))
    assert len(members[f"ids.{dtype}"]) == 2 * 3 * size
    assert codec.decode(from_bytes(members, 2, 1), [0]).ids[0, 0].tolist() == [vocab - 1, vocab - 2, vocab - 3]


def test_broken_members_are_named():
    with pytest.raises(ValueError, match=r"'tail.float32' has 13 bytes, no multiple of 5 tokens x 3 layers"):
        from_bytes({"tail.float32": bytes(13)}, T, J)
    with pytest.raises(ValueError, match=r"'ids.pickle': expected NAME.DTYPE"):
        from_bytes({"ids.pickle": b""}, T, J)
    assert from_bytes({"x.int32": np.arange(2, dtype="<i4").tobytes()}, 1, 1)["x"].tolist() == [[[0, 1]]]


def test_unknown_codecs_and_parameters_are_refused():
    with pytest.raises(CacheError, match=r"codec 'sampled' is not known here; expected one of topk, hidden"):
        make_codec("sampled", n=64)
    with pytest.raises(CacheError, match=r"codec 'topk' does not take .*'k': 0.*at least one id"):
        make_codec("topk", k=0)
    with pytest.raises(CacheError, match=r"codec 'hidden' does not take .*'k': 3"):
        make_codec("hidden", k=3)
    with pytest.raises(CacheError, match="bfloat16 or float32, asked for int8"):
        make_codec("hidden", dtype="int8")
