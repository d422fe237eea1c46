"""`evaluate --benchmarks`: what it asks lmms-eval for, and what it takes for a score.

lmms-eval itself is a stand-in here: a program that leaves what the real one left once, on a tiny model and a local task
(lmms_eval_results.json, from lmms-eval 0.7.3, less the parts that are not read). The real one: make test-benchmarks.
"""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from running import tiny_recipe
from tiny import write_vlm

from pipeline.__main__ import main
from pipeline.errors import BenchmarkError, RecipeError
from pipeline.results.benchmarks.columns import BENCHMARKS, BY_NAME, asked_for
from pipeline.results.benchmarks.harness import PACKAGES, Place, Settings, command, place, run_to_log, versions
from pipeline.results.benchmarks.model_classes import CLASSES, model_arguments, model_class
from pipeline.results.benchmarks.outcome import LOG, outcome
from pipeline.results.benchmarks.table import paper_numbers
from pipeline.vlm.image_size import PixelLimits

ROOT = Path(__file__).parents[3]
RECORDED = Path(__file__).with_name("lmms_eval_results.json")
LOCAL = asked_for("puzzles_local:exact_match")[0]
STAND_IN = f"""#!{sys.executable}
import json, pathlib, sys
if sys.argv[1] == "-c":
    print(json.dumps(dict.fromkeys({PACKAGES!r}, "1")))
    sys.exit()
told = dict(zip(sys.argv[3:-1:2], sys.argv[4::2]))
print("lmms-eval begins", told["--tasks"])
if told["--tasks"] == "crashes":
    print("ValueError: no such data")
    sys.exit(0)  # as the real one does
results = json.loads(pathlib.Path({str(RECORDED)!r}).read_text())
for key in ("results", "versions"):
    results[key] = {{told["--tasks"]: results[key]["puzzles_local"]}}
folder = pathlib.Path(told["--output_path"]) / "tiny"
folder.mkdir()
(folder / "20261129_000000_results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def words(where: Place, benchmark=BY_NAME["ai2d"], **settings) -> str:
    chosen = Settings(Path("python"), **settings)
    return " ".join(command(chosen, "qwen2_vl", {"pretrained": "/m"}, benchmark, where, Path("out")))


def test_command_lines():
    start, end = "python -m lmms_eval --model qwen2_vl --model_args pretrained=/m", "--output_path out"
    assert words(Place(1, "cpu")) == (
        f"{start},device_map=cpu --tasks ai2d --batch_size 1 --device cpu {end} --log_samples"
    )
    assert words(Place(1, "auto"), limit=8, include_path=Path("tasks")) == (
        f"{start},device_map=auto --tasks ai2d --batch_size 1 --device cuda {end} "
        "--include_path tasks --limit 8 --log_samples"
    )
    # accelerate's processes choose their own GPUs: a device map would put all copies on one
    assert words(Place(8, "cuda")) == (
        "python -m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 8 --main_process_port 0 "
        "--mixed_precision no --dynamo_backend no -m lmms_eval --model qwen2_vl --model_args pretrained=/m "
        f"--tasks ai2d --batch_size 1 --device cuda {end} --log_samples"
    )
    # the task's own settings are temperature 0.2, with which lmms-eval's class for Qwen2-VL samples
    assert "--gen_kwargs temperature=0" in words(Place(1, "cuda"), BY_NAME["mmvet"])


def test_the_paper_s_columns_are_there_by_name():
    assert len(BENCHMARKS) == 17  # eleven and ten, four of them in both
    numbers = paper_numbers()
    printed = {name for of_model in numbers.values() for name in of_model}
    assert printed == set(BY_NAME)
    assert len(numbers["VLsI-2B"]) == 17
    assert numbers["VLsI-7B"]["mmvet"] == [75.2, 75.8]  # its tables contradict: both are shown
    assert [benchmark.task for benchmark in asked_for("mmb, mme,mmb")] == ["mmbench_en_dev", "mme"]
    with pytest.raises(RecipeError, match="no benchmark is named 'mmbench'; named ones are qbench, ai2d.*TASK:METRIC"):
        asked_for("ai2d,mmbench")


def test_the_page_has_the_table_and_the_families():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for one in BENCHMARKS:
        metrics, scale = " + ".join(f"`{key}`" for key in one.metrics), " x 100" if one.scale == 100 else ""
        judge = "yes" if one.judged else ""
        assert f"| `{one.name}` | {one.column} | `{one.task}` | {metrics}{scale} | {judge} | {one.note} |" in page
    assert all(f"`{family}`" in page for family in CLASSES)


def test_families_and_their_classes(tiny_models, tmp_path):
    qwen, llava = tiny_models["qwen2_vl", "student"], tiny_models["llava", "student"]
    assert model_class(qwen).name == "qwen2_vl"
    assert model_class(llava).name == "llava_hf"
    # the folder's own pixel limits, not those of lmms-eval's class
    assert model_arguments(qwen) == {"pretrained": str(qwen), "min_pixels": 784, "max_pixels": 3136}
    assert model_arguments(llava) == {"pretrained": str(llava)}
    # a run's come first, one by one
    limits = PixelLimits(largest=2000)
    assert model_arguments(qwen, limits) == {"pretrained": str(qwen), "min_pixels": 784, "max_pixels": 2000}
    assert model_arguments(llava, limits) == {"pretrained": str(llava)}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "idefics3"}')
    with pytest.raises(RecipeError, match="no model class that serves model_type 'idefics3'.*has some for gemma3"):
        model_class(other)
    comma = tmp_path / "a,b"
    shutil.copytree(llava, comma)
    with pytest.raises(RecipeError, match="link the folder under another name"):
        model_arguments(comma)


def test_without_gpus_there_is_one_process(tiny_models, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    folder = tiny_models["llava", "student"]
    assert place(folder, None) == Place(1, "cpu")
    with pytest.raises(RecipeError, match="--processes 2: lmms-eval runs several only on GPUs"):
        place(folder, 2)


def test_where_lmms_eval_is_missing_the_error_says_how_to_install_it(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'{"lmms-eval": null, "torch": "2", "torchvision": null, "transformers": "5", '
                      '"accelerate": "1", "datasets": "5"}\'\n')  # fmt: skip
    python.chmod(0o755)
    with pytest.raises(RecipeError, match="has no lmms-eval, torchvision. Install the extra `eval`.*--eval-python"):
        versions(python)
    with pytest.raises(RecipeError, match="is no Python interpreter"):
        versions(tmp_path / "nothing")


def left(folder: Path, log: str = "", **results) -> Path:
    """A run's folder as lmms-eval leaves it, with other results."""
    (folder / "tiny").mkdir(parents=True)
    (folder / LOG).write_text(log)
    recorded = json.loads(RECORDED.read_text())
    recorded["results"]["puzzles_local"] |= results
    (folder / "tiny" / "20261129_000000_results.json").write_text(json.dumps(recorded))
    return folder


