"""A check that fails, hangs or does not fit into the time is shown as such, and the others run."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import run
from bench.gpu.figures import Figure, Report
from bench.gpu.jobs import Job, run_together
from bench.gpu.plan import Check, checks_for

ADD = "import sys; from pathlib import Path; from bench.gpu.figures import Report; report = Report(Path(sys.argv[1])); "
GOOD = ADD + "report.add('share', 3, '%', ('under', 2.0), 'the CPU 4')"
CRASH = ADD + "report.add('early', 1); raise ValueError('no such luck')"
# A hanging check with a child that would outlive it, which tells its number.
HANG = ADD + (
    "import subprocess, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
    "report.add('child', child.pid); time.sleep(99)"
)


def jobs(folder: Path, limit_s: float = 60.0, **programs: str) -> list[Job]:
    return [
        Job(name, [sys.executable, "-c", program, str(folder / name)], limit_s, folder / name)
        for name, program in programs.items()
    ]


def is_alive(pid: int) -> bool:
    """A killed child whose parent is gone may be left as a zombie where nobody reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_crash_keeps_what_was_found_and_says_why(tmp_path):
    ended = {one.name: one for one in run_together(jobs(tmp_path, good=GOOD, crash=CRASH), {})}
    assert (ended["good"].status, ended["good"].failed) == ("ok", False)
    assert ended["good"].figures == (Figure("share", 3.0, "%", ("under", 2.0), "the CPU 4"),)
    assert (ended["crash"].status, ended["crash"].failed) == ("failed: exit code 1", True)
    assert [figure.name for figure in ended["crash"].figures] == ["early"]
    assert ended["crash"].notes == ("last line: ValueError: no such luck",)
    found = json.loads((tmp_path / "crash").read_text())
    assert found["status"] == "failed: exit code 1" and "no such luck" in found["output"]


def test_a_check_that_hangs_is_ended_with_all_its_processes(tmp_path):
    hang, good = jobs(tmp_path, hang=HANG, good=GOOD)
    hang = Job(hang.name, hang.command, 15.0, hang.output)
    ended = {one.name: one for one in run_together([hang, good], {})}
    assert ended["good"].status == "ok"
    assert (ended["hang"].status, ended["hang"].failed) == ("timed out after 15 s", True)
    (child,) = ended["hang"].figures
    assert not is_alive(int(child.value))


def test_who_stops_early_ends_the_jobs(tmp_path):
    running = run_together(jobs(tmp_path, hang=HANG, good=GOOD), {})
    assert next(running).name == "good"
    end = time.monotonic() + 30
    while not (found := tmp_path / "hang").is_file() or not json.loads(found.read_text())["figures"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    child = int(json.loads(found.read_text())["figures"][0]["value"])
    assert is_alive(child)
    running.close()
    assert not is_alive(child)


def test_the_whole_program_goes_on_shows_and_fails(tmp_path, monkeypatch, capsys):
    programs = {"crash": CRASH, "good": GOOD, "late": GOOD}
    groups = [[Check("crash", 60, 0)], [Check("good", 60, 0)], [Check("late", 60, 1000)]]
    monkeypatch.setattr(run, "checks_for", lambda device, only: groups)
    monkeypatch.setattr(
        run, "_command", lambda check, *_: [sys.executable, "-c", programs[check.name], f"{tmp_path}/{check.name}.json"]
    )
    (tmp_path / "late.json").write_text("of an earlier run")
    assert run.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "5"]) == 1
    table = (tmp_path / "table.md").read_text()
    assert "failed: crash." in table
    assert "| crash | failed: exit code 1 |" in table and "|  | early | 1 |" in table
    assert "|  | share | 3 % | under 2.0 | NO | the CPU 4 |" in table
    assert "| late | left out: " in table and "it needs 1000 |" in table
    assert not (tmp_path / "late.json").exists()
    assert "no such luck" in capsys.readouterr().out
    groups[0].clear()
    assert run.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "5"]) == 0, "a missed goal is no failure"


def test_a_machine_without_cuda_is_told_of_the_twin(monkeypatch, capsys):
    monkeypatch.setattr(run, "has_cuda", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run.main([])
    assert stopped.value.code == 2
    assert "torch finds no CUDA device. The twin for a CPU: make check-gpu DEVICE=cpu" in capsys.readouterr().err


def test_only_names_checks(capsys):
    assert [[check.name for check in group] for group in checks_for("cuda", ["demo", "steps:real-2b"])] == [
        ["demo"],
        ["steps:real-2b"],
    ]
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu", "--only", "demos"])
    assert "--only demos: expected some of card, tests, prepare, demo, losses, steps:tiny" in capsys.readouterr().err


def test_a_checks_processes_know_their_device(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    card, twin = run.environment("cuda"), run.environment("cpu")
    assert (card["DS_ACCELERATOR"], card["CUDA_VISIBLE_DEVICES"], card["TRITON_INTERPRET"]) == ("cuda", "3", "0")
    assert (twin["DS_ACCELERATOR"], twin["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert run.environment("cuda")["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_refused(value, tmp_path):
    report = Report(tmp_path / "report.json")
    with pytest.raises(ValueError, match="ratio is (nan|inf): expected a finite number"):
        report.add("ratio", value)
    assert json.loads(os.fsdecode((tmp_path / "report.json").read_bytes()))["figures"] == []


def test_a_goal_may_have_two_limits():
    goal = ("between", 0.85, 1.15)
    assert [Figure("x", value, goal=goal).met() for value in (0.84, 0.85, 1.15, 1.16)] == [False, True, True, False]
    assert Figure("x", 1.0, goal=goal).goal_text() == "between 0.85 and 1.15"
    assert Figure("x", 1.0, goal=("at most", 2)).goal_text() == "at most 2" and Figure("x", 1.0).goal_text() == ""
