"""What a teacher's layers say about tokens, as rows: one for each token and layer, a chunk of them at a time.

T response tokens, J teacher layers, d width of the teacher, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def row_states(hidden: Tensor, chunk: int) -> Iterator[Tensor]:
    """Hidden states [T, J, d] as [c, d] of at most `chunk` rows: a token's layers, then the next token's.

    A row that is not all finite is NaN throughout: a soft-cap would make finite logits of it. States come from a model
    layer by layer; to reshape them would copy them all, so each chunk takes its own.
    """
    tokens, layers, _ = hidden.shape
    for row in torch.arange(tokens * layers, device=hidden.device).split(chunk):
        states = hidden[row // layers, row % layers]
        yield states.masked_fill(~states.isfinite().all(1, keepdim=True), torch.nan)
