"""What matters when models are large and evaluations long: order, resuming, and several processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from running import ROOT, python
from safetensors.torch import load_file, save_file
from tiny_run import write_recipe

from pipeline.__main__ import main
from pipeline.errors import CacheError, DataError, RecipeError
from pipeline.results import workers
from pipeline.results.evaluate import evaluation
from pipeline.results.evaluate.comparison import QUESTIONS
from pipeline.results.evaluate.earlier import earlier_results, questions_of
from pipeline.results.evaluate.evaluation import evaluate
from pipeline.results.evaluate.plan import make_plan

SIZES = {"limit": 6, "batch_size": 2, "max_new_tokens": 4}


def plan_of(made, output: Path, models: tuple[str, ...] = (), run: bool = True, **changes):
    data = None if run else made.held_out
    return make_plan(list(models), made.run if run else None, data, None, output, **(SIZES | changes))


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Names of the folders of which a model was loaded."""
    folders: list[str] = []
    load = evaluation.load_scorer

    def load_and_note(folder, *more):
        folders.append(folder.name if folder.parent.name != "run" else "distilled")
        return load(folder, *more)

    monkeypatch.setattr(evaluation, "load_scorer", load_and_note)
    return folders


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    """The output of an evaluation that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "evaluation.json"
    evaluate(plan_of(made, output))
    return output


@pytest.fixture
def output(whole, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(whole, tmp_path / "evaluation.json"))


def test_the_number_of_processes_changes_no_byte_of_the_results(made, tmp_path):
    written = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.json"
        python(
            "-m", "pipeline", "evaluate", "--model", f"one={made.root}/teacher", "--model", f"two={made.root}/student",
            "--data", made.held_out, "--batch-size", 2, "--max-new-tokens", 4, "--processes", processes,
            "--output", output,
        )  # fmt: skip
        written.append(output.read_bytes())
    assert written[0] == written[1]
    assert json.loads(written[0])["one"]["read"] == 10


def test_the_smallest_model_comes_first_and_its_result_outlives_a_failure_of_the_next(made, tmp_path, loaded, whole):
    output = tmp_path / "evaluation.json"
    plan = plan_of(made, output)
    weights = made.root / "teacher" / "model.safetensors"
    away = weights.rename(weights.with_suffix(".away"))
    try:
        with pytest.raises(CacheError, match=r"teacher: expected weights as \*.safetensors"):
            evaluate(plan)
    finally:
        away.rename(weights)
    assert loaded == ["student", "distilled"]
    assert list(json.loads(output.read_text())) == ["untouched", "distilled", "question_only"]
    loaded.clear()
    evaluate(plan)
    assert loaded == ["teacher"]
    assert output.read_bytes() == whole.read_bytes()


def test_a_killed_evaluation_goes_on_with_the_same_command(made, tmp_path, whole):
    output = tmp_path / "evaluation.json"
    command = ["-m", "pipeline", "evaluate", "--run", str(made.run), "--output", str(output)]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and len(models_in(output)) < 1:
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = models_in(output)
    assert kept, "the first model's result was not written before the end"
    said = python(*command)
    assert f"kept from {output}: {', '.join(kept)}" in said
    assert output.read_bytes() == whole.read_bytes()
    assert "distilled" in said.split("exact match by question type")[1], "the table shows all"


def models_in(output: Path) -> list[str]:
    return [name for name in json.loads(output.read_text()) if name != "question_only"] if output.exists() else []


def test_a_result_of_another_question_or_model_is_made_again(made, output, loaded, capsys, tmp_path):
    evaluate(plan_of(made, output))
    assert loaded == []
    evaluate(plan_of(made, output, batch_size=5))
    assert loaded == [], "the batch size changes rounding only"
    changed = tmp_path / "changed"
    shutil.copytree(made.root / "student", changed)
    weights = load_file(changed / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, changed / "model.safetensors", {"format": "pt"})
    evaluate(plan_of(made, output, models=(f"untouched={changed}",)))
    assert loaded == ["changed"]
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"untouched is evaluated again: {output} has it with another weights" in said
    loaded.clear()
    evaluate(plan_of(made, output, limit=4))
    assert loaded == ["student", "distilled", "teacher"]
    assert "has it with another samples" in capsys.readouterr().out
    assert {result["read"] for result in json.loads(output.read_text()).values() if "read" in result} == {4}


def test_a_kept_result_with_too_many_rejects_is_refused(made, output):
    results = json.loads(output.read_text())
    results["teacher"]["rejected"] = [{"key": "k", "shard": "s", "reason": "r"}] * 2
    output.write_text(json.dumps(results))
    with pytest.raises(DataError, match="2 of 6 samples could not be used"):
        evaluate(plan_of(made, output))


def test_an_output_that_is_something_else_is_left_alone(made, tmp_path):
    output = tmp_path / "recipe.json"
    for content in ("run: x", '{"format": "vlsi-shards"}', "[]"):
        output.write_text(content)
        with pytest.raises(RecipeError, match=r"recipe.json: expected no file or the results of an earlier evaluation"):
            evaluate(plan_of(made, output))
        assert output.read_text() == content


def test_without_teacher_none_is_needed_and_its_earlier_result_stays(made, output, tmp_path, loaded, capsys):
    elsewhere = tmp_path / "elsewhere"
    write_recipe(elsewhere, made.root)
    recipe = elsewhere / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"{made.root}/teacher", f"{tmp_path}/gone"))
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    assert main(["evaluate", "--run", str(elsewhere), "--without-teacher", *sizes]) == 0
    assert list(json.loads((elsewhere / "evaluation.json").read_text())) == ["untouched", "question_only"]
    loaded.clear()
    teacher = json.loads(output.read_text())["teacher"]
    assert main(["evaluate", "--run", str(elsewhere), "--without-teacher", "--output", str(output), *sizes]) == 0
    results = json.loads(output.read_text())
    assert loaded == [] and results["teacher"] == teacher
    assert "teacher" in capsys.readouterr().out.split("6 of 10 samples")[-1]
    with pytest.raises(RecipeError, match="--without-teacher leaves out a run's teacher, and there is no --run"):
        plan_of(made, output, models=(str(made.root / "student"),), run=False, without_teacher=True)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(made, tmp_path, loaded, monkeypatch):
    size = workers.Machine().weights(made.root / "teacher")
    monkeypatch.setattr(workers, "available_cpu_memory", lambda: size - 1)
    with pytest.raises(RecipeError, match=rf"{made.root}/teacher: there is no GPU, and 1 x .* GB of weights exceed"):
        evaluate(plan_of(made, tmp_path / "evaluation.json"))
    assert loaded == []


def test_a_result_with_a_limit_that_this_command_has_not_is_measured_again(made, output):
    results = json.loads(output.read_text())
    results["teacher"]["identity"]["pixels"] = "any to 3136"
    results["other"] = results["teacher"]
    output.write_text(json.dumps(results))
    assert set(earlier_results(plan_of(made, output))) == {"untouched", "distilled"}


def test_what_is_asked_has_the_names_by_which_results_are_compared(made, output):
    plan = plan_of(made, output)
    limits = plan.limits.model_copy(update={"max_pixels": 3136})
    assert set(questions_of(replace(plan, limits=limits))) == set(QUESTIONS)
