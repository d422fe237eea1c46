"""A random teacher: hidden states [T, J, D] of T tokens and J layers, a head over V ids, and codecs applied to them."""

import numpy as np
import torch

from pipeline.codec.packing import pack_record, to_numpy, unpack_record
from pipeline.codec.random import uniform
from pipeline.codec.registry import make_codec
from pipeline.signal import Unembedding

T, J, D, V = 5, 3, 16, 40


def hidden_and_head(vocab=V, sharp=3.0, dtype=torch.float32, tokens=T):
    """Hidden states [T, J, D] and a head with padding rows, a bias, a scale and a soft-cap."""
    generator = torch.Generator().manual_seed(7)
    hidden = sharp * torch.randn(tokens, J, D, generator=generator)
    weight = torch.randn(vocab + 3, D, generator=generator) / 4
    bias = torch.randn(vocab + 3, generator=generator)
    head = Unembedding(weight.to(dtype), vocab, bias.to(dtype), scale=1.5, softcap=20.0)
    return hidden.to(dtype), head


def random_order(vocab):
    """A fixed permutation of the vocabulary [V] int32."""
    return np.random.default_rng(vocab).permutation(vocab).astype("<i4")


def uniform_draws(tokens=T, layers=range(J), seed=0):
    """Uniform random numbers u [T, J], one for each token and layer."""
    return torch.from_numpy(uniform(seed, "draw", "k", layers, tokens))


def pack_streams(codec, hidden, head, u=None, **options):
    """Encode and pack hidden states [T, J, D]: one record's streams."""
    u = uniform_draws(hidden.shape[0], range(hidden.shape[1])) if u is None else u
    return codec.pack({name: to_numpy(array) for name, array in codec.encode(hidden, head, u, **options).items()})


def round_trip(codec, hidden, head, u=None, **options):
    """Encode hidden states to a record's bytes and back: the codec's unpacked arrays."""
    tokens, layers = hidden.shape[:2]
    record = pack_record(np.arange(tokens), pack_streams(codec, hidden, head, u, **options))
    return codec.unpack(unpack_record(record, codec.token_bytes(layers))[1], tokens, layers)


def sampled_codec(vocab=V, points=64):
    """The sampled codec with a random vocabulary order."""
    return make_codec("sampled", points=points, seed=0, order=random_order(vocab))


def kl(signal, log_q):
    """KL [T, J] in float64, for log_q [T, J, V]: sum p log p - sum p log q - tail log(1 - sum q)."""
    log_q = log_q.double()
    kept = log_q.gather(-1, signal.ids)
    rest = log_q.scatter(-1, signal.ids, -torch.inf).logsumexp(-1)
    tail = signal.tail.double()
    cross = (signal.probs.double() * kept).sum(-1) + torch.where(tail > 0, tail * rest, 0.0)
    return signal.neg_entropy.double() - cross


def dense(signal, vocab=V):
    """The signal's probabilities at their ids: [T, J, V] float64."""
    empty = torch.zeros(*signal.ids.shape[:2], vocab, dtype=torch.float64)
    return empty.scatter_add(-1, signal.ids, signal.probs.double())
