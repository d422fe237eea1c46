"""What the checks of a GPU compute: the idle share, the dearest kernels, Trainer's batch, errors against float64."""

import mmap
import random

import pytest
import torch

from bench.gpu import accuracy
from bench.gpu.device import Device
from bench.gpu.figures import Report
from bench.gpu.profiles import DEAREST, covered, dearest, profiled, ran
from bench.gpu.shapes import TWIN
from bench.gpu.trainer import micro_batch
from bench.steps import pairs
from pipeline.recipe.resolve import load_recipe
from pipeline.steps.reinforce import Finetuned
from pipeline.vlm.assemble import vocabulary_rows
from pipeline.vlm.backbone import load_student
from pipeline.vlm.processing import Batch

CPU = Device("cpu")


def test_the_busy_time_is_the_union_of_the_kernels():
    draw = random.Random(0)
    for _ in range(50):
        spans = [
            (begin, begin + draw.randint(0, 9)) for begin in (draw.randint(0, 60) for _ in range(draw.randint(0, 9)))
        ]
        assert covered(spans) == len({second for begin, end in spans for second in range(begin, end)})


def test_the_dearest_kernels_are_those_with_the_most_time_in_all():
    events = [("one long", 50.0), *[("many short", 10.0)] * 9, *((f"other {i}", 1.0) for i in range(20))]
    found = dearest(events)
    assert len(found) == DEAREST
    assert found[0] == {"name": "many short", "ms": 0.09, "share": 0.5625, "calls": 9}
    assert found[1]["name"] == "one long"


def test_a_profile_sees_the_product_and_the_pause():
    left = torch.randn(400, 400)
    found = profiled(CPU, lambda: left @ left, seconds=10.0)
    assert any(kernel["name"] == "aten::mm" for kernel in found["kernels"])
    assert found["wall_ms"] == 10_000 and 0.9 < found["idle_share"] < 1


def test_trainers_batch_has_our_loss(tmp_path):
    """The model's own loss on it, a mean over the response tokens, is that of our finetuning step."""
    pairs.prepare("tiny", tmp_path, "cpu")
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    student = load_student(recipe.student.path, torch.float32, recipe, recipe.reinforce)
    inputs = micro_batch(recipe, torch.float32)
    labels = inputs.pop("labels")
    positions = (labels.flatten() != -100).nonzero()[:, 0] - 1
    batch = Batch(inputs, positions, labels[labels != -100], (), ())
    with torch.no_grad():
        ours = Finetuned(student, vocabulary_rows(recipe.student.path))(batch) / len(batch.labels)
        theirs = student(**inputs, labels=labels).loss
    assert len(batch.labels) > 0
    torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-5)


def test_the_losses_pass_and_a_wrong_one_is_caught(tmp_path, monkeypatch):
    accuracy.add_accuracy(report := Report(tmp_path / "right.json"), CPU, TWIN)
    assert [figure.met() for figure in report.figures] == [True] * len(accuracy.DTYPES)

    def off_by_two_percent(inputs):
        loss, *gradients = accuracy.cross_entropy(inputs)
        return loss, *(1.02 * gradient for gradient in gradients)

    monkeypatch.setitem(accuracy.LOSSES, "cross-entropy", (off_by_two_percent, accuracy.dense_cross_entropy))
    with pytest.raises(RuntimeError, match=r"cases have a larger error than is allowed, such as \w+, cross-entropy, "):
        accuracy.add_accuracy(report := Report(tmp_path / "wrong.json"), CPU, TWIN)
    assert len(report.figures) == len(accuracy.DTYPES), "all dtypes are known first"
    assert False in [figure.met() for figure in report.figures]


def test_the_cpus_peak_is_of_what_was_measured():
    CPU.reset_peak()
    before = CPU.used_bytes()
    with mmap.mmap(-1, 2**25) as pages:  # 32 MiB, gone at once; a tensor could lie in pages that the process has kept
        pages.write(b"1" * 2**25)
    peak = CPU.peak_bytes() - before
    CPU.reset_peak()
    assert peak > 2**24
    assert CPU.peak_bytes() - CPU.used_bytes() < 2**24


def test_the_kernels_of_a_call_are_told_by_name():
    left = torch.randn(8, 8)
    assert "aten::mm" in ran(CPU, lambda: left @ left)
    assert "aten::mm" not in ran(CPU, lambda: left + left)
