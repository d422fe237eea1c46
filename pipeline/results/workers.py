"""One model's work on the devices at hand: in this process, or in several that hold a copy of the model each.

Results come in the order of the items, and an item is worked on by itself: the number of processes changes no result.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from pipeline.errors import RecipeError
from pipeline.results.generate import run_dtype
from pipeline.runtime.display.logs import filter_logs, is_filtered
from pipeline.runtime.faults.stop import leave_signals_to_parent
from pipeline.vlm.placement import (
    Devices,
    available_cpu_memory,
    check_fits_cpu,
    device_groups,
    free_cuda_memory,
    weight_bytes,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

_SPAWN = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA


class Machine:
    """The memory of the devices at hand, as it is when a command begins, and what models take of it."""

    def __init__(self) -> None:
        self._free = _gpu_memory()
        self.weights = functools.cache(_weights)
        """Bytes of the weights of the model in a folder, in the dtype that it runs in here."""

    def groups(self, folder: Path, processes: int | None) -> list[Devices]:
        """The devices of each process that holds a copy of the model: at most `processes`, None: as many as have room.

        Without a GPU exactly `processes`, by default one. Raises RecipeError where not even one copy has room.
        """
        weights = self.weights(folder)
        try:
            groups = device_groups(weights, self._free, processes)
            if not self._free:
                check_fits_cpu(weights, available_cpu_memory(), len(groups))
        except RecipeError as error:
            raise RecipeError(f"{folder}: {error}") from None
        return groups


def places(groups: Sequence[Devices]) -> str:
    """Where copies of a model work, such as "2 processes with 4 GPUs each"; without a GPU, "1 process on the CPU"."""
    processes = f"{len(groups)} process{'es' if len(groups) > 1 else ''}"
    gpus = len(groups[0])
    if not gpus:
        return f"{processes} on the CPU"
    return f"{processes} with {gpus} GPU{'s' if gpus > 1 else ''}{' each' if len(groups) > 1 else ''}"


def free_memory() -> None:
    """Give back what a model took that nobody holds any more: the next one may need all of it."""
    gc.collect()
    torch.cuda.empty_cache()


class Workers(Generic[Item, Result]):
    """Calls on items what `make(devices)` returns, once for each group of devices: a model that is loaded there.

    With one group in this process, else in one for each; then `make`, items and results must be picklable. Models are
    loaded when the first items come. Use as a context: at its end models and processes are gone.
    """

    def __init__(self, make: Callable[[Devices], Callable[[Item], Result]], groups: Sequence[Devices]):
        self._make, self._groups = make, list(groups)
        self._call: Callable[[Item], Result] | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers[Item, Result]:
        return self

    def __exit__(self, *error: object) -> None:
        self._call = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        free_memory()

    def map(self, items: Sequence[Item]) -> Iterator[Result]:
        """The results, in the order of the items. Raises what a call raises, and RecipeError for too little memory."""
        with _explained():
            if len(self._groups) > 1:
                self._pool = self._pool or self._start()
                yield from self._pool.map(_work, items)
            else:
                self._call = self._call or self._make(self._groups[0])
                yield from map(self._call, items)

    def _start(self) -> ProcessPoolExecutor:
        groups: SimpleQueue[Devices] = _SPAWN.SimpleQueue()
        for group in self._groups:
            groups.put(group)
        threads = max(1, torch.get_num_threads() // len(self._groups))
        return ProcessPoolExecutor(
            len(self._groups), _SPAWN, _begin_worker, (self._make, groups, threads, not is_filtered())
        )


_made: Callable[[], Callable[[Any], Any]]
"""In a worker: makes its callable at the first call, so that an error in making it is raised where results are."""


def _begin_worker(make: Callable, groups: SimpleQueue[Devices], threads: int, verbose: bool) -> None:
    global _made
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
    leave_signals_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    filter_logs(verbose)
    torch.set_num_threads(threads)
    _made = functools.cache(functools.partial(make, groups.get()))


def _work(item: Any) -> Any:
    return _made()(item)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever, and hold its device."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RecipeError(f"too little GPU memory beside the weights: give a smaller --batch-size. {error}") from error
    except BrokenProcessPool:
        raise RecipeError(
            "a worker process was ended from outside, most likely for its use of memory. What is written is kept: run "
            "the same command again, with fewer --processes or a smaller --batch-size"
        ) from None


def _weights(folder: Path) -> int:
    return weight_bytes(folder, run_dtype(folder))


def _gpu_memory() -> list[int]:
    """Free memory of each GPU.

    Of several it is asked in a process of its own: to ask takes memory on each, and where GPUs are set to serve one
    process only, workers could not use them.
    """
    if torch.cuda.device_count() < 2:
        return free_cuda_memory()
    with ProcessPoolExecutor(1, _SPAWN) as pool:
        return pool.submit(free_cuda_memory).result()
