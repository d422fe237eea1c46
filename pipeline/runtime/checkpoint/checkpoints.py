"""A step's checkpoints in RUN/STEP/checkpoints: written while training goes on, verified before they are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.errors import CheckpointError
from pipeline.runtime.checkpoint.files import (
    INDEX,
    Damaged,
    Index,
    RankFile,
    Reader,
    check_room,
    file_size,
    find_damage,
    read_index,
    write_index,
    write_problem,
    write_rank_file,
)
from pipeline.runtime.checkpoint.trained_state import TrainedState, host_copy, release_copies
from pipeline.runtime.display.progress import say
from pipeline.runtime.node import available_memory, rank_share
from pipeline.runtime.ranks import Ranks, gather_lists, gather_when_ready, of_first_rank, sum_over_ranks
from pipeline.runtime.shared_files import wait_for_files

Result = TypeVar("Result")

SHARE_OF_MEMORY = 0.5
"""Share of a machine's free memory, or of what their control group has left, that its ranks may take for copies of what
they write."""

OLDER_FORMAT = "whole"
"""In the checkpoints of older versions, which are pickles, and in no other."""


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that is being written: this rank's part, and what its index will say."""

    update: int
    state: Mapping[str, Any]
    parameters: Mapping[str, int]
    file: Future[RankFile | str | None]
    """What this rank wrote, or what kept it from writing."""


