"""How well a model gives the responses of a batch: their cross-entropy, and which answers it would give itself.

T response tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.loss.label_scores import label_scores
from pipeline.vlm.backbone import run_backbone
from pipeline.vlm.parts import decoder_layers, final_norm
from pipeline.vlm.processing import Batch
from pipeline.vlm.verbalizer import LanguageHead


@torch.no_grad()
def score_responses(backbone: nn.Module, head: LanguageHead, batch: Batch) -> Tensor:
    """[4] float64 on the CPU: nats and response tokens, right answers and answers; sums over the batch's samples.

    A sample's answer is its last assistant turn, after the data's own earlier turns. It is right if each of its tokens,
    the end-of-turn token included, is the likeliest after those before it: then it is just what greedy decoding gives.
    One that max_length has cut from counts as none: its beginning, or the turn before it, is easier to get right.
    """
    (last,) = run_backbone(backbone, batch.inputs, [len(decoder_layers(backbone))], batch.positions)
    log_probs, likeliest = head(label_scores, final_norm(backbone)(last), labels=batch.labels)
    right = right_answers(likeliest.tolist(), batch.counts, batch.answers)
    sums = (-float(log_probs.double().sum()), len(batch.labels), right, sum(tokens > 0 for tokens in batch.answers))
    return torch.tensor(sums, dtype=torch.float64)


def right_answers(likeliest: Sequence[bool], counts: Sequence[int], answers: Sequence[int]) -> int:
    """Samples whose answer is right throughout; counts, answers: of each sample's responses and answer, in tokens."""
    right, end = 0, 0
    for count, tokens in zip(counts, answers, strict=True):
        end += count
        right += tokens > 0 and all(likeliest[end - tokens : end])
    return right
