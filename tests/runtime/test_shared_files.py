"""Two ranks whose hosts do not see alike: what rank 0 sees goes, the other waits for it, and both fail alike.

The ranks are two threads of this process, each with a folder of its own, the view that its host has of the shared one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import CacheError, StorageError
from pipeline.runtime import ranks as ranks_module
from pipeline.runtime import shared_files
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.shared_files import as_first_rank_sees, view_of, wait_for_files


@pytest.fixture
def on_two_ranks(monkeypatch) -> Callable[[Callable[[Ranks], object]], list[object]]:
    """Runs work(ranks) on two threads, which meet in collectives; the result or the error of each, rank 0's first."""
    monkeypatch.setattr(shared_files, "POLL_S", 0.01)
    meeting, parts, local = threading.Barrier(2, timeout=30), [[], []], threading.local()

    def gather(items):
        parts[local.rank] = list(items)
        meeting.wait()
        both = parts[0] + parts[1]
        meeting.wait()
        return both

    monkeypatch.setattr(ranks_module, "gather_lists", gather)
    monkeypatch.setattr(ranks_module, "of_first_rank", lambda value: gather([value])[0])

    def run(work):
        results: list[object] = [None, None]

        def of(rank: int) -> None:
            local.rank = rank
            try:
                results[rank] = work(Ranks(rank, 2))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=of, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


@pytest.fixture
def views(tmp_path) -> list[Path]:
    """What each rank's host sees."""
    folders = [tmp_path / "of rank 0", tmp_path / "of rank 1"]
    for folder in folders:
        folder.mkdir()
    return folders


def write_late(folder: Path, name: str, content: bytes) -> None:
    """The file gets its name a moment later, as a host sees it that remembers that there was none."""
    aside = folder.with_name("late")
    aside.write_bytes(content)
    threading.Timer(0.3, lambda: os.replace(aside, folder / name)).start()


@pytest.mark.parametrize("before", [None, b"old", b"the old"], ids=["not there", "shorter", "other content"])
def test_a_file_that_shows_late_is_waited_for(on_two_ranks, views, before):
    (views[0] / "order.int32").write_bytes(b"the new")
    if before is not None:
        (views[1] / "order.int32").write_bytes(before)
    write_late(views[1], "order.int32", b"the new")

    def read(ranks: Ranks) -> bytes:
        file = views[ranks.rank] / "order.int32"
        wait_for_files(ranks, [file])
        return file.read_bytes()

    assert on_two_ranks(read) == [b"the new", b"the new"]


def test_a_folder_is_waited_for_file_by_file(on_two_ranks, views):
    for folder, name in ((views[0], "config.json"), (views[1], "config.json"), (views[0], "model.safetensors")):
        (folder / "student").mkdir(exist_ok=True)
        (folder / "student" / name).write_bytes(b"{}")
    write_late(views[1], "student/model.safetensors", b"{}")

    def look(ranks: Ranks) -> list[str]:
        wait_for_files(ranks, [views[ranks.rank]])
        return sorted(view_of(views[ranks.rank]))

    seen = on_two_ranks(look)
    assert seen[0] == seen[1] == ["student/config.json", "student/model.safetensors"]


def test_a_file_that_never_shows_is_an_error_of_all_ranks(on_two_ranks, views, monkeypatch):
    monkeypatch.setattr(shared_files, "WAIT_S", 0.05)
    (views[0] / "manifest.json").write_bytes(b"{}")
    first, second = on_two_ranks(lambda ranks: wait_for_files(ranks, [views[ranks.rank] / "manifest.json"]))
    assert isinstance(first, StorageError) and str(first) == str(second)
    assert f"does not see {views[1] / 'manifest.json'} as rank 0 does, after 0 s: expected 2 bytes" in str(first)
    assert "found no such file. Expected one file system that all hosts share" in str(first)


def test_what_rank_0_does_not_see_is_not_waited_for(on_two_ranks, views):
    (views[1] / "order.int32").write_bytes(b"more than rank 0 sees")
    assert on_two_ranks(lambda ranks: wait_for_files(ranks, [views[ranks.rank] / "order.int32"])) == [None, None]


def test_what_rank_0_sees_goes(on_two_ranks, views):
    """The newest checkpoint, say: rank 1 does not see it yet, and would have begun anew."""
    (views[0] / "update_000000004").mkdir()

    def newest(ranks: Ranks) -> list[str]:
        look = views[ranks.rank]
        return as_first_rank_sees(ranks, "looking", lambda: [path.name for path in look.iterdir()])

    assert on_two_ranks(newest) == [["update_000000004"]] * 2


def test_what_rank_0_refuses_all_refuse(on_two_ranks):
    def look() -> None:
        raise CacheError("no teacher cache in RUN/cache; make it")

    first, second = on_two_ranks(lambda ranks: as_first_rank_sees(ranks, "looking", look))
    assert isinstance(first, CacheError) and isinstance(second, CacheError) and str(first) == str(second)
