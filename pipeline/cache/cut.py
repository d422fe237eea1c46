"""A cache over more ids than a student has: its distributions over the common ids alone.

V' common ids of the cache's V: those below V', for ids are shared. Teacher and student in one engine are compared over
softmaxes of the common ids, and so they are here:

    p'(i) = p(i) / P,  P = sum of p(i) over i < V'        sum p' log p' = (sum over i < V' of p log p) / P - log P

T response tokens, J teacher layers, K kept ids.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.signal import HiddenSignal, Signal, SparseSignal


def cut_to(signal: Signal, ids: int) -> Signal:
    """A signal over the ids below `ids` alone.

    Of states and a head it is exact. Of kept ids it is what they say of p': all of it where every id of the vocabulary
    is kept. A sample without a point above stays as it is, bit for bit, and so does a tail, which then also holds
    what the ids above have. A distribution with all of its points above says nothing, and has KL and gradient 0.
    """
    if isinstance(signal, HiddenSignal):
        return replace(signal, unembedding=replace(signal.unembedding, vocab=ids))
    return _cut_sparse(signal, ids)


def _cut_sparse(signal: SparseSignal, ids: int) -> SparseSignal:
    above = signal.ids >= ids
    lost = signal.probs * above
    probs = signal.probs.masked_fill(above, 0.0)
    share = torch.where(lost.any(-1), probs.sum(-1) + signal.tail, 1.0)
    left = share.clamp_min(torch.finfo(share.dtype).tiny)
    neg_entropy = (signal.neg_entropy - torch.special.xlogy(lost, lost).sum(-1)) / left - left.log()
    return replace(
        signal,
        ids=signal.ids.masked_fill(above, 0),
        probs=probs / left[..., None],
        tail=signal.tail / left,
        neg_entropy=neg_entropy.masked_fill(share == 0, 0.0),
    )
