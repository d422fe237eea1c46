"""Stage 2 with L2 on hidden states: what following the teacher's layers gives without its language head.

The control of the paper's Table 4d and Appendix D: each student target layer follows a teacher layer by its hidden
state. The two widths differ, so a linear map is trained with the student; it is thrown away at export. Here both states
are behind their model's final norm, as the cache stores them, and there is no verb-FFN: the cache must come from a
stage 1 with verbalize.steps=0, whose verbalizers change nothing. The pairs are fixed and spread evenly.

S student target layers, J teacher target layers, T response tokens, d width of the student, D of the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.ladder.program import NO_STATES, fixed_pairs, main, teacher_states
from pipeline.loss.sparse_kl import column_kl
from pipeline.signal import Signal, Unembedding
from pipeline.steps.interact import Draw, Interaction
from pipeline.vlm.verbalizer import StoredHead, VerbalizedVLM


class FeaturesL2(Interaction):
    """The student, and a trained map to the teacher's width for each of its target layers."""

    def __init__(self, student: VerbalizedVLM, teacher_head: nn.Module | None):
        super().__init__(student, teacher_head)
        if not isinstance(teacher_head, StoredHead):
            raise ValueError(NO_STATES)
        width, teacher_width = student.head.weight.shape[1], teacher_head.weight.shape[1]
        maps = [nn.Linear(width, teacher_width, dtype=student.head.weight.dtype) for _ in student.layers]
        self.maps = nn.ModuleList(maps)

    def losses(
        self, verbalized: Tensor, unembedding: Unembedding, signal: Signal, labels: Tensor, draw: Draw
    ) -> dict[str, Tensor]:
        """As of Interaction; "matched" is the L2 loss of each layer."""
        teacher = teacher_states(signal)
        pairs = fixed_pairs(verbalized, teacher)
        return {
            "matched": features_l2(verbalized[:-1], self.maps, teacher.hidden[:, pairs]),
            "last": column_kl(verbalized[-1], unembedding, teacher, teacher.hidden.shape[1] - 1),
            "match": torch.tensor(pairs),
            "entropy": torch.tensor([]),
        }


def features_l2(states: Tensor, maps: nn.ModuleList, targets: Tensor) -> Tensor:
    """(map(state) - target)^2, its mean over the width, summed over tokens: [S], from [S, T, d] and [T, S, D]."""
    mapped = torch.stack([one(state) for one, state in zip(maps, states, strict=True)], 1)
    return (mapped - targets).square().mean(2).sum(0)


if __name__ == "__main__":
    main(FeaturesL2, __doc__)
