"""The commands as a user types them."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import png
from tiny_run import write_recipe

from pipeline.__main__ import main
from pipeline.errors import REQUEUE_EXIT
from pipeline.results.trace import models
from pipeline.results.trace.terminal import printable

ROOT = Path(__file__).parents[2]


def test_help_needs_no_torch():
    script = "import sys, pipeline.__main__ as m\ntry: m.main(['evaluate', '--help'])\nexcept SystemExit: pass\n"
    script += "print('HEAVY', sorted({'torch', 'transformers', 'rich', 'pydantic'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in out
    assert "question_only" in out


@pytest.mark.parametrize("command", [[], ["status"], ["evaluate"], ["answer"], ["trace"]])
def test_every_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert f"python -m pipeline {' '.join(command) or 'evaluate'} " in capsys.readouterr().out


def test_evaluate_from_a_shell_is_quiet_and_writes_its_json(made, tmp_path):
    output = tmp_path / "e.json"
    command = ["-m", "pipeline", "evaluate", "--model", f"one={made.root}/student", "--data", str(made.held_out)]
    command += ["--max-new-tokens", "4", "--output", str(output)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(output.read_text())
    assert set(result) == {"one", "question_only"}
    assert {"exact_match", "perplexity", "samples", "by_type"} <= set(result["one"])
    for text in ("exact match", "perplexity", "question_only", "colour", "NFKC"):
        assert text in done.stdout


def test_trace_shows_three_models_both_ways(made, tmp_path, capsys):
    image = tmp_path / "tiles.png"
    image.write_bytes(png(seed=4))
    arguments = ["trace", "--run", str(made.run), "--image", str(image), "--question", "what is [bold]this?"]
    assert main([*arguments, "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    for text in ("teacher (5 layers)", "untouched (3 layers)", "distilled (3 layers)", "[image] what is [bold]this?"):
        assert text in out
    assert out.count("last") >= 6


def test_trace_of_a_sample_shows_the_datas_answer(made, capsys):
    assert main(["trace", "--run", str(made.run), "--sample", "s00003", "--max-new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "say it again?" in out and "expected  ab" in out


def test_trace_leaves_out_what_the_run_does_not_have_yet(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made.run / "verbalize", run / "verbalize")
    write_recipe(run, made.root)
    (run / "verbalize" / "teacher.safetensors").unlink()
    assert main(["trace", "--run", str(run), "--sample", "s00001", "--max-new-tokens", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "untouched (3 layers)" in out and "distilled (" not in out
    assert "teacher is left out: no" in out and "--stage 1" in out
    assert "distilled is left out: no" in out and f"--stage 2 --recipe {run}/recipe.yaml" in out.replace("- ", "-")


def test_trace_without_teacher_needs_none(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    (run / "verbalize" / "teacher.safetensors").unlink()
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"{made.root}/teacher", f"{tmp_path}/gone"))
    arguments = ["trace", "--run", str(run), "--sample", "s00003", "--max-new-tokens", "2", "--without-teacher"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "untouched (3 layers)" in out and "distilled (3 layers)" in out and "teacher" not in out


def test_students_are_shown_where_the_teacher_fails(made, tmp_path, capsys):
    """The smallest models are traced first, and shown whatever becomes of the next."""
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    shutil.copy(run / "verbalize" / "student.safetensors", run / "verbalize" / "teacher.safetensors")
    assert main(["trace", "--run", str(run), "--sample", "s00003", "--max-new-tokens", "2"]) == 2
    captured = capsys.readouterr()
    assert "untouched (3 layers)" in captured.out and "distilled (3 layers)" in captured.out
    assert "teacher.safetensors holds verbalizers for other layers" in captured.err


@pytest.mark.parametrize("many", [False, True])
def test_what_smaller_models_said_is_written_before_the_next_one_loads(made, tmp_path, monkeypatch, many):
    """A kill, or the end of a job's time, while the teacher loads takes nothing away."""
    load, found = models.load_traced_model, []
    output, page = tmp_path / "t.json", tmp_path / ("pages" if many else "page.html")

    def load_and_look(model, *arguments):
        if output.is_file():
            text = (next(page.glob("00001_*.html")) if many else page).read_text()
            names = [one["name"] for one in json.loads(output.read_text())["questions"][-1]["models"]]
            assert all(name in text for name in names) and "teacher (" not in text
            found.append(names)
        return load(model, *arguments)

    monkeypatch.setattr(models, "load_traced_model", load_and_look)
    which = ["--limit", "2"] if many else ["--sample", "s00003"]
    arguments = ["trace", "--run", str(made.run), *which, "--max-new-tokens", "2", "--json", str(output)]
    assert main([*arguments, "--page", str(page)]) == 0
    assert [sorted(names) for names in found] == [["untouched"], ["distilled", "untouched"]]


def test_trace_refuses_what_does_not_fit_before_it_loads_anything(made, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.results.workers.available_cpu_memory", lambda: 1000)
    monkeypatch.setattr("pipeline.results.trace.models.load", None)
    assert main(["trace", "--run", str(made.run), "--sample", "s00003"]) == 2
    assert f"error: {made.root}/teacher: there is no GPU, and 1 x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "nowhere"], "nowhere is no run"),
        (["evaluate", "--model", "nowhere", "--data", "held_out"], "no model in nowhere"),
        (["evaluate", "--model", "teacher", "--data", "nowhere"], "manifest.json"),
        (["trace", "--run", "run"], "--image FILE and --question TEXT"),
        (["trace", "--run", "run", "--image", "nowhere", "--question", "?"], "--image nowhere: no such file"),
        (["trace", "--run", "run", "--sample", "nobody"], "not among the 10 keys of"),
        (["trace", "--run", "empty", "--sample", "s00001"], "nothing to trace yet"),
    ],
)
def test_mistakes_end_with_code_2_and_a_message(made, tmp_path, capsys, arguments, message):
    write_recipe(tmp_path / "empty", made.root)
    paths = {"held_out": made.held_out, "teacher": made.root / "teacher", "run": made.run, "empty": tmp_path / "empty"}
    assert main([str(paths.get(one, one)) for one in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert "Traceback" not in captured.err


def test_numbers_are_checked_by_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--batch-size", "0"])
    assert "expected a number from 1, found '0'" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"


SLOW_ANSWER = """
import sys, time
from pipeline import __main__ as program
def answer(_options):
    try:
        print("up", flush=True)
        time.sleep(60)
    finally:
        print("closed", flush=True)
program.COMMANDS["answer"] = answer
sys.exit(program.main(["answer", "--run", "r", "--output", "o"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signalled_answer_closes_what_it_holds_and_asks_to_be_started_again(number):
    command = [sys.executable, "-c", SLOW_ANSWER]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None and started.stdout.readline() == "up\n"
        started.send_signal(number)
        said, error = started.communicate(timeout=30)
    assert (started.returncode, said) == (REQUEUE_EXIT, "closed\n")
    assert error == (
        f"answer: stopped: got {number.name}; what is written is kept, and the same command goes on from there\n"
    )
