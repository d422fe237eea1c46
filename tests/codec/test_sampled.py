"""The sampled codec: the draw is the definition's, unbiased at the rate of its error, and kept to the last point."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_teacher import D, J, T, V, dense, draw, kl, order_of, packed, sampled, speech, stored

from pipeline.codec.packing import pack_record, unpack_record
from pipeline.codec.registry import make_codec
from pipeline.codec.sampled import every_nth
from pipeline.signal import Unembedding

N = 64


def truth_of(hidden, head):
    """[T, J, V] float64."""
    return head.logits(hidden).double().softmax(-1)


def rounding(hidden, head):
    """How far a sum of probabilities may be off in float32: of each, by a few last bits of its logit."""
    return 4 * 2.0**-24 * float(head.logits(hidden).abs().max())


def points_of(arrays):
    """Unpacked or thinned arrays to all points, as ascending ranks [rows, N]."""
    rows = arrays["ranks"].shape[0] * arrays["ranks"].shape[1]
    ranks, counts = (arrays[name].reshape(rows, -1) for name in ("ranks", "counts"))
    return np.stack([np.repeat(one, number) for one, number in zip(ranks, counts, strict=True)])


@pytest.mark.parametrize("points", [16, 64, 1024])
@pytest.mark.parametrize("sharp", [0.3, 3.0])
def test_the_draw_is_that_of_the_definition(points, sharp):
    hidden, head = speech(sharp=sharp)
    codec, u = sampled(points=points), draw()
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


def test_the_unlikeliest_ids_at_the_end_are_told_apart():
    """100,000 of probability 1e-8 behind the likely ones: near 1, float32 has steps of 6e-8, six of them in one."""
    logits = torch.full((100_010, 1), math.log(1e-8))
    logits[:10] = math.log((1 - 1e-3) / 10)
    codec = make_codec("sampled", points=1024, order=np.arange(100_010))
    last_points = 0.5 + 1e-8 * 1024 * torch.arange(60, dtype=torch.float64)  # 1e-8 of the mass apart
    drawn = codec.encode(torch.ones(60, 1, 1), Unembedding(logits, 100_010), last_points[:, None])["ranks"][:, 0, -1]
    assert (drawn.diff() >= 0).all() and len(drawn.unique()) > 50 and drawn.min() > 10


def test_every_id_gets_its_share_rounded_down_or_up():
    hidden, head = speech(sharp=1.0)
    codec = sampled(points=N)
    counts = N * dense(codec.decode(stored(codec, hidden, head)))
    expected = N * truth_of(hidden, head)
    slack = N * rounding(hidden, head)
    assert torch.equal(counts.sum(-1), torch.full((T, J), float(N), dtype=torch.float64))
    assert (counts >= (expected - slack).floor()).all() and (counts <= (expected + slack).ceil()).all()
    assert ((counts > 0) & (counts < expected)).any() and (counts > expected).any()


def test_its_mean_over_u_is_the_distribution():
    """With u on a grid of R, all points are a grid of N R: no id is off by a whole one of its points."""
    hidden, head = speech(sharp=1.0)
    codec, grid = sampled(points=16), 100
    drawn = [codec.decode(stored(codec, hidden, head, torch.full((T, J), (k + 0.5) / grid))) for k in range(grid)]
    mean = sum(map(dense, drawn)) / grid
    assert (mean - truth_of(hidden, head)).abs().max() <= 1 / (16 * grid) + rounding(hidden, head)


def test_kl_and_gradient_converge_to_the_dense_ones_at_the_rate_of_their_error():
    """Errors of the mean of n draws against the standard error: alike for n = 50 and n = 200, over 120 token-layers."""
    hidden, head = speech(sharp=1.0, tokens=40)
    student = torch.randn(40, J, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1).double()
    truth, codec = truth_of(hidden, head), sampled(points=16)
    exact = (truth * (truth.log() - student)).sum(-1)
    signals = [codec.decode(stored(codec, hidden, head, draw(40, seed=seed))) for seed in range(200)]
    # The gradient at the student's logits is q - p, from samples q - counts / N: their difference does not know q.
    for drawn, dense_value in (
        (torch.stack([kl(signal, student) for signal in signals]), exact),
        (torch.stack([student.exp() - dense(signal) for signal in signals]), student.exp() - truth),
    ):
        for count in (50, 200):
            error = (drawn[:count].mean(0) - dense_value).square().sum()
            expected = drawn.var(0).sum() / count
            assert 0.7 < (error / expected).sqrt() < 1.3
        assert drawn[0].sub(dense_value).norm() > 5 * drawn.mean(0).sub(dense_value).norm()


def test_systematic_points_are_nearer_than_independent_ones():
    hidden, head = speech(sharp=1.0)
    truth, codec = truth_of(hidden, head), sampled(points=N)
    drawn = torch.stack([dense(codec.decode(stored(codec, hidden, head, draw(seed=seed)))) for seed in range(50)])
    independent = (truth * (1 - truth)).sum() / N
    assert drawn.var(0).sum() < 0.5 * independent


@pytest.mark.parametrize("sharp", [0.0, 1.0, 5.0, 30.0])
@pytest.mark.parametrize(("vocab", "offset"), [(40, 0.0), (152_064, 0.0), (152_064, 100.0)])
def test_the_entropy_is_exact_to_a_ten_thousandth_nat(sharp, vocab, offset):
    """Half a step of two bytes, and float32's last bits of the largest logit."""
    generator = torch.Generator().manual_seed(7)
    logits = sharp * torch.randn(vocab, 2, generator=generator) + offset
    head, codec = Unembedding(logits, vocab), sampled(vocab, points=16)
    signal = codec.decode(stored(codec, torch.eye(2)[:, None], head))
    truth = torch.special.entr(logits.T.double().softmax(-1)).sum(-1)
    bound = math.log(vocab) / (2**16 - 1) / 2 + 2.0**-22 * float(logits.abs().max())
    assert (signal.neg_entropy[:, 0] + truth).abs().max() <= bound
    assert bound < 1e-4 or logits.abs().max() > 30


