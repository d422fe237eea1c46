"""Traces of answers that changed: chosen by the evaluation, kept in the run, shown by its report without any model."""

from __future__ import annotations

import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.shards import ShardFolder
from pipeline.__main__ import main
from pipeline.results.trace.kept import as_markdown


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, as if evaluated: one sample went right, one was wrong in both, none went wrong."""
    run = tmp_path / "the run"
    shutil.copytree(made.run, run)
    keys = ShardFolder(made.held_out).keys
    result = {"exact_match": 0.5, "low": 0.1, "high": 0.9, "samples": 10, "read": 10, "data": str(made.held_out)}
    evaluation = {
        "untouched": {**result, "wrong": [keys[5], keys[3]], "identity": {"weights": "a"}},
        "distilled": {**result, "wrong": [keys[5]], "identity": {"weights": "b"}},
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


def report_of(run) -> str:
    assert main(["report", str(run)]) == 0
    return (run / "report.html").read_text()


def test_a_changed_answer_is_traced_into_the_run_and_its_report(run, made, capsys):
    keys = ShardFolder(made.held_out).keys
    command = f"python -m pipeline trace --run &#39;{run}&#39; --changed"
    before = report_of(run)
    assert command in before and "distilled says" not in before

    assert main(["trace", "--run", str(run), "--changed", "--max-new-tokens", "2"]) == 0
    assert f"python -m pipeline report {run}" in capsys.readouterr().out
    content = json.loads((run / "traces" / "changed.json").read_text())
    assert [one["key"] for one in content["traces"]] == [keys[3], keys[5]], "nothing went from right to wrong"
    for one in content["traces"]:
        assert (run / "traces" / one["page"]).is_file() and one["pictures"][0]["uri"].startswith("data:image/")
        assert {model["name"]: len(model["layers"]) for model in one["models"]} == {
            "teacher": 4, "untouched": 3, "distilled": 3,
        }  # fmt: skip
    board = EventAccumulator(str(run / "tensorboard" / "trace"))
    board.Reload()
    assert [tag for tag in board.Tags()["tensors"]] == [f"{key}/text_summary" for key in (keys[3], keys[5])]

    shutil.rmtree(run / "student")  # the report reads the run's files alone
    text = report_of(run)
    assert command not in text and text.count("distilled says") == 2
    assert (
        f'href="traces/{content["traces"][0]["page"]}"' in text and content["traces"][0]["pictures"][0]["uri"] in text
    )

    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["distilled"]["identity"] = {"weights": "c"}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = report_of(run)
    assert command in text and "distilled says" not in text, "a student that was trained anew is not that of the trace"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "RUN", "--changed", "--page", "x"], "leave out --model and --page"),
        (["--run", "RUN", "--changed", "--sample", "k"], "give a question"),
        (["--run", "BARE", "--changed"], "python -m pipeline evaluate --run"),
        (["--run", "EQUAL", "--changed"], "neither student was wrong"),
    ],
)
def test_what_cannot_be_traced_as_changed(run, made, tmp_path, capsys, arguments, message):
    equal = tmp_path / "equal"
    shutil.copytree(run, equal)
    evaluation = json.loads((equal / "evaluation.json").read_text())
    (equal / "evaluation.json").write_text(json.dumps({name: one | {"wrong": []} for name, one in evaluation.items()}))
    paths = {"RUN": run, "BARE": made.run, "EQUAL": equal}
    assert main(["trace", *(str(paths.get(one, one)) for one in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_a_kept_trace_as_markdown_is_text_and_no_markup():
    model = {"name": "distilled", "right": True, "layers": [["1", "a | <b>"], ["last", "star"]]}
    text = as_markdown({"question": "*what*?", "expected": None, "models": [model]})
    assert "<b>" not in text and "*what*" not in text and "| last | star |" in text
