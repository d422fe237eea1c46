"""The first-updates check finds trained tensors without a gradient and frozen ones that move, on every rank alike."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from small_engine import on_ranks, small_recipe
from torch import nn

from pipeline.vlm.verbalizer import VerbFFN

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
    from pipeline.recipe.schema import Model, Recipe
    from pipeline.runtime import engine
    from pipeline.runtime.first_updates import FirstUpdatesCheck, TrainableMismatch

    training = {"steps": 2, "batch_size": 2}
    parts = {"data": {"train": "x"}, "teacher": Model(path="x"), "student": Model(path="x")}
    steps = dict.fromkeys(("verbalize", "interact", "reinforce"), training)
    recipe = Recipe(run="x", precision="fp32", deepspeed=f"ds_configs/{zero}.json", **parts, **steps)
    ranks = engine.start()
    torch.manual_seed(0)
    ours = engine.Engine(Half(), recipe, recipe.verbalize, ranks)
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
    assert "1 of 2 trained tensors have had no gradient (first: unused.weight)" in alone
    assert "and 0 of 1 frozen ones have moved." in alone and "Leave out of train what need not" in alone
    assert never == "never used: ['unused.weight']", "without images nothing is held against it"
    assert "1 of 1 trained tensors have had no gradient (first: unused.weight)" in with_images, (
        "at the second with images"
    )
    assert "1 of 1 frozen ones have moved (first: frozen.weight)" in drifted


CASES = [
    ("zero0", "fp32"),
    ("zero1", "bf16"),
    ("zero2", "fp32"),
    ("zero3", "bf16"),
    ("zero3_offload_optimizer", "bf16"),
]
WIDTH = 16


class Learner(nn.Module):
    """A verb-FFN that learns, and a layer without a gradient, which weight decay moves nonetheless."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.verb_ffn = VerbFFN(WIDTH, dtype=dtype)
        self.verb_ffn.draw()
        self.unused = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)

    def forward(self, x):
        return self.verb_ffn(x).float().pow(2).sum() + self.unused(x).detach().sum()


def in_a_long_warmup(ranks) -> dict[str, tuple[str, bool]]:
    """For each case what the check says after two updates, and whether a norm's master, all ones, stands as it was."""
    return {f"{zero} {precision}": _in_a_long_warmup(ranks, zero, precision) for zero, precision in CASES}


def _in_a_long_warmup(ranks, zero: str, precision: str) -> tuple[str, bool]:
    from pipeline.runtime.engine import Engine
    from pipeline.runtime.first_updates import FirstUpdatesCheck, TrainableMismatch

    torch.manual_seed(0)
    recipe = small_recipe(zero, precision, weight_decay=0.1)
    engine = Engine(Learner(torch.bfloat16 if precision == "bf16" else torch.float32), recipe, recipe.interact, ranks)
    check, said = FirstUpdatesCheck(engine), ""
    for rate in (1e-8, 2e-8):  # learning_rate 1e-5, warmup_steps 1000
        engine.backward(engine(torch.randn(1, WIDTH, dtype=engine.dtype)), 2)
        engine.step(rate)
        try:
            check.after_update(images=0)
        except TrainableMismatch as error:
            said = str(error)
    norms = [p.values["master"] for p in engine.trained_state().pieces() if p.span.name == "verb_ffn.norm.weight"]
    still = all(bool((norm == 1).all()) for norm in norms)
    engine.close()
    return said, still


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory) -> list[dict[str, tuple[str, bool]]]:
    return on_ranks(2, tmp_path_factory.mktemp("warm-up"), in_a_long_warmup)


@pytest.mark.parametrize("case", [" ".join(case) for case in CASES])
def test_a_step_that_rounding_hides_is_told_from_a_lost_gradient(warmed_up, case):
    for of_rank in warmed_up:
        said, still = of_rank[case]
        assert still, "float32 has nothing between 1 and 1 - 6e-8"
        assert "1 of 5 trained tensors have had no gradient (first: unused.weight)" in said


class Tower(nn.Module):
    """Frozen, with running statistics and dropout; one of its layers is run again in the backward."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.layer = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Sequential(nn.Linear(4, 4))
        self.layer.gradient_checkpointing = True
        self.requires_grad_(False)

    def forward(self, x):
        return self.layer(self.drop(self.norm(x)))


class OnTower(nn.Module):
    """What trains, with dropout of its own, on a frozen tower."""

    def __init__(self):
        super().__init__()
        self.tower, self.drop, self.decoder = Tower(), nn.Dropout(0.5), nn.Linear(4, 4)

    def forward(self, x):
        return self.decoder(self.drop(self.tower(x))).pow(2).sum()


def over_a_frozen_tower(ranks, zero: str) -> tuple[list[str], bool, str]:
    """The modules in training mode; whether the tower gives what it gives in eval mode; what the check says of one
    whose statistics move."""
    from pipeline.runtime.engine import Engine
    from pipeline.runtime.first_updates import FirstUpdatesCheck, TrainableMismatch

    torch.manual_seed(0)
    recipe = small_recipe(zero)
    engine = Engine(OnTower(), recipe, recipe.interact, ranks)
    seen, x = [], torch.randn(8, 4)
    engine.module.tower.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))

    def update() -> None:
        engine.backward(engine(x), 8)
        engine.step(1e-3)

    engine.eval()
    engine(x)
    engine.train()
    training = [name for name, module in engine.module.named_modules() if module.training]
    check = FirstUpdatesCheck(engine)
    for _ in range(2):
        update()
        check.after_update(images=0)
    engine.module.tower.norm.train()
    check, said = FirstUpdatesCheck(engine), ""
    try:
        for _ in range(2):
            update()
            check.after_update(images=0)
    except TrainableMismatch as error:
        said = str(error)
    return training, torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]), said


@pytest.mark.parametrize("zero", ["zero0", "zero3_cpu"])
def test_a_frozen_part_is_in_eval_mode_and_its_statistics_are_watched(tmp_path, zero):
    ((training, as_in_eval, said),) = on_ranks(1, tmp_path, over_a_frozen_tower, zero)
    assert training == ["", "tower.layer", "drop", "decoder"] and as_in_eval
    assert "and 3 of 7 frozen ones have moved (first: tower.norm.running_mean, tower.norm.running_var, " in said