def test_flat_and_certain_distributions_have_the_entropies_at_the_ends():
    head = Unembedding(torch.eye(V), V)
    certain = torch.zeros(V).index_fill(0, torch.tensor([3]), 300.0)
    codec = sampled(points=16)
    signal = codec.decode(stored(codec, torch.stack((torch.zeros(V), certain))[:, None], head))
    torch.testing.assert_close(signal.neg_entropy[:, 0], torch.tensor([-math.log(V), 0.0]))
    assert dense(signal)[1, 0, 3] == 1


def test_what_has_no_probability_is_never_drawn():
    """Also where the last point is rounded up to the end of the mass, and nothing likely stands at either end."""
    order = order_of(V)
    logits = torch.randn(T * J, V, generator=torch.Generator().manual_seed(0))
    logits[:, order[:9]] = logits[:, order[-9:]] = logits[:, order[20:23]] = -200.0  # underflows in float32
    head = Unembedding(torch.eye(V), V)
    truth = head.logits(logits).softmax(-1).view(T, J, V)
    for u in (0.0, 0.5, 1 - 2.0**-53):
        signal = sampled(points=N).decode(stored(sampled(points=N), logits.view(T, J, V), head, torch.full((T, J), u)))
        assert (truth == 0).sum() == 21 * T * J and dense(signal)[truth == 0].sum() == 0


def test_weights_are_counts_and_there_is_no_tail():
    hidden, head = speech()
    signal = sampled().decode(stored(sampled(), hidden, head))
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
    labels, kept = unpack_record(pack_record(np.arange(tokens) + vocab, streams, "these"), "these")
    arrays = codec.unpack(kept, tokens, layers)
    assert labels.tolist() == list(range(vocab, vocab + tokens))
    assert np.array_equal(points_of(arrays), drawn)
    there = arrays["counts"] > 0
    assert (np.diff(arrays["ranks"].astype(np.int64), axis=2) > 0)[there[..., 1:]].all(), "each id stands there once"
    assert (arrays["ranks"][~there] == 0).all() and there.any((0, 1)).all(), "padded with 0, and no wider than needed"
    assert np.abs(codec.decode(arrays).neg_entropy.numpy() + entropy).max() <= 1e-4


