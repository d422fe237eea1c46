"""The sampled codec: draws follow the definition and are unbiased, and packing keeps every point."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_teacher import (
    D,
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

from pipeline.codec.packing import pack_record, unpack_record
from pipeline.codec.registry import make_codec
from pipeline.codec.sampled import every_nth
from pipeline.signal import Unembedding

N = 64


def truth_of(hidden, head):
    """The true probabilities [T, J, V] in float64."""
    return head.logits(hidden).double().softmax(-1)


def rounding(hidden, head):
    """The error that a sum of float32 probabilities may have: a few last bits of the largest logit."""
    return 4 * 2.0**-24 * float(head.logits(hidden).abs().max())


def points_of(arrays):
    """All points of unpacked arrays, as ascending ranks [rows, N]."""
    rows = arrays["ranks"].shape[0] * arrays["ranks"].shape[1]
    ranks, counts = (arrays[name].reshape(rows, -1) for name in ("ranks", "counts"))
    return np.stack([np.repeat(row, times) for row, times in zip(ranks, counts, strict=True)])


@pytest.mark.parametrize("points", [16, 64, 1024])
@pytest.mark.parametrize("sharp", [0.3, 3.0])
def test_points_follow_the_definition(points, sharp):
    hidden, head = hidden_and_head(sharp=sharp)
    codec, u = sampled_codec(points=points), uniform_draws()
    mass = truth_of(hidden, head)[..., codec.order].cumsum(-1).numpy()
    at = (np.arange(points) + u.numpy()[..., None]) / points
    ranks = codec.encode(hidden, head, u)["ranks"].numpy()
    naive = np.stack(
        [np.searchsorted(m, a, side="right") for m, a in zip(mass.reshape(-1, V), at.reshape(-1, points), strict=True)]
    )
    above = np.take_along_axis(mass, ranks, -1)
    below = np.take_along_axis(np.concatenate((np.zeros((T, J, 1)), mass), -1), ranks, -1)
    tolerance = rounding(hidden, head)
    assert (below - tolerance <= at).all() and (at <= above + tolerance).all()
    near = np.abs(at[..., None] - mass[:, :, None]).min(-1) <= tolerance
    assert (ranks == naive.reshape(ranks.shape))[~near].all() and near.mean() < 0.01


def test_very_unlikely_ids_at_the_end_are_distinguished():
    """100,000 ids of probability 1e-8 follow the likely ones. Near 1, a float32 step is 6e-8: six of these ids."""
    logits = torch.full((100_010, 1), math.log(1e-8))
    logits[:10] = math.log((1 - 1e-3) / 10)
    codec = make_codec("sampled", points=1024, order=np.arange(100_010))
    last_points = 0.5 + 1e-8 * 1024 * torch.arange(60, dtype=torch.float64)  # 1e-8 of the mass apart
    drawn = codec.encode(torch.ones(60, 1, 1), Unembedding(logits, 100_010), last_points[:, None])["ranks"][:, 0, -1]
    assert (drawn.diff() >= 0).all() and len(drawn.unique()) > 50 and drawn.min() > 10


def test_every_id_gets_its_share_rounded_down_or_up():
    hidden, head = hidden_and_head(sharp=1.0)
    codec = sampled_codec(points=N)
    counts = N * dense(codec.decode(round_trip(codec, hidden, head)))
    expected = N * truth_of(hidden, head)
    slack = N * rounding(hidden, head)
    assert torch.equal(counts.sum(-1), torch.full((T, J), float(N), dtype=torch.float64))
    assert (counts >= (expected - slack).floor()).all() and (counts <= (expected + slack).ceil()).all()
    assert ((counts > 0) & (counts < expected)).any() and (counts > expected).any()


def test_the_mean_over_u_is_the_distribution():
    """With u on a grid of R values, all points form a grid of N R values: the error of an id is below one grid step."""
    hidden, head = hidden_and_head(sharp=1.0)
    codec, grid = sampled_codec(points=16), 100
    drawn = [codec.decode(round_trip(codec, hidden, head, torch.full((T, J), (k + 0.5) / grid))) for k in range(grid)]
    mean = sum(map(dense, drawn)) / grid
    assert (mean - truth_of(hidden, head)).abs().max() <= 1 / (16 * grid) + rounding(hidden, head)


def test_the_means_of_kl_and_gradient_converge_to_the_dense_ones():
    """The error of the mean of n draws equals the standard error, for n = 50 and n = 200, over 120 token-layers."""
    hidden, head = hidden_and_head(sharp=1.0, tokens=40)
    student = torch.randn(40, J, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1).double()
    truth, codec = truth_of(hidden, head), sampled_codec(points=16)
    exact = (truth * (truth.log() - student)).sum(-1)
    signals = [codec.decode(round_trip(codec, hidden, head, uniform_draws(40, seed=seed))) for seed in range(200)]
    # The gradient at the student's logits is q - p, and q - counts / N from samples. Their difference is free of q.
    for drawn, dense_value in (
        (torch.stack([kl(signal, student) for signal in signals]), exact),
        (torch.stack([student.exp() - dense(signal) for signal in signals]), student.exp() - truth),
    ):
        for count in (50, 200):
            error = (drawn[:count].mean(0) - dense_value).square().sum()
            expected = drawn.var(0).sum() / count
            assert 0.7 < (error / expected).sqrt() < 1.3
        assert drawn[0].sub(dense_value).norm() > 5 * drawn.mean(0).sub(dense_value).norm()


def test_systematic_points_have_a_lower_variance_than_independent_ones():
    hidden, head = hidden_and_head(sharp=1.0)
    truth, codec = truth_of(hidden, head), sampled_codec(points=N)
    drawn = torch.stack(
        [dense(codec.decode(round_trip(codec, hidden, head, uniform_draws(seed=seed)))) for seed in range(50)]
    )
    independent = (truth * (1 - truth)).sum() / N
    assert drawn.var(0).sum() < 0.5 * independent


@pytest.mark.parametrize("sharp", [0.0, 1.0, 5.0, 30.0])
@pytest.mark.parametrize(("vocab", "offset"), [(40, 0.0), (152_064, 0.0), (152_064, 100.0)])
def test_the_stored_entropy_is_exact_to_1e_4_nat(sharp, vocab, offset):
    """The error is half a step of a two-byte number, plus float32's last bits of the largest logit."""
    generator = torch.Generator().manual_seed(7)
    logits = sharp * torch.randn(vocab, 2, generator=generator) + offset
    head, codec = Unembedding(logits, vocab), sampled_codec(vocab, points=16)
    signal = codec.decode(round_trip(codec, torch.eye(2)[:, None], head))
    truth = torch.special.entr(logits.T.double().softmax(-1)).sum(-1)
    bound = math.log(vocab) / (2**16 - 1) / 2 + 2.0**-22 * float(logits.abs().max())
    assert (signal.neg_entropy[:, 0] + truth).abs().max() <= bound
    assert bound < 1e-4 or logits.abs().max() > 30


