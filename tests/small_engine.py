"""Run a function on a few gloo ranks, each with DeepSpeed started, to look at an Engine from inside."""

from __future__ import annotations

import gc
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.recipe.schema import Model, Recipe

ROOT = Path(__file__).resolve().parent.parent


def on_ranks(ranks: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(Ranks, *arguments)` returns on each rank; `work` is a function of a test module."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(ranks, port, str(folder), work, arguments), nprocs=ranks)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


def small_recipe(zero: str, precision: str = "fp32", **training: Any) -> Recipe:
    """A recipe that only an Engine reads: ds_configs/ZERO.json, and the same training settings for every step."""
    step = {"steps": 2, "batch_size": 2, **training}
    return Recipe(
        run=Path("x"),
        precision=precision,
        deepspeed=ROOT / "ds_configs" / f"{zero}.json",
        data={"train": "x"},
        teacher=Model(path=Path("x")),
        student=Model(path=Path("x")),
        verbalize=step,
        interact=step,
        reinforce=step,
    )


def bytes_alive() -> int:
    """Bytes of all tensors that anything in this process still refers to, each storage counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _rank(rank: int, ranks: int, port: int, folder: str, work: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from pipeline.runtime import engine

    torch.set_num_threads(1)
    result = work(engine.start(), *arguments)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
    engine.stop()
    os._exit(0)  # as pipeline/job.py leaves, and for its reason
