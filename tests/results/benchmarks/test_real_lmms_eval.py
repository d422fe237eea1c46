"""The real lmms-eval on exported tiny students and a local task: make test-benchmarks, not in the default suite.

The task asks a student what `evaluate` asks it. Every second reference is the student's own greedy answer, so that the
share of right answers is neither 0 nor 1, and lmms-eval has to arrive at the same answers from pictures and prompts.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from tiny import png, turn, write_vlm
from tiny_run import write_shards
from transformers import AutoModelForImageTextToText

from data_prep.shards import ShardFolder
from pipeline.recipe.schema import Data
from pipeline.results.benchmarks.columns import BENCHMARKS
from pipeline.results.evaluate.answers import last_exchange
from pipeline.results.generate import decode_text, greedy, load, pad_left
from pipeline.vlm.export import save_student

pytestmark = pytest.mark.benchmarks

ROOT = Path(__file__).parents[3]
INSTALLED = ROOT / "build" / "lmms-eval"
SAMPLES, TOKENS = 12, 8
TASK = """task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function local_task.doc_to_visual
doc_to_text: !function local_task.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  do_sample: false
  until: []
process_results: !function local_task.{process}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
FUNCTIONS = """from pipeline.results.evaluate.answers import is_right


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"exact_match": float(is_right(results[0], doc["answer"]))}


def crash(doc, results):
    raise ValueError("this task crashes")
"""


def python(*words: object, check: int = 0) -> str:
    """Run `python ...` with lmms-eval on its path; returns what it printed."""
    assert INSTALLED.is_dir(), f"no {INSTALLED}: make test-benchmarks installs it"
    path = [ROOT, INSTALLED, ROOT / "tests" / "cpu_torchvision"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout + done.stderr


def exported(folder: Path, original: Path) -> Path:
    """The student that a run would export: other weights beside the original's files.

    Its matrices are larger than at initialisation, so that what it says depends on the picture.
    """
    model = AutoModelForImageTextToText.from_pretrained(original, dtype=torch.float32)
    weights = {name: 4 * weight if weight.ndim > 1 else weight for name, weight in model.state_dict().items()}
    save_student(model, weights, original, folder)
    return folder


def samples(answers: list[str]) -> list[tuple[str, dict, list[bytes]]]:
    """(key, record, images) of questions about noise."""
    made = []
    for index, answer in enumerate(answers):
        messages = [turn("user", "<image>", f"what is {index}?"), turn("assistant", answer)]
        record = {"id": str(index), "messages": messages, "provenance": {"source": "tests", "index": index}}
        made.append((f"s{index:05d}", record, [png(seed=index)]))
    return made


def own_answers(student: Path, data: ShardFolder) -> list[str]:
    """What the student answers, greedily."""
    vlm = load(student, Data(train=data.path))
    answers = []
    for index in range(len(data)):
        raw = data.read(index)
        exchange = last_exchange(raw.record, raw.images)
        prompt = vlm.encode_question(exchange.messages, exchange.images)
        (ids,) = greedy(vlm, pad_left([prompt], vlm.encoder.filler(), vlm.pad_id), TOKENS)
        answers.append(decode_text(vlm, ids))
    return answers


def write_task(folder: Path, name: str, data: ShardFolder, process: str = "score") -> None:
    """The samples as a task of lmms-eval: a YAML file, its functions, and a parquet file."""
    rows = [last_exchange(raw.record, raw.images) for raw in map(data.read, range(len(data)))]
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    columns = {
        "image": [{"bytes": row.images[0], "path": None} for row in rows],
        "question": [row.question for row in rows],
        "answer": [row.answer for row in rows],
    }
    path = folder.parent / f"{name}.parquet"
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    folder.mkdir(exist_ok=True)
    (folder / "local_task.py").write_text(FUNCTIONS)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=path, tokens=TOKENS, process=process))


