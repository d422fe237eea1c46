"""The KL of a mapped vocabulary, against the naive formula and autograd in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dense_losses import (
    as_dtype,
    assert_as_accurate,
    dense_kl,
    dense_logits,
    grads,
    make_h,
    make_head,
    random_probs,
    topk_signal,
)

from pipeline.loss import fidelity
from pipeline.loss.bucket import BUCKET_FLOOR, BucketShare, bucket_mass
from pipeline.loss.sparse_kl import column_kl, kl_matrix, matched_kl
from pipeline.signal import HiddenSignal, SparseSignal, Unembedding
from pipeline.vocabulary_map import NO_LOGIT, MappedHead, TeacherGroups, VocabularyMap

TOKENS, TEACHERS, THEIRS, OURS, WIDTH = 9, 4, 61, 47, 6
WINDOW = [range(0, 2), range(1, 4)]
HEADS = [{}, {"padding": 3, "bias": True, "scale": 1.7, "softcap": 4.0}]


def make_map(seed=0, bucket=OURS) -> VocabularyMap:
    """Some ids are one to one, two share a student id, a third are in the bucket, and some student ids are outside."""
    generator = np.random.default_rng(seed)
    class_of = np.full(THEIRS, bucket, np.int32)
    mapped = generator.permutation(THEIRS)[:40]
    class_of[mapped] = generator.permutation(bucket)[np.arange(40) % 35]
    return VocabularyMap(class_of, bucket)


def naive(probs, mapping):
    """The definition: [.., V_t] -> [.., V_s + 1]."""
    mapped = torch.zeros(*probs.shape[:-1], mapping.size, dtype=probs.dtype)
    for teacher_id, student_id in enumerate(mapping.class_of):
        mapped[..., student_id] += probs[..., teacher_id]
    return mapped


def whole_signal(p):
    """All V_s + 1 probabilities as a signal without a tail, as a sampled cache gives them."""
    ids = torch.arange(p.shape[-1]).expand(p.shape)
    neg_entropy = torch.xlogy(p, p).sum(-1)
    return SparseSignal(ids, p, torch.zeros_like(neg_entropy), neg_entropy, has_tail=False)


def naive_kl(h, head, p, mapping, column):
    """h [T, d], p [T, J, V_s + 1] -> the KL of each token [T]."""
    q = dense_logits(h, head).softmax(-1)
    bucket = q[:, mapping.outside].sum(-1).clamp_min(BUCKET_FLOOR)
    both = torch.cat((q, bucket[:, None]), -1)
    inside = torch.from_numpy(np.setdiff1d(np.arange(mapping.size), mapping.outside))
    p = p[:, column, inside].to(h.dtype)
    return (torch.xlogy(p, p) - p * both[:, inside].log()).sum(-1)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_both_passes_equal_the_formula_and_autograd_in_float64(options):
    head, mapping = make_head(OURS, WIDTH, **options), make_map()
    p = naive(random_probs(TOKENS, TEACHERS, THEIRS), mapping)
    signal = mapping.to_student(whole_signal(p))
    h = make_h(len(WINDOW), TOKENS, WIDTH).requires_grad_()
    matrix = kl_matrix(h, head, signal, WINDOW, chunk=4)
    for i, columns in enumerate(WINDOW):
        for j in columns:
            torch.testing.assert_close(matrix.values[i, j], naive_kl(h[i].detach(), head, p, mapping, j).sum())
    for match in ([0, 1], [1, 3]):
        ours = matched_kl(h, head, signal, match, matrix)
        truth = torch.stack([naive_kl(x, head, p, mapping, j).sum() for x, j in zip(h, match, strict=True)])
        torch.testing.assert_close(ours, truth)
        weights = torch.tensor([1.0, -0.5], dtype=torch.float64)
        torch.testing.assert_close(grads((weights * ours).sum(), h), grads((weights * truth).sum(), h))
    head.weight.requires_grad_()
    ours, truth = column_kl(h[0], head, signal, 2, chunk=4), naive_kl(h[0], head, p, mapping, 2).sum()
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(grads(ours, h, head.weight), grads(truth, h, head.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_accurate_as_the_naive_formula(dtype):
    head, mapping = make_head(OURS, 32), make_map()
    p = naive(random_probs(TOKENS, TEACHERS, THEIRS), mapping)
    h = make_h(1, TOKENS, 32)
    low, low_h = as_dtype(head, dtype), h.to(dtype).requires_grad_()
    wide, wide_h = as_dtype(low, torch.float64), low_h.detach().double().requires_grad_()
    truth = naive_kl(wide_h[0], wide, p, mapping, 1).sum()
    reference = naive_kl(low_h[0], low, p, mapping, 1).sum()
    signal = mapping.to_student(whole_signal(p.float()))
    for ours in (
        matched_kl(low_h, low, signal, [1], kl_matrix(low_h, low, signal, [range(4)]))[0],
        column_kl(low_h[0], low, signal, 1),
    ):
        assert_as_accurate(ours.detach(), reference.detach(), truth.detach(), 1e-6)
        errors = [grads(one, x)[0] for one, x in ((ours, low_h), (reference, low_h), (truth, wide_h))]
        assert_as_accurate(*errors, tiny=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_student_with_no_id_outside_learns_the_mapped_ids_alone():
    """Its share of the bucket is 0: the KL stays finite, and its gradient is p_M times that of KL(p | M || q)."""
    mapping = VocabularyMap(np.r_[np.arange(OURS), np.full(THEIRS - OURS, OURS)].astype(np.int32), OURS)
    assert len(mapping.outside) == 0
    head, p = make_head(OURS, WIDTH), naive(random_probs(TOKENS, TEACHERS, THEIRS), mapping)
    h = make_h(1, TOKENS, WIDTH).requires_grad_()
    signal = mapping.to_student(whole_signal(p))
    kl = matched_kl(h, head, signal, [0], kl_matrix(h, head, signal, [range(1)]))[0]
    torch.testing.assert_close(kl, naive_kl(h[0], head, p, mapping, 0).sum())
    inside = p[:, 0, :OURS]
    truth = (-inside * dense_logits(h[0], head).log_softmax(-1)).sum()
    torch.testing.assert_close(grads(kl, h), grads(truth, h))
    torch.testing.assert_close(grads(column_kl(h[0], head, signal, 0), h), grads(truth, h))


def test_one_to_one_the_losses_are_those_of_a_shared_vocabulary():
    mapping = VocabularyMap(np.arange(OURS, dtype=np.int32), OURS)
    teacher, student = make_head(OURS, 8, seed=3, dtype=torch.float32), make_head(OURS, WIDTH, dtype=torch.float32)
    hidden, h = make_h(TOKENS, TEACHERS, 8, dtype=torch.float32), make_h(1, TOKENS, WIDTH, dtype=torch.float32)
    mapped = MappedHead.of(teacher, TeacherGroups(mapping))
    logits = mapped.logits(hidden)
    assert torch.equal(logits[..., :-1], teacher.logits(hidden)) and (logits[..., -1] == NO_LOGIT).all()
    assert bucket_mass(hidden, mapped, 5)[1:].tolist() == [0.0] * TEACHERS
    p = logits.softmax(-1)
    signal = mapping.to_student(whole_signal(p))
    exact = column_kl(h[0], student, HiddenSignal(hidden, teacher), 2)
    torch.testing.assert_close(column_kl(h[0], student, signal, 2), exact)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_the_teachers_head_is_mapped_as_defined(options):
    mapping, head = make_map(), make_head(THEIRS, 8, seed=3, dtype=torch.float32, **options)
    hidden = make_h(TOKENS, TEACHERS, 8, dtype=torch.float32)
    hidden[4, 1] = math.inf
    mapped = MappedHead.of(head, TeacherGroups(mapping))
    p = naive(dense_logits(hidden.double(), as_dtype(head, torch.float64)).softmax(-1), mapping)
    good = [t for t in range(TOKENS) if t != 4]
    torch.testing.assert_close(mapped.logits(hidden)[good].softmax(-1).double(), p[good], rtol=1e-5, atol=1e-7)
    assert (mapped.logits(hidden)[..., mapping.outside] == NO_LOGIT).all()
    share = BucketShare.read(bucket_mass(hidden, mapped, 5))
    assert share.tokens == TOKENS - 1, "a token that is not finite is left out"
    np.testing.assert_allclose(share.mass, p[good][..., -1].sum(0), rtol=1e-5)
    again = BucketShare.from_json((share + share).to_json())
    np.testing.assert_allclose(again.means(), share.means())
    with pytest.raises(ValueError, match="the map is for a head of 61 ids, this one has 47"):
        MappedHead.of(make_head(OURS, 8), TeacherGroups(mapping))


def test_a_tail_takes_the_bucket_in_and_stays_a_lower_bound():
    mapping, head = make_map(), make_head(OURS, WIDTH)
    p = naive(random_probs(TOKENS, TEACHERS, THEIRS), mapping)
    top, ids = p.topk(9, -1)
    rest = 1 - top.sum(-1)
    kept = SparseSignal(ids, top, rest, torch.xlogy(top, top).sum(-1) + torch.xlogy(rest, rest))
    assert (ids == mapping.bucket).any()
    signal = mapping.to_student(kept)
    assert signal.bucket is None and int(signal.ids.max()) < OURS
    torch.testing.assert_close(signal.probs.sum(-1) + signal.tail, torch.ones_like(rest))
    h = make_h(1, TOKENS, WIDTH)
    found = kl_matrix(h, head, signal, [range(TEACHERS)]).values[0]
    for j in range(TEACHERS):
        torch.testing.assert_close(found[j], dense_kl(h[0], head, signal, j).sum())
        assert found[j] <= naive_kl(h[0], head, p, mapping, j).sum() + 1e-9


def test_the_kl_is_a_lower_bound_and_zero_on_itself():
    """Split the bucket among the student's ids outside in any way: the full KL is never smaller."""
    mapping = make_map()
    head = Unembedding(torch.eye(OURS, dtype=torch.float64), OURS)
    p = naive(random_probs(TOKENS, TEACHERS, THEIRS), mapping)
    outside, h = torch.from_numpy(mapping.outside), make_h(1, TOKENS, OURS)
    inner = random_probs(TOKENS, TEACHERS, len(outside), seed=7)
    full = p[..., :-1].clone()
    full[..., outside] = p[..., -1:] * inner
    signal = mapping.to_student(whole_signal(p))
    coarse = kl_matrix(h, head, signal, [range(TEACHERS)]).values[0]
    log_q = h[0].log_softmax(-1)[:, None]
    fine = (torch.xlogy(full, full) - full * log_q).sum((0, 2))
    assert (coarse <= fine + 1e-9).all() and (coarse > 0).all()
    itself = full[:, 0].clamp_min(1e-300).log()[None]
    assert abs(float(kl_matrix(itself, head, signal.part(slice(None), slice(0, 1)), [range(1)]).values)) < 1e-9


