from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from faulty_input import REPOSITORY

from data_prep import progress
from data_prep.progress import Progress


def test_lines_have_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    with Progress("wrote") as shown:
        shown.update(1000, 0.25)
        shown.update(2000, None)
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("wrote 1,000 records, ") and "/s, 25%, " in first and first.endswith(" left")
    assert second.startswith("wrote 2,000 records, ") and second.endswith(" so far")
    assert last.startswith("wrote 2,000 records, ") and " in 0:0" in last


def test_lines_come_now_and_then_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("wrote") as shown:
        for done in range(100):
            shown.update(done, done / 100)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    with Progress("wrote", visible=False) as shown:
        shown.update(1000, 0.25)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar() -> None:
    code = "from data_prep.progress import Progress\nwith Progress('wrote') as p: p.update(1234, 0.5)"
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", code], stderr=theirs, cwd=REPOSITORY, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    said = b""
    try:
        while block := os.read(ours, 1024):
            said += block
    except OSError:  # how Linux says that the other side is closed
        pass
    assert run.wait() == 0
    assert b"wrote 1,234 records" in said and "━".encode() in said