def test_streams_that_do_not_fit_are_errors():
    hidden, head = speech()
    hidden[0] *= 100  # one token is certain: its counts stand in the stream of large ones
    codec = sampled(points=256)
    streams = packed(codec, hidden, head)
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
        sampled(points=64).unpack(streams, T, J)


def test_a_cut_stream_of_large_counts_is_an_error_even_where_the_sum_is_right():
    """16 + 17 + 15 + 16 points: the first one for all would be 64 too."""
    codec = make_codec("sampled", order=np.arange(9))
    ranks = np.repeat([1, 2, 5, 8], [16, 17, 15, 16]).reshape(1, 1, 64)
    streams = codec.pack({"ranks": ranks, "entropy": np.ones((1, 1), np.float32)})
    with pytest.raises(ValueError, match="reshape"):
        codec.unpack({**streams, "counts": streams["counts"][:2]}, 1, 1)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64])
def test_every_nth_point_in_turn_is_all_of_them(n):
    hidden, head = speech(sharp=1.0)
    arrays = stored(sampled(points=N), hidden, head)
    whole = points_of(arrays)
    shift = np.random.default_rng(0).integers(0, n, (T, J))
    parts = [every_nth(arrays, n, (shift + turn) % n) for turn in range(n)]
    for turn, part in enumerate(parts):
        brute = np.stack([row[first::n] for row, first in zip(whole, (shift + turn).ravel() % n, strict=True)])
        assert np.array_equal(points_of(part), brute)
        assert part["counts"].dtype == arrays["counts"].dtype and part["ranks"].dtype == arrays["ranks"].dtype
        assert part["counts"].max(axis=(0, 1)).all(), "no wider than needed"
        assert part["entropy"] is arrays["entropy"]
    assert np.array_equal(np.sort(np.concatenate([points_of(part) for part in parts], 1), 1), whole)


def test_every_nth_point_is_a_systematic_sample_of_its_own():
    """first + n k at u is k at (first + u) / n; over all of first, and u on a grid, its mean is the distribution."""
    hidden, head = speech(sharp=1.0)
    whole, few, n, grid = sampled(points=64), sampled(points=16), 4, 25
    total = torch.zeros(T, J, V, dtype=torch.float64)
    for k in range(grid):
        u = torch.full((T, J), (k + 0.5) / grid, dtype=torch.float64)
        arrays = stored(whole, hidden, head, u)
        for first in range(n):
            part = every_nth(arrays, n, np.full((T, J), first))
            assert np.array_equal(points_of(part), points_of(stored(few, hidden, head, (first + u) / n)))
            total += dense(few.decode(part))
    mean = total / (n * grid)
    assert (mean - truth_of(hidden, head)).abs().max() <= 1 / (64 * grid) + rounding(hidden, head)


def test_its_price_is_tens_of_bytes():
    """A peaked distribution over many ids: under a byte a distinct id and what the entropy and the counts take."""
    generator = torch.Generator().manual_seed(0)
    head = Unembedding(torch.randn(20_000, D, generator=generator), 20_000)
    hidden = torch.randn(64, 4, D, generator=generator)
    use = head.logits(hidden).softmax(-1).sum((0, 1))
    codec = make_codec("sampled", order=use.argsort(descending=True).numpy().astype("<i4"))
    record = pack_record(np.arange(64), packed(codec, hidden, head))
    arrays = stored(codec, hidden, head)
    distinct = (arrays["counts"] > 0).sum() / (64 * 4)
    assert len(record) / (64 * 4) < 2 * distinct < 2 * N
