"""The processes of one `mpirun`, so that an error on one of them reaches all and none waits for ever.

Without a launcher there is one rank and mpi4py is never imported.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from data_prep.schema import DataError

T = TypeVar("T")

LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_SIZE")
"""Variables of which mpirun (Open MPI, MPICH, Intel, MVAPICH) or `srun --mpi=...` sets one."""


class RankFailed(Exception):
    """Raised on every rank alike when one or more of them failed; speaks of the first in rank order."""

    def __init__(self, message: str, expected: bool):
        super().__init__(message, expected)
        self.message = message
        self.expected = expected
        """Whether it is something that the user can put right, with a message for them; else it has a traceback."""

    def __str__(self) -> str:
        return self.message


class Ranks:
    """One rank alone; MPI's many are `_MpiRanks`. Methods marked "all" are called by every rank together."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._own: list[Any] = []
        self._ended = 0

    def gather(self, value: Any) -> list[Any]:
        """All: every rank's value, in rank order, on every rank."""
        return [value]

    def tell(self, value: Any) -> None:
        """Send a value to rank 0 without waiting for it."""
        self._own.append(value)

    def heard(self) -> list[Any]:
        """Rank 0: what ranks told since the last call."""
        told = self._take()
        values = [value for value in told if not isinstance(value, _Ended)]
        self._ended += len(told) - len(values)
        return values

    def _take(self) -> list[Any]:
        told, self._own = self._own, []
        return told

    def flush(self) -> None:
        """Wait until rank 0 has taken what this rank told."""

    def abort(self) -> None:
        """End every rank at once, after an error that could not be agreed on."""

    def agree(self, error: Exception | None) -> None:
        """All: raise RankFailed everywhere if any rank brings an error."""
        failed = [found for found in self.gather(_failed(self.rank, self.size, error)) if found]
        if failed:
            raise failed[0]

    def together(self, work: Callable[[], T]) -> T:
        """All: do the work; if it fails on any rank, RankFailed is raised on all."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # whatever it is, the others must hear of it
            failure = error
        self.agree(failure)
        return result  # type: ignore[return-value]  # it is T: nobody failed

    def on_first(self, work: Callable[[], object]) -> None:
        """All: rank 0 does the work; if it fails, RankFailed is raised on all."""
        self.together(work if self.rank == 0 else lambda: None)

    def finish(self, work: Callable[[], T], hear: Callable[[list[Any]], None]) -> list[T]:
        """All: each rank works for itself, telling as it likes; rank 0 hears it until the last has ended.

        Returns every rank's result on every rank, or raises RankFailed on all.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        self.tell(_Ended())
        while self.rank == 0 and self._ended < self.size:
            told = self.heard()
            hear(told)
            if not told:
                time.sleep(0.02)
        self._ended = 0
        self.flush()
        self.agree(failure)
        return self.gather(result)


class _Ended:
    """A rank's last word."""


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
            f"started under MPI, but mpi4py does not load ({error}); pip install 'vlsi[mpi]', or run without mpirun"
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

    def tell(self, value: Any) -> None:
        if self.rank == 0:
            super().tell(value)
            return
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._comm.isend(value, dest=0))

    def _take(self) -> list[Any]:
        told = super()._take()
        while self._comm.iprobe(source=self._mpi.ANY_SOURCE):
            told.append(self._comm.recv(source=self._mpi.ANY_SOURCE))
        return told

    def flush(self) -> None:
        self._mpi.Request.Waitall(self._sent)
        self._sent = []

    def abort(self) -> None:
        self._comm.Abort(1)


def _failed(rank: int, size: int, error: Exception | None) -> RankFailed | None:
    """The error in a form that travels between processes."""
    if error is None or isinstance(error, RankFailed):
        return error
    where = f"rank {rank} of {size}: " if size > 1 else ""
    if isinstance(error, DataError):
        return RankFailed(f"{where}{error}", expected=True)
    return RankFailed(f"{''.join(traceback.format_exception(error))}{where}{error!r}", expected=False)