def test_flat_and_certain_distributions_have_the_extreme_entropies():
    head = Unembedding(torch.eye(V), V)
    certain = torch.zeros(V).index_fill(0, torch.tensor([3]), 300.0)
    codec = sampled_codec(points=16)
    signal = codec.decode(round_trip(codec, torch.stack((torch.zeros(V), certain))[:, None], head))
    torch.testing.assert_close(signal.neg_entropy[:, 0], torch.tensor([-math.log(V), 0.0]))
    assert dense(signal)[1, 0, 3] == 1


def test_ids_of_probability_zero_are_never_drawn():
    """Even where the last point is rounded up to the total mass, and only such ids are at both ends of the order."""
    order = random_order(V)
    logits = torch.randn(T * J, V, generator=torch.Generator().manual_seed(0))
    logits[:, order[:9]] = logits[:, order[-9:]] = logits[:, order[20:23]] = -200.0  # underflows in float32
    head = Unembedding(torch.eye(V), V)
    truth = head.logits(logits).softmax(-1).view(T, J, V)
    for u in (0.0, 0.5, 1 - 2.0**-53):
        signal = sampled_codec(points=N).decode(
            round_trip(sampled_codec(points=N), logits.view(T, J, V), head, torch.full((T, J), u))
        )
        assert (truth == 0).sum() == 21 * T * J and dense(signal)[truth == 0].sum() == 0


