"""The ranks of a job, and the few collectives that the project uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runtime.display.progress import say
from pipeline.runtime.faults import watch
from pipeline.runtime.faults.stop import Requeue, asked_to_stop

Item = TypeVar("Item")

HEARTBEAT_S = 10.0
"""Seconds between two meetings of ranks that wait for one another.

Collectives time out (engine.start).
"""


@dataclass(frozen=True)
class Ranks:
    """Which rank this process is. A value, not an environment: any topology can be tested in one process."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over ranks, in the tensor's own dtype; the tensor itself on one rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_lists(items: Sequence[Any]) -> list[Any]:
    """Every rank's items, rank 0's first, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(items)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(items))
    return [item for part in gathered for item in part]


def of_first_rank(value: Item) -> Item:
    """Rank 0's value, on every rank; the others' is not looked at. All ranks must call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    word = [value]
    dist.broadcast_object_list(word, src=0)  # all_gather_object would pad every rank's to the size of rank 0's
    return word[0]


def gather_when_ready(ranks: Ranks, what: str, make: Callable[[], Sequence[Any]]) -> list[Any]:
    """gather_lists(make()) where `make` takes long, such as hashing: up to watch.LONG times hang_minutes.

    what: a description that rank 0 prints while the ranks wait. Raises what `make` raised.
    """
    return gather_lists(_made(ranks, what, make))


def of_first_rank_when_ready(ranks: Ranks, what: str, make: Callable[[], Item]) -> Item:
    """of_first_rank(make()) where `make` takes long there. what, raises: as gather_when_ready."""
    return of_first_rank(_made(ranks, what, make))


def _made(ranks: Ranks, what: str, make: Callable[[], Item]) -> Item:
    """make(), in a thread. The ranks meet every HEARTBEAT_S seconds meanwhile, so that no collective times out.

    That they meet is no progress: to the watch a rank stands still until its own `make` is done.
    """
    begun, before = time.monotonic(), watch.now()

    def made() -> Item:
        item = make()
        watch.doing(f"{what}: done here, waiting for the other ranks", long=True)
        return item

    watch.doing(what, long=True)
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(made)
        while not all(gather_lists([_is_ready(making)])):
            say(f"{what}, {time.monotonic() - begun:.0f} s", ranks.first)
    watch.doing(before, long=True)
    return making.result()


def on_first_rank(ranks: Ranks, what: str, work: Callable[[], object]) -> None:
    """Call work() on rank 0, and wait for it on the others, for as long as gather_when_ready does.

    All ranks must call. Raises what `work` raised, on rank 0.
    """

    def make() -> list[Any]:
        if ranks.first:
            work()
        return []

    gather_when_ready(ranks, what, make)


LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout")
"""What says that another rank is gone."""
LOST_BY_NCCL = ("ncclRemoteError", "remote process exited", "Connection closed", "timeout", "timed out")
"""The same among NCCL's errors: others, such as two ranks on one GPU, are this rank's own."""


def lost_connection(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone. The cause is in that rank's own message."""
    text = str(error)
    if "EADDRINUSE" in text:  # another job has the port: no rank has failed
        return False
    if isinstance(error, dist.DistBackendError) or (isinstance(error, RuntimeError) and "NCCL" in text):
        return any(said in text for said in (*LOST, *LOST_BY_NCCL))
    return isinstance(error, (dist.DistError, ConnectionError)) or (
        isinstance(error, RuntimeError) and any(said in text for said in LOST)
    )


def _is_ready(making: Future[Any]) -> bool:
    wait([making], HEARTBEAT_S)
    if making.done():
        making.result()  # an error ends the job now, not when the other ranks have made theirs
    return making.done()


def until_all_done(own: Iterator[Item], ranks: Ranks, where: str) -> Iterator[Item | None]:
    """This rank's items, then None until every rank has none left. All ranks loop equally often, as ZeRO-3 needs.

    Raises Requeue(where, ...) on all ranks once one of them is asked to stop.
    """
    while True:
        item = next(own, None)
        met = torch.zeros(1 + ranks.world, dtype=torch.long)  # how many have an item; of each, what asks it to stop
        met[0], met[1 + ranks.rank] = item is not None, asked_to_stop()
        left, *asked = sum_over_ranks(met.to(ranks.device)).tolist()
        if not left:
            return
        if any(asked):
            raise Requeue(where, asked)
        yield item


def heed_stop(where: str) -> None:
    """Raise Requeue(where, ...) on all ranks if one of them is asked to stop. All ranks must call."""
    if any(asked := gather_lists([asked_to_stop()])):
        raise Requeue(where, asked)


def wait_for_all() -> None:
    """Barrier."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
