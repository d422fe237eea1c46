"""Teacher hidden states as rows, one for each token and layer, in chunks.

T response tokens, J teacher layers, d width of the teacher, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def row_states(hidden: Tensor, chunk: int) -> Iterator[Tensor]:
    """Hidden states [T, J, d] in chunks [c, d] of at most `chunk` rows, in the order of tokens, then layers.

    A row with any value that is not finite becomes all NaN. Otherwise a soft-cap could turn it into finite logits.

    Each chunk gathers its own rows. The states come from the model layer by layer, so a reshape would copy them all.
    """
    tokens, layers, _ = hidden.shape
    for row in torch.arange(tokens * layers, device=hidden.device).split(chunk):
        states = hidden[row // layers, row % layers]
        yield states.masked_fill(~states.isfinite().all(1, keepdim=True), torch.nan)