def test_probabilities_are_counts_and_there_is_no_tail():
    hidden, head = hidden_and_head()
    signal = sampled_codec().decode(round_trip(sampled_codec(), hidden, head))
    assert signal.ids.dtype == torch.int64 and (signal.ids < V).all()
    assert torch.equal((signal.probs * N).round(), signal.probs * N) and (signal.tail == 0).all()


VOCABULARIES = st.sampled_from([20, 255, 256, 257, 49_152, 65_536, 65_537, 152_064, 300_000])
KINDS = st.sampled_from(["anywhere", "near the front", "few ids", "one id", "first", "last"])


def some_ranks(kind, rng, rows, points, vocab):
    if kind == "anywhere":
        ranks = rng.integers(0, vocab, (rows, points))
    elif kind == "near the front":
        ranks = np.minimum(rng.geometric(0.2, (rows, points)) - 1, vocab - 1)
    elif kind == "few ids":
        ranks = rng.integers(0, vocab, 4)[np.minimum(rng.geometric(0.7, (rows, points)) - 1, 3)]
    else:
        one = {"one id": rng.integers(0, vocab, (rows, 1)), "first": 0, "last": vocab - 1}[kind]
        ranks = np.broadcast_to(one, (rows, points))
    return np.sort(ranks, axis=1)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    points=st.sampled_from([16, 64, 256, 1024]),
    vocab=VOCABULARIES,
    kinds=st.lists(KINDS, min_size=1, max_size=4),
    tokens=st.integers(1, 4),
    layers=st.sampled_from([1, 2, 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_loses_no_point(points, vocab, kinds, tokens, layers, seed):
    rng = np.random.default_rng(seed)
    rows = tokens * layers
    codec = make_codec("sampled", points=points, order=np.arange(vocab, dtype="<i4"))
    drawn = np.concatenate([some_ranks(kinds[row % len(kinds)], rng, 1, points, vocab) for row in range(rows)])
    entropy = rng.uniform(0, math.log(vocab), (tokens, layers)).astype(np.float32)
    streams = codec.pack({"ranks": drawn.reshape(tokens, layers, points).astype(np.int32), "entropy": entropy})
    labels, unpacked = unpack_record(
        pack_record(np.arange(tokens) + vocab, streams, "these"), codec.token_bytes(layers), "these"
    )
    arrays = codec.unpack(unpacked, tokens, layers)
    assert labels.tolist() == list(range(vocab, vocab + tokens))
    assert np.array_equal(points_of(arrays), drawn)
    used = arrays["counts"] > 0
    assert (np.diff(arrays["ranks"].astype(np.int64), axis=2) > 0)[used[..., 1:]].all(), "each id occurs once"
    assert (arrays["ranks"][~used] == 0).all() and used.any((0, 1)).all(), "padded with 0, and no wider than needed"
    assert np.abs(codec.decode(arrays).neg_entropy.numpy() + entropy).max() <= 1e-4


def test_streams_that_do_not_fit_are_errors():
    hidden, head = hidden_and_head()
    hidden[0] *= 100  # one token is certain: its count is in the stream of large counts
    codec = sampled_codec(points=256)
    streams = pack_streams(codec, hidden, head)
    assert all(len(stream) > 2 for stream in streams.values())
    for name, stream in streams.items():
        for cut in (stream[:-1], stream[:-2], stream[:2], b""):
            with pytest.raises(ValueError):
                codec.unpack({**streams, name: cut}, T, J)
        with pytest.raises(KeyError, match=name):
            codec.unpack({other: streams[other] for other in streams if other != name}, T, J)
    for tokens, layers in ((T - 1, J), (T, J + 1), (0, J)):
        with pytest.raises(ValueError, match=f"256 points for {tokens} tokens and {layers} layers"):
            codec.unpack(streams, tokens, layers)
    with pytest.raises(ValueError, match="does not hold 64 points"):
        sampled_codec(points=64).unpack(streams, T, J)


def test_a_truncated_stream_of_large_counts_is_an_error_even_if_the_sum_is_right():
    """The counts are 16 + 17 + 15 + 16 = 64. Broadcasting the first one would give 4 x 16 = 64 too."""
    codec = make_codec("sampled", order=np.arange(9))
    ranks = np.repeat([1, 2, 5, 8], [16, 17, 15, 16]).reshape(1, 1, 64)
    streams = codec.pack({"ranks": ranks, "entropy": np.ones((1, 1), np.float32)})
    with pytest.raises(ValueError, match="reshape"):
        codec.unpack({**streams, "counts": streams["counts"][:2]}, 1, 1)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64])
