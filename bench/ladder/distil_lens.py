"""Stage 2 after DistillLens (arXiv 2602.13567): logit lenses on both sides, a symmetric divergence, fixed pairs.

    loss = JSD of the lenses, averaged over layers and tokens + KL(teacher || student) of the last layers

The logit lens is the model's own head on the hidden state of a layer, without any verb-FFN: the cache must come from a
stage 1 with verbalize.steps=0, whose verbalizers change nothing. As in the public code, the student's head takes a
gradient from its lenses too. Three things differ from that code. It leaves the final norm out of the lens; here it is
in, because the cache stores normed states. Its pairs are named by hand; here they are spread evenly. Its script adds a
share of cross-entropy; here there is none, as in the arms beside it.

S student target layers, J teacher target layers, T response tokens, V common vocabulary, d width of the student.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.ladder.program import fixed_pairs, main, teacher_states
from pipeline.loss.chunks import wide_logits
from pipeline.loss.sparse_kl import column_kl
from pipeline.signal import Signal, Unembedding
from pipeline.steps.interact import Draw, Interaction


class DistilLens(Interaction):
    """The student, without parameters of its own."""

    def losses(
        self, verbalized: Tensor, unembedding: Unembedding, signal: Signal, labels: Tensor, draw: Draw
    ) -> dict[str, Tensor]:
        """As of Interaction; "matched" is each layer's share of the average over layers."""
        teacher = teacher_states(signal)
        pairs = fixed_pairs(verbalized, teacher)
        ours = [wide_logits(state, unembedding) for state in verbalized[:-1]]
        theirs = [wide_logits(teacher.hidden[:, column], teacher.unembedding) for column in pairs]
        lenses = [jensen_shannon(q, p).sum() for q, p in zip(ours, theirs, strict=True)]
        return {
            "matched": torch.stack(lenses) / len(lenses),
            "last": column_kl(verbalized[-1], unembedding, teacher, teacher.hidden.shape[1] - 1),
            "match": torch.tensor(pairs),
            "entropy": torch.tensor([]),
        }


def jensen_shannon(q: Tensor, p: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 in nats, with m = (p + q) / 2, from the logits of q and p [T, V]: [T]."""
    log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2


if __name__ == "__main__":
    main(DistilLens, __doc__)