def test_a_score_is_read_from_real_results(tmp_path):
    found = outcome(left(tmp_path / "a", **{"exact_match,none": 0.5}), LOCAL, 0)
    assert found["score"] == 0.5
    assert (found["samples"], found["of_samples"]) == (6, 8)
    assert found["task_versions"] == {"puzzles_local": 1.0}
    assert "exact_match_stderr_clustered,none" not in found["metrics"]  # it is "N/A"
    both = left(tmp_path / "b", **{"mme_perception_score,none": 1400.5, "mme_cognition_score,none": 300})
    recorded = json.loads(next(both.rglob("*.json")).read_text())
    recorded["results"] = {"mme": recorded["results"]["puzzles_local"]}
    next(both.rglob("*.json")).write_text(json.dumps(recorded))
    assert outcome(both, BY_NAME["mme"], 0)["score"] == 1700.5


@pytest.mark.parametrize(
    ("value", "said"), [(None, "is None"), (float("nan"), "is nan"), ("N/A", "is 'N/A'"), (True, "is True")]
)
def test_a_metric_without_a_number_fails_by_name(tmp_path, value, said):
    folder = left(tmp_path / "run", "loading\n\x1b[31mAPI said no\x1b[0m\n", **{"exact_match,none": value})
    with pytest.raises(BenchmarkError) as failed:
        outcome(folder, LOCAL, 0)
    for text in ("puzzles_local", f"exact_match,none {said}", "exact_match_stderr,none", f"{folder / LOG}", "API said"):
        assert text in str(failed.value)
    assert "\x1b" not in str(failed.value)


def test_a_crash_with_exit_code_0_and_a_missing_metric_fail(tmp_path):
    (tmp_path / LOG).write_text("ValueError: no such data\n")
    with pytest.raises(BenchmarkError, match=r"left no results \(exit code 0\)[\s\S]*no such data"):
        outcome(tmp_path, LOCAL, 0)
    with pytest.raises(BenchmarkError, match="accuracy,none is 'missing'; metrics with a number: exact_match,none"):
        outcome(left(tmp_path / "run"), asked_for("puzzles_local:accuracy")[0], 0)


def test_an_answer_that_lmms_eval_made_up_is_no_answer(tmp_path):
    log = "00:00 | ERROR | llava_hf:generate_until:96 - Error CUDA out of memory in generating\n" * 3
    with pytest.raises(BenchmarkError, match="3 samples or requests failed and were counted as answered: .*out of mem"):
        outcome(left(tmp_path / "run", log), LOCAL, 0)


