"""What is seen of a running step: the panel at two widths, short lines in a log, JSON, and nothing where asked."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.runtime.display import progress
from pipeline.runtime.display.loss_groups import loss_groups
from pipeline.runtime.display.progress import Pace, StepProgress, choose_output, say
from pipeline.runtime.display.training_panel import TrainingPanel, blocks
from pipeline.runtime.display.training_progress import TrainingProgress, UpdateView

ROOT = Path(__file__).parents[2]
STUDENT, TEACHER = (*range(2, 28, 4), 28), (*range(2, 80, 4), 80)
"""Target layers and the last layer of models of 28 and 80 layers."""
LOG_WIDTH = 160


@pytest.fixture
def output():
    yield choose_output
    choose_output(False, "text")


def of_verbalize(update: int) -> UpdateView:
    losses = {f"teacher/{layer}": 11 - layer / 10 - update / 50 for layer in TEACHER}
    losses |= {f"student/{layer}": 12 - layer / 10 - update / 50 for layer in STUDENT}
    return UpdateView(losses, 1_234_567.0, 0.031, 141_000_000_000)


def of_interact(update: int) -> UpdateView:
    losses = {f"layer/{layer}": 3 / update + layer / 100 for layer in STUDENT[:-1]} | {"last": 1 / update}
    match = [4 * place + 2 + 4 * (update % 2) for place in range(7)]
    return UpdateView(
        losses, 1234.5, 0.5, 2_000_000_000, match, 1, {"held_out_loss": 0.75, "held_out_exact_match": 0.5}
    )


def panel_of(view, updates: int) -> TrainingPanel:
    panel = TrainingPanel("interact", Pace(150, 0))
    for update in range(1, updates + 1):
        one = view(update)
        panel.add(one.followed, one.match, "   ".join(one.state()))
    return panel


def drawn(panel: TrainingPanel, width: int) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(panel)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("view", [of_verbalize, of_interact])
def test_the_panel_fits_the_terminal_and_shows_all(view, width):
    shown = drawn(panel_of(view, 40), width)
    assert max(map(len, shown.splitlines())) <= width and len(shown.splitlines()) < 20
    assert "0/150" in shown and "tokens/s   data" in shown and "…" not in shown
    for group in loss_groups(view(40).losses):
        (line,) = [line for line in shown.splitlines() if line.startswith(group.name)]
        assert f"{group.mean:.3f}" in line and (
            not group.layers or f"{group.layers[-1]}: {group.values[-1]:.3f}" in line
        )


def test_layers_that_follow_none_are_not_shown_with_a_loss_of_zero():
    losses = {f"layer/{layer}": 0.0 for layer in STUDENT[:-1]} | {"last": 0.5}
    view = UpdateView(losses, 1234.5, 0.5, 2_000_000_000, [None] * 7)
    assert view.text().startswith("last 0.500  1,234 tokens/s")
    assert "layer" not in view.values() and view.values()["last"] == 0.5 and view.values()["match"] == [None] * 7
    shown = drawn(panel_of(lambda _: view, 3), 80)
    assert "\nlast " in shown and "\nlayer " not in shown and "match" not in shown


def test_the_matches_are_counted():
    shown = drawn(panel_of(of_interact, 40), 80)
    assert "(2 to 30) of the last 40" in shown
    assert "2 → 2  │▒▒" in shown and "26 → 26 │      ▒▒│" in shown, "each of two teacher layers half of the time"


def test_a_layer_that_had_no_candidate_has_no_match():
    panel = TrainingPanel("interact", Pace(2, 0))
    panel.add({"layer/2": 1.0}, [None], "")
    assert "2 → -  ││" in drawn(panel, 80)


def test_blocks_are_means_from_the_lowest_to_the_highest():
    assert blocks([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert blocks([0, 0, 7, 7, 3, 4], 3) == "▁█▅"
    assert blocks([2.0, 2.0], 8) == "▁▁" and blocks([], 8) == ""


@pytest.mark.parametrize("view", [of_verbalize, of_interact])
def test_a_line_of_a_log_is_short_at_80_layers(view, capsys):
    step = TrainingProgress("verbalize", 150_000, 99_999, shown=True)
    step.advance(view(2))
    step.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("verbalize  100000/150000  eta ") and len(line) <= LOG_WIDTH


def test_a_line_has_the_shallowest_the_deepest_and_the_mean():
    line = UpdateView({"layer/2": 1.0, "layer/6": 2.0, "layer/10": 6.0, "last": 0.5}, 10.0, 0.25, 1500).text()
    assert line == "layer 2 1.000, 10 6.000, mean 3.000  last 0.500  10 tokens/s  data 25%  1.5 KB"


def test_nothing_moves_in_a_file_even_where_colours_are_forced(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "console", lambda: Console(highlight=False))
    assert progress.console().is_terminal and not progress.moves()


def test_a_log_of_objects(output, capsys):
    output(False, "json")
    step = TrainingProgress("interact", 2, 0, shown=True)
    for update in (1, 2):
        step.advance(of_interact(update))
    say("[bold] goes on")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("done") for line in lines] == [1, 2, None] and all(line["time"] > 1e9 for line in lines)
    assert lines[1]["layer"] == {"shallowest": 1.52, "deepest": 1.76, "mean": pytest.approx(1.64)}
    assert (lines[1]["step"], lines[1]["last"], lines[1]["match"][0]) == ("interact", 0.5, 2)
    assert lines[2]["message"] == "[bold] goes on"


def test_quiet_leaves_what_is_said_once(output, capsys):
    output(True, "text")
    StepProgress("cache", 1).advance("fast")
    TrainingProgress("interact", 1, 0, shown=True).advance(of_interact(1))
    say("interact: stopped")
    assert capsys.readouterr().out == "interact: stopped\n"


def test_other_ranks_print_nothing(capsys):
    TrainingProgress("interact", 1, 0, shown=False).advance(of_interact(1))
    assert capsys.readouterr().out == ""


PROGRAM = """
import sys
sys.path[:0] = ["tests/runtime"]
from test_training_progress import of_interact
from pipeline.runtime.display.progress import say
from pipeline.runtime.display.training_progress import TrainingProgress
step = TrainingProgress("interact", 150, 0, shown=True)
for update in range(1, 31):
    step.advance(of_interact(update))
