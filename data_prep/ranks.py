"""The processes of one `mpirun`. An error on one rank ends all of them, so that none waits for ever.

Without a launcher there is one rank, and mpi4py is not imported.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from data_prep.atomic import storage_fault
from data_prep.schema import DataError

T = TypeVar("T")

LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_SIZE")
"""Variables of which mpirun (Open MPI, MPICH, Intel, MVAPICH) or `srun --mpi=...` sets one."""


class RankFailed(Exception):
    """Raised on every rank when one or more of them failed; its message is that of the lowest rank."""

    def __init__(self, message: str, expected: bool):
        super().__init__(message, expected)
        self.message = message
        self.expected = expected
        """Whether the user can put it right. If not, the message holds a traceback."""

    def __str__(self) -> str:
        return self.message


class Ranks:
    """One rank alone; `_MpiRanks` are the ranks of MPI. A method marked "all" must be called by every rank."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._to_itself: list[Any] = []
        self._finished = 0

    def gather(self, value: Any) -> list[Any]:
        """All: every rank's value, in rank order, on every rank."""
        return [value]

    def send(self, value: Any) -> None:
        """Send a value to rank 0 without waiting for it."""
        self._to_itself.append(value)

    def receive(self) -> list[Any]:
        """Rank 0: what the ranks have sent since the last call."""
        messages = self._take()
        values = [value for value in messages if not isinstance(value, _Finished)]
        self._finished += len(messages) - len(values)
        return values

    def _take(self) -> list[Any]:
        messages, self._to_itself = self._to_itself, []
        return messages

    def flush(self) -> None:
        """Wait until rank 0 has received what this rank sent."""

    def abort(self, code: int = 1) -> None:
        """End every rank at once, with an exit code, after an error that the other ranks do not know of."""

    def raise_on_all(self, error: Exception | None) -> None:
        """All: raise RankFailed on every rank if any rank has an error."""
        failed = [found for found in self.gather(_failed(self.rank, self.size, error)) if found]
        if failed:
            raise failed[0]

    def run_on_all(self, work: Callable[[], T]) -> T:
        """All: do the work; if it fails on any rank, RankFailed is raised on all."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # whatever it is, the other ranks must know of it
            failure = error
        self.raise_on_all(failure)
        return result  # type: ignore[return-value]  # it is T: nobody failed

    def run_on_first(self, work: Callable[[], object]) -> None:
        """All: rank 0 does the work; if it fails, RankFailed is raised on all."""
        self.run_on_all(work if self.rank == 0 else lambda: None)

    def run_and_collect(self, work: Callable[[], T], on_received: Callable[[list[Any]], None]) -> list[T]:
        """All: each rank does its work and may `send` meanwhile; rank 0 receives until the last one has finished.

        Returns every rank's result on every rank, or raises RankFailed on all.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        self.send(_Finished())
        while self.rank == 0 and self._finished < self.size:
            messages = self.receive()
            on_received(messages)
            if not messages:
                time.sleep(0.02)
        self._finished = 0
        self.flush()
        self.raise_on_all(failure)
        return self.gather(result)


class _Finished:
    """The last message of a rank."""


def start_ranks() -> Ranks:
    """Find out how many ranks there are. Raises DataError where a launcher and mpi4py do not fit together."""
    if not any(name in os.environ for name in LAUNCHED):
        steps = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if steps != "1":
            raise DataError(
                f"srun started {steps} tasks without MPI, and each would do all the work; "
                "use mpirun -n N, or srun --mpi=pmix"
            )
        return Ranks()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"started under MPI, but mpi4py does not load ({error}); pip install -e '.[mpi]' in the checkout, "
            "or run without mpirun"
        ) from None
    return _MpiRanks(MPI)


class _MpiRanks(Ranks):
    """The ranks of MPI.COMM_WORLD."""

    def __init__(self, MPI: Any):
        super().__init__()
        self._mpi, self._comm = MPI, MPI.COMM_WORLD.Dup()
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self._sent: list[Any] = []

    def gather(self, value: Any) -> list[Any]:
        return self._comm.allgather(value)

    def send(self, value: Any) -> None:
        if self.rank == 0:
            super().send(value)
            return
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._comm.isend(value, dest=0))

    def _take(self) -> list[Any]:
        messages = super()._take()
        while self._comm.iprobe(source=self._mpi.ANY_SOURCE):
            messages.append(self._comm.recv(source=self._mpi.ANY_SOURCE))
        return messages

    def flush(self) -> None:
        self._mpi.Request.Waitall(self._sent)
        self._sent = []

    def abort(self, code: int = 1) -> None:
        self._comm.Abort(code)


def _failed(rank: int, size: int, error: Exception | None) -> RankFailed | None:
    """The error in a form that travels between processes."""
    if error is None or isinstance(error, RankFailed):
        return error
    where = f"rank {rank} of {size}: " if size > 1 else ""
    if isinstance(error, DataError):
        return RankFailed(f"{where}{error}", expected=True)
    if (fault := storage_fault(error)) is not None:
        return RankFailed(f"{where}{fault}", expected=True)
    return RankFailed(f"{''.join(traceback.format_exception(error))}{where}{error!r}", expected=False)