def test_a_map_names_only_ids_that_exist():
    with pytest.raises(ValueError, match="expected student ids from 0 to 4, or 5 for the bucket"):
        VocabularyMap(np.array([0, 6], np.int32), 5)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_fidelity_is_measured_over_the_mapped_ids(options):
    """Against autograd through the mapped head: the joined ids' gradient reaches every teacher row that they join."""
    mapping, head = make_map(), make_head(THEIRS, 8, seed=3, **options)
    mapped = MappedHead.of(head, TeacherGroups(mapping))
    hidden = make_h(TOKENS, TEACHERS, 8)
    signal = topk_signal(mapped.logits(hidden).double().softmax(-1), 9)
    found = fidelity.measure(hidden, mapped, signal).read()
    p = naive(dense_logits(hidden, head).softmax(-1), mapping)
    for j in range(TEACHERS):
        h = hidden[:, 1 if j == 0 else j - 1].clone().requires_grad_()
        q = naive(dense_logits(h, head).softmax(-1), mapping)
        true = (torch.xlogy(p[:, j], p[:, j]) - torch.xlogy(p[:, j], q)).sum()
        (gradient,) = torch.autograd.grad(true, h)
        np.testing.assert_allclose(found.entropy[j], -float(torch.xlogy(p[:, j], p[:, j]).sum()), rtol=1e-5)
        np.testing.assert_allclose(found.gradient_squared[j], float(gradient.square().sum()), rtol=1e-4)