say("a line between")
print("printed by a library")
step.close()
"""


def test_on_a_terminal_the_panel_is_drawn_and_lines_stand_above_it():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30", "PYTHONIOENCODING": "utf-8"}
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 2**16)
        except OSError:  # Linux: the other end is closed
            break
    os.close(ours)
    text = seen.decode()
    assert program.wait() == 0, text
    last = text[text.rindex("eta") :]
    assert "30/150" in text and "held out 0.750, 50.0% right" in last and "1 skipped" in last
    assert text.count("a line between") == text.count("printed by a library") == 1
    assert text.rindex("printed by a library") < text.rindex("30/150"), "the panel is below them"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is there again"
    assert text.count("eta") < 15, "30 updates at once are not 30 drawings"


def test_a_process_that_ends_in_the_middle_gives_the_cursor_back(monkeypatch, capsys):
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "console", lambda: Console(file=terminal, force_terminal=True))
    progress.show_cursor()
    assert terminal.getvalue() == "", "a file, whatever rich thinks of it"
    monkeypatch.setattr(progress, "moves", lambda: True)
    progress.show_cursor()
    assert terminal.getvalue() == "\x1b[?25h"


def test_the_pace_is_that_of_this_start(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace = Pace(100, 40)
    assert pace.eta() == "?"
    now[0], pace.done = 110.0, 50
    assert math.isclose(pace.left_s(), 50.0) and pace.eta() == "0:00:50"
