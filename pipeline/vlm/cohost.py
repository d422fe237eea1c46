"""Teacher and student with their verbalizers, as one module in one engine (or the teacher alone, for cache jobs)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.loss.linear_ce import linear_cross_entropy
from pipeline.signal import Unembedding
from pipeline.vlm.backbone import run_backbone
from pipeline.vlm.processing import Batch
from pipeline.vlm.verbalizer import VerbalizedVLM

Encode = Callable[[Tensor, Unembedding], Any]
"""(verbalized states [T, L + 1, d], the teacher's head) -> any result. Called while the head is gathered."""


class CoHost(nn.Module):
    """Frozen backbones in eval mode; only verb-FFNs train.

    Every rank calls the same parts in the same order in every step, as ZeRO-3 needs.
    """

    def __init__(self, sides: Mapping[str, VerbalizedVLM]):
        """sides: {"teacher": ..., "student": ...}, or one of them."""
        super().__init__()
        self.sides = nn.ModuleDict(sides)
        for side in sides.values():
            side.requires_grad_(False)
            side.verb_ffns.requires_grad_(True)

    def train(self, mode: bool = True) -> CoHost:
        """Backbones stay in eval mode: they are frozen, and dropout would change what the verbalizers learn from."""
        super().train(mode)
        for side in self.sides.values():
            side.backbone.eval()  # type: ignore[union-attr]
        return self

    def forward(self, batches: Mapping[str, Batch], encode: Encode | None = None) -> Any:
        """Verbalization losses: for each side [L + 1], cross-entropy in nat summed over this batch's response tokens.

        The last entry is the loss of the model's own last layer; nothing of it trains. With `encode`, instead: what
        `encode` returns for the teacher's verbalized states of the batch.
        """
        if encode is not None:
            return _record(self.sides["teacher"], batches["teacher"], encode)  # type: ignore[arg-type]
        losses = {}
        for role, side in self.sides.items():
            verbalized = self._verbalize(side, batches[role])  # type: ignore[arg-type]
            losses[role] = side.head(_cross_entropies, verbalized, labels=batches[role].labels)  # type: ignore[operator]
        return losses

    def _verbalize(self, side: VerbalizedVLM, batch: Batch) -> Tensor:
        with torch.no_grad():
            hidden = run_backbone(side.backbone, batch.inputs, side.all_layers(), batch.positions)
        return side.verbalize_states(hidden)


def _cross_entropies(verbalized: Tensor, unembedding: Unembedding, labels: Tensor) -> Tensor:
    """[L + 1]; the last one is without gradient, which would cost a product."""
    targets, last = verbalized[:-1], verbalized[-1:].detach()
    return torch.cat([linear_cross_entropy(part, unembedding, labels) for part in (targets, last)])


@torch.no_grad()
def _record(teacher: VerbalizedVLM, batch: Batch, encode: Encode) -> Any:
    """Call `encode` with the verbalized states [T, L + 1, d] of the batch's response tokens."""
    hidden = run_backbone(teacher.backbone, batch.inputs, teacher.all_layers(), batch.positions)
    verbalized = teacher.verbalize_states(hidden).transpose(0, 1)
    return teacher.head(encode, verbalized)
