"""The first-updates check finds a trained tensor that stands still and a frozen one that moves, on every rank alike."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


class Half(nn.Module):
    """One layer takes part in the loss, one does not, one is frozen."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.frozen = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.used(x).sum() + self.unused(x).detach().sum()


def work(rank: int, port: int, zero: str, results: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(ROOT)
    from pipeline.recipe.schema import Model, Recipe, Training
    from pipeline.runtime import engine
    from pipeline.runtime.first_updates import FirstUpdatesCheck, TrainableMismatch

    training = Training(steps=2, batch_size=2)
    parts = {"data": {"train": "x"}, "teacher": Model(path="x"), "student": Model(path="x")}
    steps = {"verbalize": training, "interact": training.model_dump(), "reinforce": training.model_dump()}
    recipe = Recipe(run="x", precision="fp32", deepspeed=f"ds_configs/{zero}.json", **parts, **steps)
    ranks = engine.start()
    torch.manual_seed(0)
    ours = engine.Engine(Half(), recipe, training, ranks)
    lenient, strict = FirstUpdatesCheck(ours, may_be_unused=("unused.weight",)), FirstUpdatesCheck(ours)
    waiting = FirstUpdatesCheck(ours, image_parts=("unused",))
    said = []

    def update(check: FirstUpdatesCheck, images: int = 1) -> None:
        try:
            check.after_update(images)
        except TrainableMismatch as error:
            said.append(str(error))

    for _ in range(2):
        ours.backward(ours(torch.ones(1, 4)), 2)
        ours.step(1e-3)
        update(lenient)
        update(strict)
        update(waiting, images=0)
    said.append(f"never used: {waiting.never_used()}")
    for images in (3, 0, 1, 2):
        update(waiting, images)
    late = FirstUpdatesCheck(ours, may_be_unused=("weight",))
    frozen = ours.module.frozen.weight
    with torch.no_grad():
        (frozen.ds_tensor if hasattr(frozen, "ds_tensor") else frozen).add_(1.0 if rank else 0.0)
    update(late)
    update(late)
    Path(results, f"{rank}.txt").write_text("\n".join(said))
    engine.stop()
    os._exit(0)  # as pipeline/job.py leaves, and for its reason


@pytest.mark.parametrize("zero", ["zero3_cpu", "zero2"])
def test_tensors_that_stand_still_or_drift_are_named_on_every_rank(tmp_path, zero):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port, zero, str(tmp_path)), nprocs=2)
    first, second = (Path(tmp_path, f"{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first == second, "all ranks decide alike, or the others hang"
    alone, never, with_images, drifted = first
    assert "1 of 2 trained tensors have not moved (first: unused.weight)" in alone
    assert "and 0 of 1 frozen ones have" in alone and "Leave out of train what need not" in alone
    assert never == "never used: ['unused.weight']", "without images nothing is held against it"
    assert "1 of 1 trained tensors have not moved (first: unused.weight)" in with_images, "at the second with images"
    assert "1 of 1 frozen ones have (first: frozen.weight)" in drifted