class Checkpoints:
    """The newest `keep` checkpoints of a step, each whole or not there. All ranks must make the same calls.

    At most one is being written. It counts, and older ones go, once all ranks have written their files: `publish` and
    `finish` see to that.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        """folder: the step's."""
        self.folder, self.keep, self.ranks = folder / "checkpoints", keep, ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: _Writing | None = None
        self._ranks_here: int | None = None

    def newest(self) -> Index | None:
        """The newest checkpoint whose files are all as they were written; None where there is none at all.

        Damaged ones are renamed, said so, and the one before them is taken: what was lost is trained again, to the same
        end. Raises CheckpointError where none is undamaged, and leaves them as they are: a disk may have failed for a
        moment. Raises it also where an older version wrote them.
        """
        damaged: dict[int, list[str]] = {}
        for update in reversed(self._of_first_rank(self._tidy)):
            index, damage = self._verified(update)
            if index is not None:
                self._set_aside(damaged)
                return index
            damaged[update] = damage
        if damaged:
            found = "; ".join(problems[0] for problems in damaged.values())
            raise CheckpointError(
                f"no checkpoint in {self.folder} is undamaged: {found}. Put a copy of the file in its place, or remove "
                f"{self.folder} to train the step from its start"
            )
        return None

    def load(self, index: Index, state: TrainedState) -> Mapping[str, Any]:
        """Put the trained state back to where it was, and return the loop's own state of then."""
        reader = Reader(_path(self.folder, index.update), index)
        reader.check_parameters(state.sizes)
        state.restore(reader.read)
        return index.state

    def check_room(self, state: TrainedState) -> None:
        """Raise CheckpointError where the folder has no room for a checkpoint of this state, or cannot be written."""
        needed = self._bytes_of_all(state)
        self._of_first_rank(lambda: check_room(self.folder, needed))

    def save(self, state: TrainedState, update: int, loop_state: Mapping[str, Any]) -> None:
        """Begin a checkpoint of an update; where memory allows, return once the state has been copied to it.

        Raises CheckpointError where there is no room, or where the one before could not be written.
        """
        self.finish()
        path, needed = _path(self.folder, update), self._bytes_of_all(state)

        def make_room() -> None:
            _remove(path)
            check_room(path, needed)

        self._of_first_rank(make_room)
        spans = state.spans()
        beside = self._has_memory(file_size(spans))
        pieces = host_copy(state) if beside else state.pieces()

        def write() -> RankFile | str | None:
            try:
                return write_rank_file(path, self.ranks.rank, spans, pieces)
            except OSError as error:
                return write_problem(path, error, needed)

        file = self._thread.submit(write) if beside else _done(write())
        self._writing = _Writing(update, loop_state, state.sizes, file)

    def publish(self) -> None:
        """Once all ranks have written their files, let the checkpoint count. Returns at once where they have not."""
        if self._writing is None:
            return
        unfinished = torch.tensor(float(not self._writing.file.done()), device=self.ranks.device)
        if not sum_over_ranks(unfinished):
            self._conclude(self._writing, gather_lists([self._writing.file.result()]))

    def finish(self) -> None:
        """Wait until the checkpoint that is being written counts. Raises CheckpointError where it cannot be written."""
        if (writing := self._writing) is not None:
            what = f"waiting for the checkpoint of update {writing.update}"
            self._conclude(writing, gather_when_ready(self.ranks, what, lambda: [writing.file.result()]))

    def _conclude(self, writing: _Writing, results: list[RankFile | str | None]) -> None:
        path, self._writing = _path(self.folder, writing.update), None
        release_copies()
        problems = [result for result in results if isinstance(result, str)]
        files = [result for result in results if isinstance(result, RankFile)]

        def conclude() -> None:
            if problems:
                _remove(path)  # half a checkpoint would take the room that is missing
                raise CheckpointError(problems[0])
            try:
                write_index(path, Index(writing.update, writing.state, writing.parameters, files))
            except OSError as error:
                raise CheckpointError(write_problem(path, error, sum(file.bytes for file in files))) from error
            for old in _updates(self.folder)[: -self.keep]:
                _remove(_path(self.folder, old))

        self._of_first_rank(conclude)

    def _verified(self, update: int) -> tuple[Index | None, list[str]]:
        """A checkpoint's index, or None and what is wrong. Each rank reads some of its files."""
        try:
            index = self._of_first_rank(lambda: read_index(_path(self.folder, update)))
        except Damaged as error:
            return None, [str(error)]
        files = [_path(self.folder, update) / file.name for file in index.files]
        wait_for_files(self.ranks, self._of_first_rank(lambda: [file for file in files if file.is_file()]))
        own = index.files[self.ranks.rank :: self.ranks.world]
        what = f"verifying the checkpoint of update {update}"
        damage = gather_when_ready(self.ranks, what, lambda: find_damage(_path(self.folder, update), own))
        return (None, damage) if damage else (index, [])

    def _set_aside(self, damaged: Mapping[int, list[str]]) -> None:
        def rename(update: int, aside: Path) -> None:
            shutil.rmtree(aside, ignore_errors=True)
            _path(self.folder, update).rename(aside)

        for update, damage in damaged.items():
            aside = self.folder / f"damaged_{update:09}"
            self._of_first_rank(partial(rename, update, aside))
            say(f"warning: {damage[0]}. It is now in {aside}, for you to remove", self.ranks.first)

    def _tidy(self) -> list[int]:
        """The updates that have a checkpoint. What a killed job left of another one is removed."""
        for path in self.folder.glob("update_*"):
            if (path / OLDER_FORMAT).exists():
                raise CheckpointError(
                    f"{path} was written by an older version, in a form that could execute code when it is read. End "
                    f"the step with that version, or remove {self.folder} to train it from its start"
                )
            if not (path / INDEX).exists():
                shutil.rmtree(path)
        return _updates(self.folder)

    def _has_memory(self, nbytes: int) -> bool:
        if self._ranks_here is None:
            self._ranks_here = rank_share().ranks
        return nbytes * self._ranks_here <= SHARE_OF_MEMORY * available_memory()

    def _bytes_of_all(self, state: TrainedState) -> int:
        return int(sum_over_ranks(torch.tensor(file_size(state.spans()), device=self.ranks.device)))

    def _of_first_rank(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on rank 0, on every rank: its word goes, as do its CheckpointError and OSError."""
        answer: Any = None
        if self.ranks.first:
            try:
                answer = work()
            except CheckpointError as error:
                answer = error
            except OSError as error:
                answer = CheckpointError(f"{self.folder} cannot be used: {error}")
        word = of_first_rank(answer)
        if isinstance(word, CheckpointError):
            raise word
        return word


def remove_checkpoints(folder: Path) -> None:
    """Remove a step's checkpoints, given its folder: it is complete and its result stands."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _done(result: Result) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_result(result)
    return future


def _path(folder: Path, update: int) -> Path:
    return folder / f"update_{update:09}"


def _remove(checkpoint: Path) -> None:
    """First what makes it whole: killed in between, this leaves what the next start removes."""
    (checkpoint / INDEX).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _updates(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("update_")) for path in folder.glob(f"update_*/{INDEX}"))
