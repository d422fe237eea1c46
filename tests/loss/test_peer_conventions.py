"""The divergence is the one that others compute: their arithmetic, restated, and what each divides by.

TRL 1.16: `GKDTrainer.generalized_jsd_loss` at beta = 0. ModelOpt 0.47: `modelopt.torch.distill.LogitsDistillationLoss`.
"""

import pytest
import torch
from dense_losses import dense_logits, make_h, make_head, topk_signal, truth_gradients
from torch.nn.functional import kl_div, log_softmax, softmax

from pipeline.loss.sparse_kl import column_kl
from pipeline.teacher.signal import HiddenSignal

TOKENS, VOCAB = 13, 50
LABELS = torch.arange(TOKENS).where(torch.arange(TOKENS) % 3 != 1, -100)


def trl_generalized_jsd(student, teacher, labels):
    """Mean over the tokens whose label counts (`num_items_in_batch`, or "batchmean" with labels)."""
    jsd = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), reduction="none", log_target=True)
    return jsd[labels != -100].sum() / (labels != -100).sum()


def modelopt_logits_loss(student, teacher, reduction):
    """With reduction "mean" over tokens and ids; with "none" a number a token. Times temperature^2, which is 1 here."""
    loss = kl_div(log_softmax(student, -1), softmax(teacher, -1), reduction=reduction)
    return loss.sum(-1) if reduction == "none" else loss


@pytest.fixture(params=["hidden", "all kept"])
def pair(request):
    """(student hidden, its head, teacher logits, the signal that says the same)."""
    student_head, teacher_head = make_head(VOCAB, 6, scale=1.1), make_head(VOCAB, 9, softcap=8.0, seed=5)
    h, hidden = make_h(TOKENS, 6).requires_grad_(), make_h(TOKENS, 1, 9, seed=6)
    teacher = dense_logits(hidden[:, 0], teacher_head)
    if request.param == "hidden":
        return h, student_head, teacher, HiddenSignal(hidden, teacher_head)
    return h, student_head, teacher, topk_signal(teacher.softmax(-1)[:, None], VOCAB)


def test_trl_s_generalized_jsd_at_beta_zero_is_ours_over_the_response_tokens(pair):
    h, head, teacher, signal = pair
    counted = LABELS != -100
    ours = column_kl(h[counted], head, signal.part(counted), 0) / counted.sum()
    theirs = trl_generalized_jsd(dense_logits(h, head), teacher, LABELS)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(truth_gradients(loss, h)[0] for loss in (ours, theirs)))


@pytest.mark.filterwarnings("ignore:reduction")  # that torch's "mean" is no divergence
@pytest.mark.parametrize(("reduction", "divisor"), [("mean", TOKENS * VOCAB), ("batchmean", TOKENS), ("none", 1)])
def test_modelopt_s_logits_loss_is_ours_but_for_what_it_divides_by(pair, reduction, divisor):
    h, head, teacher, signal = pair
    ours = column_kl(h, head, signal, 0) / divisor
    theirs = modelopt_logits_loss(dense_logits(h, head), teacher, reduction).sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(truth_gradients(loss, h)[0] for loss in (ours, theirs)))
