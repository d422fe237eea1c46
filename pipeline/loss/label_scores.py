"""What a language head gives to the labels: their log-probability, and whether it would choose them.

T response tokens, d width, V vocabulary. In naive form:

    logits = unembedding.logits(h)                                          # [T, V]
    logits.log_softmax(1).gather(1, labels), logits.argmax(1) == labels
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.loss.chunks import Workspace
from pipeline.loss.linear_ce import check_labels
from pipeline.loss.probabilities import probability_chunks
from pipeline.signal import Unembedding


@torch.no_grad()
def label_scores(
    h: Tensor, unembedding: Unembedding, labels: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probability in nats of each label, whether it is the likeliest id): h [T, d], labels [T] -> [T], [T] bool.

    Of equally likely ids any one may count as the likeliest. Without gradient. chunk and errors: as
    linear_cross_entropy.
    """
    check_labels(h[None], unembedding, labels)
    log_probs = torch.empty(len(labels), dtype=torch.float32, device=h.device)
    likeliest = torch.empty(len(labels), dtype=torch.bool, device=h.device)

    def collect(rows: slice, top: Tensor, log_q: Tensor, _log_sum: Tensor) -> None:
        log_probs[rows] = log_q[:, 1].float()
        likeliest[rows] = top[:, 0] == labels[rows]

    for _ in probability_chunks(h, Workspace(unembedding, chunk), labels[:, None], 1, collect):
        pass  # the products are not needed
    return log_probs, likeliest