DECLARED = """
import json, sys
from lmms_eval import utils
from lmms_eval.tasks import TaskManager
known = TaskManager("ERROR").task_index
found = {}
for name in sys.argv[1:]:
    path = known[name]["yaml_path"]
    config = utils.load_yaml_config(path, mode="simple")
    listed = config.get("metric_list") or config.get("aggregate_metric_list") or []
    found[name] = [metric["metric"] for metric in listed] + [one["name"] for one in config.get("filter_list", [])]
print("FOUND" + json.dumps(found))
"""


def test_lmms_eval_has_each_named_task_with_its_metric_and_filter():
    shown = python("-c", DECLARED, *(benchmark.task for benchmark in BENCHMARKS))
    declared = json.loads(shown.partition("FOUND")[2].splitlines()[0])
    for benchmark in BENCHMARKS:
        for key in benchmark.metrics:
            metric, chosen = key.split(",")
            assert metric in declared[benchmark.task]
            assert chosen == "none" or chosen in declared[benchmark.task]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the student, its held-out samples, and the tasks `same` and `crashes`."""
    root = tmp_path_factory.mktemp("benchmarks")
    student = exported(root / "student", write_vlm(root / "original", "llava", 3, 32))
    data = ShardFolder(write_shards(root / "asked", samples(["?"] * SAMPLES)))
    answers = own_answers(student, data)
    assert len(set(answers)) > SAMPLES // 2, "the answers do not depend on the pictures"
    mixed = [answer if index % 2 else f"not {answer}" for index, answer in enumerate(answers)]
    held_out = ShardFolder(write_shards(root / "held_out", samples(mixed)))
    write_task(root / "tasks", "same", held_out)
    write_task(root / "tasks", "crashes", held_out, process="crash")
    return root


def test_lmms_eval_and_evaluate_agree_and_a_crash_fails(made):
    common = ["-m", "pipeline", "evaluate", "--model", f"student={made / 'student'}"]
    python(*common, "--data", made / "held_out", "--max-new-tokens", TOKENS, "--batch-size", 1,
           "--output", made / "ours.json")  # fmt: skip
    ours = json.loads((made / "ours.json").read_text())["student"]
    benchmarks = [*common, "--include-path", made / "tasks", "--output", made / "theirs.json"]
    shown = python(*benchmarks, "--benchmarks", "crashes:exact_match,same:exact_match", check=2)
    print(shown)
    assert (
        "crashes:exact_match (task crashes): expected exact_match,none, but lmms-eval left no results (exit code 0)"
        in shown
    )
    assert "ValueError: this task crashes" in shown
    (found,) = json.loads((made / "theirs.json").read_text())["student"].values()
    assert found["score"] == ours["exact_match"] == 0.5
    assert (found["samples"], ours["samples"]) == (SAMPLES, SAMPLES)
    (lines,) = (made / "theirs" / "student").rglob("*_samples_same.jsonl")
    scored = [json.loads(line) for line in lines.read_text().splitlines()]
    wrong = sorted(f"s{one['doc_id']:05d}" for one in scored if not one["exact_match"])
    assert wrong == sorted(ours["wrong"])
    again = python(*benchmarks, "--benchmarks", "same:exact_match")
    print(again)
    assert "same:exact_match is kept: 0.5" in again


def test_the_class_for_qwen2_vl_scores_a_demo_model(made):
    """Its scores are its own: it puts a system turn before each question, and scales pictures to multiples of 28."""
    folder = made / "qwen"
    shutil.copytree(ROOT / "demo" / "models" / "puzzles" / "student", folder)
    output = made / "qwen.json"
    shown = python(
        "-m", "pipeline", "evaluate", "--model", f"demo={folder}", "--include-path", made / "tasks",
        "--benchmarks", "same:exact_match", "--limit", 4, "--output", output,
    )  # fmt: skip
    print(shown)
    found = json.loads(output.read_text())["demo"]["same:exact_match"]
    assert found["samples"] == 4
    assert 0 <= found["score"] <= 1
    assert "min_pixels=256,max_pixels=4096" in found["model_args"]