def test_the_n_subsets_of_every_nth_point_together_are_all_points(n):
    hidden, head = hidden_and_head(sharp=1.0)
    arrays = round_trip(sampled_codec(points=N), hidden, head)
    all_points = points_of(arrays)
    shift = np.random.default_rng(0).integers(0, n, (T, J))
    parts = [every_nth(arrays, n, (shift + turn) % n) for turn in range(n)]
    for turn, part in enumerate(parts):
        naive = np.stack([row[first::n] for row, first in zip(all_points, (shift + turn).ravel() % n, strict=True)])
        assert np.array_equal(points_of(part), naive)
        assert part["counts"].dtype == arrays["counts"].dtype and part["ranks"].dtype == arrays["ranks"].dtype
        assert part["counts"].max(axis=(0, 1)).all(), "no wider than needed"
        assert part["entropy"] is arrays["entropy"]
    assert np.array_equal(np.sort(np.concatenate([points_of(part) for part in parts], 1), 1), all_points)


def test_every_nth_point_is_again_a_systematic_sample():
    """Point first + n k at u equals point k at (first + u) / n. Its mean over `first` and u is the distribution."""
    hidden, head = hidden_and_head(sharp=1.0)
    whole, few, n, grid = sampled_codec(points=64), sampled_codec(points=16), 4, 25
    total = torch.zeros(T, J, V, dtype=torch.float64)
    for k in range(grid):
        u = torch.full((T, J), (k + 0.5) / grid, dtype=torch.float64)
        arrays = round_trip(whole, hidden, head, u)
        for first in range(n):
            part = every_nth(arrays, n, np.full((T, J), first))
            assert np.array_equal(points_of(part), points_of(round_trip(few, hidden, head, (first + u) / n)))
            total += dense(few.decode(part))
    mean = total / (n * grid)
    assert (mean - truth_of(hidden, head)).abs().max() <= 1 / (64 * grid) + rounding(hidden, head)


def test_a_token_layer_takes_tens_of_bytes():
    """A peaked distribution over many ids takes less than two bytes for each distinct id, all streams included."""
    generator = torch.Generator().manual_seed(0)
    head = Unembedding(torch.randn(20_000, D, generator=generator), 20_000)
    hidden = torch.randn(64, 4, D, generator=generator)
    use = head.logits(hidden).softmax(-1).sum((0, 1))
    codec = make_codec("sampled", order=use.argsort(descending=True).numpy().astype("<i4"))
    record = pack_record(np.arange(64), pack_streams(codec, hidden, head))
    arrays = round_trip(codec, hidden, head)
    distinct = (arrays["counts"] > 0).sum() / (64 * 4)
    assert len(record) / (64 * 4) < 2 * distinct < 2 * N
