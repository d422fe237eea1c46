"""The fused kernel against plain torch. It runs in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0.

These tests need Triton. The kernel is used only where Triton is installed.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from dense_losses import as_dtype, assert_as_accurate, dense_ce, dense_kl, dense_logits, make_h, make_head, topk_signal

from pipeline.loss import kernels
from pipeline.loss.kernel_check import difference
from pipeline.loss.linear_ce import linear_cross_entropy
from pipeline.loss.sparse_kl import kl_matrix, matched_kl
from pipeline.signal import Unembedding

pytest.importorskip("triton", reason="the kernel is used only where Triton is installed")
from pipeline.loss import softmax_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract"),  # lanes beyond the vocabulary
]
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
ATOL = 1e-6 if DEVICE == "cpu" else 5e-6
"""On a card exp and division are approximate by two units in the last place each."""
HEADS = [{}, {"padding": 5, "bias": True}, {"scale": 0.3}, {"scale": 1.7, "softcap": 4.0}]


def on_device(head):
    bias = None if head.bias is None else head.bias.to(DEVICE)
    return Unembedding(head.weight.to(DEVICE), head.vocab, bias, head.scale, head.softcap)


def products_and_logits(vocab, options, dtype):
    """(head, the kernel's input, the logits of that input in float64, the slope in float64)."""
    head = on_device(make_head(vocab, 6, dtype, **options))
    products = head.products(make_h(3, 6, dtype=dtype).to(DEVICE))
    identity = Unembedding(torch.eye(vocab, dtype=torch.float64, device=DEVICE), vocab, None, head.scale, head.softcap)
    logits = dense_logits(products.double(), identity)
    return head, products, logits, head.scale * (1 if head.softcap is None else 1 - (logits / head.softcap) ** 2)


CASES = [
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32]),
    pytest.mark.parametrize("options", HEADS, ids=str),
    pytest.mark.parametrize("vocab", [1, 83, 4096, 9001]),
]


def every_case(test):
    for mark in CASES:
        test = mark(test)
    return test


@every_case
def test_exponentials_without_the_most_likely_id(vocab, options, dtype):
    head, products, logits, slope = products_and_logits(vocab, options, dtype)
    top_id, top_log_q, top = softmax_kernel.exp_without_top_(products, head)
    torch.testing.assert_close(top.double(), logits.amax(1, keepdim=True), rtol=1e-6, atol=1e-6)
    assert (logits.gather(1, top_id) >= logits.amax(1, keepdim=True) - 1e-6).all()
    expected = logits.log_softmax(1).gather(1, top_id)
    torch.testing.assert_close(top_log_q.double(), expected, rtol=1e-6, atol=2e-6)
    e = ((logits - logits.amax(1, keepdim=True)).exp() * slope).scatter(1, top_id, 0.0)
    torch.testing.assert_close(products.double(), e, rtol=torch.finfo(dtype).eps, atol=ATOL)


@every_case
def test_the_softmax_minus_the_label(vocab, options, dtype):
    head, products, logits, slope = products_and_logits(vocab, options, dtype)
    labels = torch.tensor([0, vocab // 2, vocab - 1], device=DEVICE)
    log_q = softmax_kernel.softmax_minus_label_(products, head, labels)
    expected = logits.log_softmax(1).gather(1, labels[:, None])
    torch.testing.assert_close(log_q.double(), expected[:, 0], rtol=1e-6, atol=2e-6)
    gradient = logits.softmax(1).scatter_add(1, labels[:, None], torch.full_like(expected, -1.0)) * slope
    torch.testing.assert_close(products.double(), gradient, rtol=torch.finfo(dtype).eps, atol=ATOL)


@pytest.mark.parametrize("label", [-100, 31])
def test_a_label_outside_the_vocabulary_has_no_loss_that_one_could_train_on(label):
    head, products, *_ = products_and_logits(31, {}, torch.float32)
    log_q = softmax_kernel.softmax_minus_label_(products, head, torch.tensor([0, label, 1], device=DEVICE))
    assert log_q.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_passes_the_check_that_a_run_begins_with(dtype):
    assert difference(softmax_kernel, DEVICE, dtype) is None


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_fused_cross_entropy_is_as_accurate_as_plain_torch(options, monkeypatch):
    tokens, vocab, dtype = 10, 507, torch.bfloat16
    labels = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(2))
    head, h = make_head(vocab, 33, dtype, **options), make_h(1, tokens, 33, dtype=dtype, spread=4.0)
    results = []
    for fused in (True, False):
        monkeypatch.setattr(kernels, "fused", lambda weight, fused=fused: fused)
        x, device_head = h.to(DEVICE).requires_grad_(), on_device(head)
        device_head.weight.requires_grad_()
        loss = linear_cross_entropy(x, device_head, labels.to(DEVICE), chunk=4)[0]
        results.append([loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, (x, device_head.weight)))])
    x, exact = h.double().requires_grad_(), as_dtype(head, torch.float64)
    exact.weight.requires_grad_()
    truth = dense_ce(x, exact, labels)[0]
    results.append([truth.detach(), *torch.autograd.grad(truth, (x, exact.weight))])
    for ours, plain, true in zip(*results, strict=True):
        assert_as_accurate(ours, plain, true, tiny=2e-3)  # bfloat16 may round differently


@pytest.mark.parametrize("spread", [1.0, 12.0])
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_the_fused_interaction_loss_is_as_accurate_as_plain_torch(options, spread, monkeypatch):
    tokens, vocab, dtype = 10, 507, torch.bfloat16
    head, h = make_head(vocab, 33, dtype, **options), make_h(1, tokens, 33, dtype=dtype, spread=spread)
    h64 = h.double().requires_grad_()
    probs = torch.softmax(dense_logits(make_h(2, tokens, 9, spread=3.0, seed=7), make_head(vocab, 9, seed=8)), -1)
    signal = topk_signal(probs.transpose(0, 1), 12, tail=False)
    truth = dense_kl(h64[0], as_dtype(head, torch.float64), signal, 1).sum()
    results = {}
    for fused in (False, True):
        monkeypatch.setattr(kernels, "fused", lambda weight, fused=fused: fused)
        moved = {name: field.to(DEVICE) for name, field in vars(signal).items() if isinstance(field, torch.Tensor)}
        x, device_signal = h.to(DEVICE).requires_grad_(), replace(signal, **moved)
        matrix = kl_matrix(x, on_device(head), device_signal, [range(2)], chunk=4)
        loss = matched_kl(x, on_device(head), device_signal, [1], matrix)[0]
        results[fused] = (loss.detach().cpu(), torch.autograd.grad(loss, x)[0].cpu())
    for ours, plain, exact in zip(
        results[True], results[False], (truth.detach(), torch.autograd.grad(truth, h64)[0]), strict=True
    ):
        assert_as_accurate(ours, plain, exact, tiny=2e-3)  # bfloat16 may round differently


@pytest.mark.parametrize(("capability", "labelled", "capped"), [(80, False, True), (80, True, False), (90, True, True)])
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability, labelled, capped):
    program = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.loss.softmax_kernel import BLOCK, _softmax
types = dict(products="*bf16", marked_ids="*i64", marked_log_qs="*fp32", tops="*fp32", vocab="i32", stride="i32",
             scale="fp32", softcap="fp32", LABELLED="constexpr", CAPPED="constexpr", BLOCK="constexpr")
constants = dict(LABELLED={labelled}, CAPPED={capped}, BLOCK=BLOCK)
source = ASTSource(fn=_softmax, signature=types, constexprs=constants)
assert triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=dict(num_warps=8)).asm["cubin"]
"""
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=compiling, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
