"""A checkpoint is read on any number of ranks, under any ZeRO stage: the same training goes on, but for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_engine import on_ranks, small_recipe
from torch import nn

UPDATES, STOP_AFTER, WIDTH, BATCH = 4, 2, 29, 6
STARTS = [(2, ["zero3"]), (1, ["zero2"]), (3, ["zero1", "zero0"])]
"""Ranks, and the stages that they train under, one after the other: each from the checkpoint of the one before it.

The trained tensors have 841, 29 and 1 elements: ZeRO pads them, and a rank may hold nothing of one.
"""
PLACES = [(ranks, zero) for ranks, stages in STARTS for zero in stages]


def trained(ranks, stages: list[str], earlier: str | None, folder: str) -> dict[str, dict[int, list]]:
    """{stage: the weights after each update}, with a checkpoint of one and the same update in FOLDER/STAGE."""
    made = {}
    for zero in stages:
        made[zero] = _trained(ranks, zero, earlier, f"{folder}/{zero}")
        earlier = f"{folder}/{zero}"
    return made


def _trained(ranks, zero: str, earlier: str | None, folder: str) -> dict[int, list]:
    engine, checkpoints, weights, first = _engine(ranks, zero), _checkpoints(ranks, folder), {}, 0
    if earlier is not None:
        found = _checkpoints(ranks, earlier)
        newest = found.newest()
        assert found.load(newest, engine.trained_state()) == {"read": STOP_AFTER}
        first = newest.update
    for update in range(first, UPDATES):
        if update == STOP_AFTER:
            checkpoints.save(engine.trained_state(), update, {"read": update})
        _update(engine, ranks, update)
        weights[update + 1] = [weight.tolist() for weight in engine.gathered(engine.module).values()]
    checkpoints.finish()
    engine.close()
    return weights


def _checkpoints(ranks, folder: str):
    from pipeline.runtime.checkpoint.checkpoints import Checkpoints

    return Checkpoints(Path(folder), 1, ranks)


def _engine(ranks, zero: str):
    from pipeline.runtime.engine import Engine

    torch.manual_seed(0)
    recipe = small_recipe(zero, "fp32", batch_size=BATCH)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    module[0].bias.requires_grad_(False)
    engine = Engine(module, recipe, recipe.reinforce, ranks)
    engine.train()
    return engine


def _update(engine, ranks, update: int) -> None:
    for sample in range(ranks.rank, BATCH, ranks.world):
        x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(100 * update + sample))
        engine.backward(engine(x).pow(2).sum(), BATCH, last=sample + ranks.world >= BATCH)
    engine.step(1e-2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each place made of the updates, and its folder."""
    folder, made, earlier = tmp_path_factory.mktemp("reshard"), [], None
    for ranks, stages in STARTS:
        place = folder / str(ranks)
        place.mkdir()
        found = on_ranks(ranks, place, trained, stages, earlier, str(place))[0]
        made += [(found[zero], place / zero) for zero in stages]
        earlier = str(made[-1][1])
    return made


@pytest.mark.parametrize("number", range(1, len(PLACES)), ids=[f"{n} ranks, {zero}" for n, zero in PLACES[1:]])
def test_training_goes_on_the_same_elsewhere(runs, number):
    """Within float32's rounding of the gradients: an update moves a weight by its learning rate, 0.01, at most."""
    (weights, _), (expected, _) = runs[number], runs[0]
    for update in range(STOP_AFTER + 1, UPDATES + 1):
        for ours, theirs in zip(weights[update], expected[update], strict=True):
            assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


def test_no_bit_of_the_state_is_lost_on_the_way(runs):
    """The last checkpoint, four places on, holds what the first did."""
    from pipeline.runtime.checkpoint.files import Reader, read_index
    from pipeline.runtime.checkpoint.trained_state import KINDS, Span

    folders = [folder / "checkpoints" / f"update_{STOP_AFTER:09}" for _, folder in runs]
    indices = [read_index(folder) for folder in folders]
    assert [len(index.files) for index in indices] == [2, 1, 3, 1], (
        "under ZeRO 0 all ranks hold the same, and one writes it"
    )
    for name, size in indices[0].parameters.items():
        pieces = [Reader(f, index).read(Span(name, 0, size)) for f, index in zip(folders, indices, strict=True)]
        assert {piece.step for piece in pieces} == {float(STOP_AFTER)}
        for kind in KINDS:
            assert all(torch.equal(piece.values[kind], pieces[0].values[kind]) for piece in pieces), (name, kind)
            assert pieces[0].values[kind].any()
