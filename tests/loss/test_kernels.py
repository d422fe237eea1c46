"""Which kernels are used: what is asked for, what the check against plain torch finds, and what all ranks agree on.

The kernels here are plain torch in the place of the Triton kernel, right or deliberately wrong: the check then runs
without Triton. test_softmax_kernel.py runs it on the real one.
"""

import re
import subprocess
import warnings
from types import SimpleNamespace

import pytest
import torch

from pipeline.errors import RecipeError
from pipeline.loss import kernels
from pipeline.loss.kernel_check import VOCAB, difference
from pipeline.loss.kernels import Choice

TRITON, TORCH = Choice("triton", "it agrees"), Choice("torch", "no GPU")
FAILED = Choice("torch", "it differs", failed=True)


@pytest.fixture(autouse=True)
def as_at_the_start(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels.use(None)
    kernels._own_choice.cache_clear()
    yield
    kernels.use(None)
    kernels._own_choice.cache_clear()


def right_kernel(**other):
    """The kernel's two functions in float32, as it computes them; `other` replaces one of them."""

    def logits_and_slope(products, head):
        logits = head.scale_and_cap_(products.to(torch.float32, copy=True))
        return logits, head.scale * (1 if head.softcap is None else 1 - (logits / head.softcap) ** 2)

    def exp_without_top_(products, head):
        logits, slope = logits_and_slope(products, head)
        top, top_id = logits.max(1, keepdim=True)
        products.copy_(((logits - top).exp() * slope).scatter(1, top_id, 0.0))
        return top_id, top - logits.logsumexp(1, keepdim=True), top

    def softmax_minus_label_(products, head, labels):
        logits, slope = logits_and_slope(products, head)
        one = torch.full_like(logits[:, :1], -1.0)
        products.copy_(logits.softmax(1).scatter_add(1, labels[:, None], one) * slope)
        return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]

    return SimpleNamespace(
        **{"exp_without_top_": exp_without_top_, "softmax_minus_label_": softmax_minus_label_, **other}
    )


def wrong_kernels():
    right = right_kernel()

    def without_last_id(products, head, labels):  # as a mask that ends too early would
        log_q = right.softmax_minus_label_(products, head, labels)
        products[:, VOCAB - 1] = 0
        return log_q

    def without_slope(products, head):
        flat = SimpleNamespace(scale=head.scale, softcap=None, scale_and_cap_=head.scale_and_cap_)
        return right.exp_without_top_(products, flat)

    def with_nan(products, head, labels):
        log_q = right.softmax_minus_label_(products, head, labels)
        products[1, 7] = torch.nan
        return log_q

    def with_another_id(products, head):
        top_id, *rest = right.exp_without_top_(products, head)
        return 10**9 + top_id, *rest

    def with_wrong_log_q(products, head):
        top_id, log_q, top = right.exp_without_top_(products, head)
        return top_id, log_q + 1e-3, top

    return [
        ("gradient of cross-entropy", right_kernel(softmax_minus_label_=without_last_id)),
        ("gradient of cross-entropy", right_kernel(softmax_minus_label_=with_nan)),
        ("exp.logit - largest. at scale 1.7, soft-cap 4.0", right_kernel(exp_without_top_=without_slope)),
        ("logit of the most likely id", right_kernel(exp_without_top_=with_another_id)),
        ("log-probability of the most likely id", right_kernel(exp_without_top_=with_wrong_log_q)),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_right_kernel_passes_the_check(dtype):
    assert difference(right_kernel(), "cpu", dtype) is None
    choice = kernels.check(right_kernel, "cpu", dtype)
    assert (choice.name, choice.failed) == ("triton", False) and str(dtype) in choice.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("what", "kernel"), wrong_kernels(), ids=[what for what, _ in wrong_kernels()])