def test_what_ends_us_ends_the_command_and_what_it_started(tmp_path):
    def leave(*_):
        raise SystemExit(75)

    before = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(SystemExit):
            run_to_log(["sh", "-c", "sleep 100 & echo $!; wait"], tmp_path / LOG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    grandchild = Path("/proc", (tmp_path / LOG).read_text().strip(), "stat")
    end = time.monotonic() + 10
    while grandchild.exists() and ") Z " not in grandchild.read_text():  # init may take its time to collect it
        assert time.monotonic() < end
        time.sleep(0.05)


def test_scores_are_kept_and_run_again_where_something_changed(stand_in, tmp_path, capsys, tiny_models):
    model = tmp_path / "model"
    shutil.copytree(tiny_models["llava", "student"], model)
    output = tmp_path / "out.json"

    def evaluate(benchmarks: str, *more: str) -> int:
        arguments = ["--model", f"ours={model}", "--eval-python", str(stand_in), "--output", str(output), *more]
        return main(["evaluate", "--benchmarks", benchmarks, *arguments])

    assert evaluate("one:exact_match") == 0
    first = json.loads(output.read_text())["ours"]["one:exact_match"]
    assert first["versions"]["lmms-eval"] == "1"
    assert "by lmms-eval 1, greedy" in capsys.readouterr().out
    # the second is new, the third crashes: the first is kept, the second found, and the exit code says that one failed
    assert evaluate("one:exact_match,crashes:accuracy,two:exact_match") == 2
    shown = capsys.readouterr()
    assert "one:exact_match is kept: 0" in shown.out
    assert "ours: crashes:accuracy (task crashes): expected accuracy,none" in shown.err
    assert "(exit code 0) (ValueError: no such data). The end of" in shown.err
    found = json.loads(output.read_text())["ours"]
    assert list(found) == ["one:exact_match", "two:exact_match"]
    assert found["one:exact_match"] == first
    # another model, and another limit: run again
    write_vlm(model, "llava", 3, 32, seed=99)
    assert evaluate("one:exact_match") == 0
    assert "run again: it was run with another weights" in capsys.readouterr().out
    assert evaluate("one:exact_match", "--limit", "6") == 0
    assert "run again: it was run with another limit" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava"])
def test_models_of_a_run_see_pictures_as_large_as_the_student_was_trained_on(
    kind, stand_in, tmp_path, tiny_models, capsys
):
    """All of them, as `evaluate` without --benchmarks does; a score under other limits is made again."""
    run = tmp_path / "run"
    run.mkdir()

    def asked(largest: int) -> list[str]:
        recipe = tiny_recipe(tmp_path, tiny_models, kind, tmp_path / "data", data={"max_pixels": largest})
        shutil.copy(recipe, run)
        assert (
            main(["evaluate", "--run", str(run), "--benchmarks", "one:exact_match", "--eval-python", str(stand_in)])
            == 0
        )
        found = json.loads((run / "benchmarks.json").read_text())
        assert list(found) == ["teacher", "untouched"]
        return [found[name]["one:exact_match"]["identity"]["model_args"] for name in found]

    first, second, said = asked(2000), asked(1000), capsys.readouterr().out
    if kind == "qwen2_vl":
        assert first == ['{"min_pixels": 784, "max_pixels": 2000}'] * 2
        assert second == ['{"min_pixels": 784, "max_pixels": 1000}'] * 2 and "with another model_args" in said
    else:
        assert first == second == ["{}"] * 2 and "class llava_hf takes no limits on pictures" in said


def test_a_judged_benchmark_without_a_key_is_refused_before_anything_is_run(
    stand_in, tmp_path, capsys, tiny_models, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("API_TYPE", raising=False)
    output = tmp_path / "out.json"
    arguments = ["--model", str(tiny_models["llava", "student"]), "--eval-python", str(stand_in)]
    assert main(["evaluate", "--benchmarks", "ai2d,mmvet,mmb", *arguments, "--output", str(output)]) == 2
    assert "mmvet, mmb: lmms-eval asks a model behind an API" in capsys.readouterr().err
    assert not output.with_suffix("").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data", "shards"], "--data speaks of a shard folder, and benchmarks bring"),
        (["--max-new-tokens", "8"], "--max-new-tokens speaks of a shard folder"),
        ([], "give --output FILE.json"),
        (["--output", "scores"], "expected a name that ends in .json"),
        (["--output", "x.json", "--batch-size", "4"], "class llava_hf for .* takes samples one at a time"),
    ],
)
def test_command_lines_that_are_none(more, said, tiny_models, capsys):
    model = str(tiny_models["llava", "student"])
    assert main(["evaluate", "--model", model, "--benchmarks", "ai2d", *more]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_benchmark_options_without_benchmarks(capsys):
    assert main(["evaluate", "--include-path", "tasks"]) == 2
    assert "--include-path goes with --benchmarks" in capsys.readouterr().err


def test_an_output_of_something_else_is_not_overwritten(stand_in, tmp_path, capsys, tiny_models):
    output = tmp_path / "out.json"
    output.write_text('{"ours": {"exact_match": 0.5}}')
    arguments = ["--model", str(tiny_models["llava", "student"]), "--eval-python", str(stand_in)]
    assert main(["evaluate", "--benchmarks", "ai2d", *arguments, "--output", str(output)]) == 2
    assert "expected no file or the scores of earlier benchmarks" in capsys.readouterr().err
