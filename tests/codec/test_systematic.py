"""Points drawn block by block equal those of the full cumulative sum, and the entropy equals the distribution's."""

import math

import pytest
import torch

from pipeline.codec import systematic
from pipeline.codec.systematic import BLOCK, draw_points
from pipeline.signal import Unembedding

ROWS, N = 23, 64


def draw_from_logits(logits, order, u, head=None):
    return draw_points(logits, head or Unembedding(torch.empty(0, 1), logits.shape[1]), order, u, N)


@pytest.mark.parametrize("vocab", [1, 5, BLOCK, BLOCK + 1, 5 * BLOCK, 1000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 60.0])
def test_points_follow_the_cumulative_sum(vocab, spread, monkeypatch):
    monkeypatch.setattr(systematic, "CPU_ELEMENTS", 4 * max(vocab, N * BLOCK))  # several parts, the last one smaller
    generator = torch.Generator().manual_seed(vocab)
    logits = spread * torch.randn(ROWS, vocab, generator=generator)
    order, u = torch.randperm(vocab, generator=generator), torch.rand(ROWS, generator=generator, dtype=torch.float64)
    ranks, entropy = draw_from_logits(logits.clone(), order, u)
    p = logits.double().softmax(1)
    mass = p[:, order].cumsum(1)
    at = (torch.arange(N) + u[:, None]) / N
    # A point closer to an edge than float32's rounding error may fall on either side.
    low, high = (torch.searchsorted(mass, at + d, right=True).clamp(max=vocab - 1) for d in (-2e-6, 2e-6))
    assert ((low <= ranks) & (ranks <= high)).all() and (ranks.diff(dim=1) >= 0).all()
    assert (low == high).double().mean() > 0.99 or spread == 60.0
    torch.testing.assert_close(entropy.double(), -torch.special.xlogy(p, p).sum(1), rtol=1e-5, atol=1e-5)


def test_points_are_drawn_after_scale_and_soft_cap():
    logits, order, u = 3 * torch.randn(ROWS, 300), torch.arange(300), torch.rand(ROWS, dtype=torch.float64)
    head = Unembedding(torch.empty(0, 1), 300, scale=0.5, softcap=2.0)
    capped = 2.0 * torch.tanh(0.5 * logits / 2.0)
    for found, expected in zip(
        draw_from_logits(logits, order, u, head), draw_from_logits(capped, order, u), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_ids_of_probability_zero_are_never_drawn():
    logits = torch.full((2, 3 * BLOCK), -300.0)
    logits[:, [7, BLOCK + 3]] = 0.0
    for u in (0.0, 1 - 2.0**-53):
        ranks, entropy = draw_from_logits(
            logits.clone(), torch.arange(3 * BLOCK), torch.full((2,), u, dtype=torch.float64)
        )
        assert set(ranks.flatten().tolist()) == {7, BLOCK + 3}
        torch.testing.assert_close(entropy, torch.full((2,), math.log(2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_entropy_nan_and_changes_no_other_row(bad):
    logits, order, u = torch.randn(3, 500), torch.arange(500), torch.rand(3, dtype=torch.float64)
    broken = logits.clone()
    broken[1, 17] = bad
    (ranks, entropy), (expected, expected_entropy) = (
        draw_from_logits(broken, order, u),
        draw_from_logits(logits, order, u),
    )
    assert entropy.isnan().tolist() == [False, True, False] and ((ranks >= 0) & (ranks < 500)).all()
    assert torch.equal(ranks[[0, 2]], expected[[0, 2]]) and torch.equal(entropy[[0, 2]], expected_entropy[[0, 2]])


def test_the_memory_for_the_points_blocks_limits_the_rows_at_once(monkeypatch):
    """With a small vocabulary and many points, the blocks take most of the memory: one block for each point."""
    seen, inner = [], systematic._draw
    monkeypatch.setattr(systematic, "_draw", lambda logits, *rest: seen.append(len(logits)) or inner(logits, *rest))
    draw_points(torch.randn(20, 5), Unembedding(torch.empty(0, 1), 5), torch.arange(5), torch.rand(20).double(), 1024)
    assert max(seen) * 1024 * BLOCK <= systematic.CPU_ELEMENTS and sum(seen) == 20
