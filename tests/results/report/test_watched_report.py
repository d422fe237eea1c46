"""Following a run: a page that reloads itself while it goes on, and one that does not at the end."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline.__main__ import main
from pipeline.results.report import watch as watching
from pipeline.runtime.folder import mark_done

RELOADS = '<meta http-equiv="refresh" content="7">'


@pytest.fixture
def run(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    return run


def follow(run, monkeypatch, *meanwhile) -> list[str]:
    """The pages that are there at each pause and at the end, where something happens in each pause."""
    pages, left = [], list(meanwhile)

    def sleep(seconds):
        assert seconds == 7
        pages.append((run / "report.html").read_text())
        left.pop(0)()

    monkeypatch.setattr(watching.time, "sleep", sleep)
    assert main(["watch", str(run), "--every", "7"]) == 0 and not left
    return [*pages, (run / "report.html").read_text()]


def update(run, number: int) -> None:
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": "interact", "update": number, "last": 1.0 / number, "update_s": 1.0}) + "\n")


def finish(run) -> None:
    for step in ("cache", "interact", "reinforce"):
        mark_done(run / step, {"updates": 3})


def test_a_run_is_followed_until_it_is_done(run, monkeypatch, capsys):
    pages = follow(run, monkeypatch, lambda: update(run, 1), lambda: update(run, 2), lambda: finish(run))
    assert [RELOADS in page for page in pages] == [True, True, True, False]
    assert ["update 1 of 3" in pages[1], "update 2 of 3" in pages[2], "3 updates" in pages[3]] == [True] * 3
    said = capsys.readouterr().out
    assert (
        "written again every 7 s" in said and f"is done. What is next: python -m pipeline evaluate --run {run}" in said
    )


def test_an_interrupt_ends_it_with_a_last_page(run, monkeypatch):
    def interrupt():
        update(run, 1)
        raise KeyboardInterrupt

    pages = follow(run, monkeypatch, interrupt)
    assert [RELOADS in page for page in pages] == [True, False] and "update 1 of 3" in pages[1]


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "nowhere")]) == 2
    assert "is no run" in capsys.readouterr().err