def test_a_wrong_kernel_is_left_for_plain_torch_and_both_numbers_are_said(what, kernel, dtype):
    choice = kernels.check(lambda: kernel, "cpu", dtype)
    assert (choice.name, choice.failed) == ("torch", True)
    assert re.search(rf"differs from plain torch in (the )?{what}.*: \S+, plain torch \S+$", choice.reason)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set knobs."),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),  # no Python.h, or a compiler that is broken
        FileNotFoundError(2, "No such file or directory", "/no/cc"),  # CC names what is not there
    ],
)
def test_a_missing_compiler_is_named_with_what_to_install(error):
    def load():
        raise error

    choice = kernels.check(load, "cpu", torch.bfloat16)
    assert (choice.name, choice.failed) == ("torch", True)
    assert (
        "no C compiler" in choice.reason
        and "apt install gcc python3-dev" in choice.reason
        and "set CC" in choice.reason
    )
    assert type(error).__name__ in choice.reason


def test_what_triton_itself_raises_without_a_compiler_is_understood(monkeypatch, tmp_path):
    build = pytest.importorskip("triton.runtime.build", reason="Triton is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found = kernels.check(lambda: build._build("x", "", str(tmp_path), [], [], [], []), "cpu", torch.bfloat16)
    assert "no C compiler" in found.reason


def test_another_error_is_told_in_its_own_words():
    def load():
        raise ImportError("libcuda.so.1: cannot open\nmore")

    reason = kernels.check(load, "cpu", torch.bfloat16).reason
    assert reason == "the Triton kernel did not run (ImportError: libcuda.so.1: cannot open)"


def test_the_environment_goes_before_the_recipe(monkeypatch):
    assert kernels.setting("torch") == ("torch", "kernels: torch in the recipe")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    assert kernels.setting("torch") == ("triton", "VLSI_KERNELS=triton in the environment")
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(RecipeError, match="VLSI_KERNELS=cuda: expected one of auto, torch, triton"):
        kernels.setting("torch")


def test_what_is_found_without_a_check(monkeypatch):
    assert kernels.find("torch", "cuda:3", torch.bfloat16) == Choice("torch", "as asked for")
    assert "no CUDA GPU, but cpu" in kernels.find("auto", "cpu", torch.bfloat16).reason
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    missing = kernels.find("auto", "cuda:3", torch.bfloat16)
    assert missing.name == "torch" and "pip install triton" in missing.reason and not missing.failed
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels, "check", lambda load, device, dtype: Choice("triton", f"{device} {dtype}"))
    assert kernels.find("auto", "cuda:3", torch.float32) == Choice("triton", "cuda:3 torch.float32")


def test_all_ranks_use_the_same_and_the_reason_names_the_rank():
    assert kernels.settle([TRITON, TRITON]) == TRITON
    assert kernels.settle([TORCH, TORCH]) == TORCH
    assert kernels.settle([TRITON, FAILED, TRITON]) == Choice("torch", "rank 1: it differs", failed=True)
    assert kernels.settle([TRITON, TORCH]) == Choice("torch", "rank 1: no GPU", failed=True)
    assert kernels.settle([FAILED]) == FAILED


def test_triton_asked_for_is_refused_where_it_cannot_be_used(monkeypatch):
    with pytest.raises(RecipeError, match="kernels: triton in the recipe, but .*: rank 1: it differs. .*auto or torch"):
        kernels.settle([TRITON, FAILED], "triton")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    with pytest.raises(RecipeError, match="VLSI_KERNELS=triton in the environment, but .* cannot be used: no GPU"):
        kernels.settle([TORCH])
    assert kernels.settle([TRITON]) == TRITON


def test_a_program_that_did_not_choose_checks_once_and_warns_once(monkeypatch):
    weight, asked = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda:0"), []
    monkeypatch.setattr(kernels, "find", lambda *arguments: asked.append(arguments) or FAILED)
    with pytest.warns(RuntimeWarning, match="kernels: torch: it differs") as warned:
        assert not kernels.fused(weight) and not kernels.fused(weight)
    assert asked == [("auto", "cuda:0", torch.bfloat16)] and len(warned) == 1


def test_what_a_job_chose_holds_for_every_head_that_fits():
    kernels.use(TRITON)
    with warnings.catch_warnings(action="error"):
        assert kernels.fused(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda:0"))
    assert not kernels.fused(torch.zeros(1))
    assert not kernels.fused(SimpleNamespace(is_cuda=True, dtype=torch.float64, device="cuda:0"))
    kernels.use(TORCH)
    assert not kernels.fused(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda:0"))
