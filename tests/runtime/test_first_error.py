"""Who prints an error, when, and in which words."""

import socket

import pytest
import torch.distributed as dist

from pipeline.runtime.faults import first_error, watch
from pipeline.runtime.faults.first_error import report, report_failure

HOST = socket.gethostname()


@pytest.fixture
def waits(monkeypatch):
    """What was waited for, in s, instead of waiting."""
    found = []
    monkeypatch.setattr(first_error.time, "sleep", found.append)
    monkeypatch.setattr(first_error.stop, "wait_for_request", lambda seconds: bool(found.append(seconds)))
    return found


def test_a_rank_that_is_asked_to_end_leaves_the_word_to_the_one_that_failed_first(monkeypatch, capsys):
    """DeepSpeed's launcher ends the ranks of one that failed by SIGTERM, which is a request since listen()."""
    monkeypatch.setattr(first_error.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(first_error.stop, "wait_for_request", lambda seconds: True)
    report("error: no shards", 2, rank=1, world=2)
    report_failure(dist.DistNetworkError("Connection reset by peer"), 1, rank=1, world=2)
    assert capsys.readouterr().err == ""


def test_alone_an_error_is_printed_as_it_is(waits, capsys):
    report("error: no shards", 2, rank=0, world=1)
    assert (capsys.readouterr().err, waits) == ("error: no shards\n", [])


@pytest.mark.parametrize(
    ("rank", "is_first", "expected"),
    [
        (0, True, [first_error.LINGER_S]),  # the others read of it in this process
        (3, True, [first_error.ALIKE_S, first_error.LINGER_S]),
        (0, None, []),
        (
            3,
            None,
            [first_error.ALIKE_S, first_error.UNMET_S],
        ),  # the launcher ends it meanwhile, if rank 0 failed too
        (0, False, [first_error.CAUSE_S]),  # the one that was first ends it meanwhile
    ],
)
def test_the_first_prints_and_tells_the_others(waits, capsys, monkeypatch, rank, is_first, expected):
    told = []
    monkeypatch.setattr(watch, "failed", lambda *failure: told.append(failure) or is_first)
    report("error: no shards\nand more", 2, rank, world=4)
    assert capsys.readouterr().err == f"rank {rank} on {HOST}: error: no shards\nand more\n"
    assert told == [(f"rank {rank} on {HOST}: error: no shards", 2)]
    assert waits == expected


def test_a_lost_connection_is_one_line_and_waits_for_its_cause(waits, capsys):
    report_failure(dist.DistNetworkError("Connection reset by peer\nstack"), 1, rank=0, world=2)
    said = capsys.readouterr().err
    assert said == (
        f"rank 0 on {HOST}: lost its connection to another rank, which failed before it: Connection reset by peer\n"
    )
    assert waits == [first_error.CAUSE_S]


NCCL = "NCCL error in: NCCLUtils.cpp:77, {}\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n{}"


@pytest.mark.parametrize(
    ("error", "begins"),
    [
        (NCCL.format("remote process exited or there was a network error", "socketProgress"), "lost its connection to"),
        (NCCL.format("unhandled cuda error", "Cuda failure 2 'out of memory'"), "error: out of memory at "),
        (
            NCCL.format("invalid usage", "Duplicate GPU detected : rank 1 and rank 0 on device 0"),
            "failed: Dist",
        ),
    ],
)
def test_an_error_of_nccl_is_another_ranks_only_where_it_says_so(waits, capsys, error, begins):
    report_failure(dist.DistBackendError(error), 1, rank=0, world=2)
    said = capsys.readouterr().err
    assert said.startswith(f"rank 0 on {HOST}: {begins}")
    assert error.splitlines()[-1] in said or "out of memory" in error  # there the traceback has it


def test_too_little_memory_and_other_errors_keep_their_traceback(waits, capsys):
    for error, begins in (
        (MemoryError(), "error: out of memory at the start: MemoryError. What needs less: "),
        (KeyError("x"), "failed: KeyError: 'x'\n"),
    ):
        try:
            raise error
        except Exception as caught:
            report_failure(caught, 1, rank=0, world=1)
        said = capsys.readouterr().err
        assert said.startswith(begins) and "Traceback" in said


def test_a_port_in_use_is_no_lost_connection(waits, capsys):
    report_failure(dist.DistNetworkError("failed to listen, name: EADDRINUSE"), 1, rank=0, world=2)
    assert f"rank 0 on {HOST}: failed: DistNetworkError: failed to listen" in capsys.readouterr().err
    assert first_error.CAUSE_S not in waits
