"""Our divergence equals that of other packages, up to what each divides by.

TRL 1.16, installed by `make peers`: `GKDTrainer.generalized_jsd_loss` at beta = 0, and the chunked kernel of its
DistillationTrainer. ModelOpt 0.47 needs more packages than this project has, so its
`modelopt.torch.distill.LogitsDistillationLoss` is written out here.
"""

import pytest
import torch
from dense_losses import dense_logits, grads, make_h, make_head, topk_signal
from torch.nn.functional import kl_div, log_softmax, softmax

from pipeline.loss.sparse_kl import column_kl
from pipeline.signal import HiddenSignal

TOKENS, VOCAB = 13, 50
LABELS = torch.arange(TOKENS).where(torch.arange(TOKENS) % 3 != 1, -100)


def modelopt_logits_loss(student, teacher, reduction):
    """The mean over tokens and ids, or with "none" one number for each token. Times temperature^2, which is 1 here."""
    loss = kl_div(log_softmax(student, -1), softmax(teacher, -1), reduction=reduction)
    return loss.sum(-1) if reduction == "none" else loss


@pytest.fixture(params=["hidden", "all kept"])
def pair(request):
    """(student hidden states, its head, teacher logits, a signal of the same distributions)."""
    student_head, teacher_head = make_head(VOCAB, 6, scale=1.1), make_head(VOCAB, 9, softcap=8.0, seed=5)
    h, hidden = make_h(TOKENS, 6).requires_grad_(), make_h(TOKENS, 1, 9, seed=6)
    teacher = dense_logits(hidden[:, 0], teacher_head)
    if request.param == "hidden":
        return h, student_head, teacher, HiddenSignal(hidden, teacher_head)
    return h, student_head, teacher, topk_signal(teacher.softmax(-1)[:, None], VOCAB)


@pytest.mark.filterwarnings("ignore")  # TRL warns about its experimental parts
def test_trl_s_generalized_jsd_at_beta_zero_is_our_mean_over_the_response_tokens(pair):
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is installed by `make peers`", exc_type=ImportError)
    h, head, teacher, signal = pair
    counted = LABELS != -100
    ours = column_kl(h[counted], head, signal.part(counted), 0) / counted.sum()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(dense_logits(h, head), teacher, LABELS, beta=0.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(grads(loss, h)[0] for loss in (ours, theirs)))


@pytest.mark.filterwarnings("ignore:reduction")  # torch warns that "mean" is not the divergence
@pytest.mark.parametrize(("reduction", "divisor"), [("mean", TOKENS * VOCAB), ("batchmean", TOKENS), ("none", 1)])
def test_modelopt_s_logits_loss_is_ours_up_to_the_divisor(pair, reduction, divisor):
    h, head, teacher, signal = pair
    ours = column_kl(h, head, signal, 0) / divisor
    theirs = modelopt_logits_loss(dense_logits(h, head), teacher, reduction).sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(grads(loss, h)[0] for loss in (ours, theirs)))


@pytest.mark.filterwarnings("ignore")
def test_trl_s_chunked_divergence_at_beta_zero_is_our_sum_over_tokens():
    chunked = pytest.importorskip(
        "trl.kernels.chunked_divergence", reason="TRL is installed by `make peers`", exc_type=ImportError
    )
    head, teacher_head = make_head(VOCAB, 6, torch.float32), make_head(VOCAB, 9, torch.float32, seed=5)
    h, hidden = make_h(TOKENS, 6, dtype=torch.float32).requires_grad_(), make_h(TOKENS, 9, dtype=torch.float32, seed=6)
    ours = column_kl(h, head, HiddenSignal(hidden[:, None], teacher_head), 0)
    divergence = chunked.ChunkedDivergenceFunction
    theirs = divergence.apply(h, head.weight, None, hidden, teacher_head.weight, None, 0.0)[0].sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(grads(loss, h)[0] for loss in (ours, theirs)), rtol=1e-4, atol=1e-5)
