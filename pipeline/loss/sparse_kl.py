"""Forward KL(teacher || student) in nats, from the student's hidden states and a teacher signal.

S student layers, J teacher layers, T response tokens, K kept ids, V common vocabulary, d width. For one token:

    log_q = unembedding.logits(h).log_softmax(-1)
    kl = (p * (log_p - log_q)).sum()  # HiddenSignal: all of p
    kl = (p * (log_p - log_q[ids])).sum() + r * (log(r) - log(1 - log_q[ids].exp().sum()))  # SparseSignal: r the tail

The tail r is one bucket. Two distributions that differ only inside it have KL 0, so the second value is never above the
first. Where the ids are samples there is no tail: r = 0. Where the signal is of a mapped vocabulary, its bucket adds
p_B times a number that no candidate changes (bucket.py).

There are two passes, because the match is drawn between them. `kl_matrix` needs one matrix product with the vocabulary
for the KL of all candidates. A second product gives the part that their gradients share. The gradient of a sparse KL at
the head's input is

    alpha * E_q[W] - sum_k beta_k W[id_k]
    r = 0:  beta_k = p_k,  alpha = sum_k p_k, which is 1
    r > 0:  beta_k = p_k - rho q_k,  rho = r / Q,  Q = 1 - sum_k q_k,  alpha = 1 - rho  (with sum_k p_k + r for the 1)

where E_q[W] does not depend on the candidate. `matched_kl` then costs one embedding_bag.

For a confident token in bfloat16 the two terms would cancel, and only the rounding error of E_q[W] would remain. So the
ids of largest q are left out of the product. They are added with the kept ids, and their coefficients are summed in
float32. This is done for the most likely id, and for HEAVY ids where rho may be large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.loss.bucket import StudentBucket, bucket_surprisal
from pipeline.loss.chunks import (
    Gradients,
    LayerGradients,
    Workspace,
    accumulator,
    attach_gradients,
    cap_slope,
    exp_,
    head_loss,
    product_gradients,
    row_chunks,
    rows_per_chunk,
    times_weight,
    wide_logits,
)
from pipeline.loss.probabilities import probability_chunks
from pipeline.signal import HiddenSignal, Signal, SparseSignal, Unembedding

TAIL_FLOOR = 1e-6
"""Lower bound of the student's tail. Below it, 1 - the sum of float32 probabilities is rounding noise."""

HEAVY = 16
"""Number of ids of largest student probability left out of the low-precision product if the signal has a tail."""


@dataclass(frozen=True)
class _Candidates:
    """The results of the first pass for one student layer. The second pass needs them for any candidate."""

    columns: range
    """The teacher layers that are candidates."""
    log_q: Tensor
    """[T, candidates, K] the student's log-probability of each kept id."""
    log_sum: Tensor
    """[T, 1] log-sum-exp of the student's logits."""
    heavy_ids: Tensor
    """[T, H] ids of largest student probability."""
    heavy_log_q: Tensor
    """[T, H] their log-probabilities."""
    light: Tensor
    """[T, d] E_q[slope * W] over all ids but the heavy ones, divided by the largest q, in the weight's dtype. slope is
    the derivative of scale and soft-cap."""
    bucket: tuple[Tensor, Tensor] | None
    """What `bucket_surprisal` returned: [T] and [T, d]; None where the signal has no bucket."""


@dataclass(frozen=True)
class KLMatrix:
    """The KL of every student layer to each of its candidates, and the shared part of the gradients."""

    values: Tensor
    """[S, J] float64: KL in nats, summed over the tokens; inf outside the window."""
    window: tuple[range, ...]
    """For each student layer, the columns that have a value."""
    candidates: tuple[_Candidates | None, ...]
    """For each student layer. None where its window is empty, or where the signal is exact (nothing is shared then)."""


@torch.no_grad()
def kl_matrix(
    h: Tensor, unembedding: Unembedding, signal: Signal, window: Sequence[range], chunk: int | None = None
) -> KLMatrix:
    """First pass, without gradient: the KL of each student layer to the candidates in its window.

    h: [S, T, d] normed verbalizer outputs. unembedding: the student's head. window: the columns for each student layer.
    chunk: tokens in a chunk; None: as memory allows. Raises ValueError where shapes or vocabularies do not fit.
    """
    _check(h, unembedding, signal, window)
    teachers = (signal.hidden if isinstance(signal, HiddenSignal) else signal.tail).shape[1]
    values = torch.full((len(h), teachers), torch.inf, dtype=torch.float64, device=h.device)
    for layer, columns in enumerate(window):
        values[layer, columns.start : columns.stop] = 0.0
    if isinstance(signal, HiddenSignal):
        _add_exact(values, h, unembedding, signal, window, chunk or rows_per_chunk(unembedding.vocab))
        return KLMatrix(values, tuple(window), (None,) * len(h))
    workspace = Workspace(unembedding, chunk)
    candidates = tuple(
        _first_pass(values[layer], h[layer], workspace, signal, columns) if len(columns) else None
        for layer, columns in enumerate(window)
    )
    return KLMatrix(values, tuple(window), candidates)


def matched_kl(
    h: Tensor,
    unembedding: Unembedding,
    signal: Signal,
    match: Sequence[int | None],
    matrix: KLMatrix,
    chunk: int | None = None,
) -> Tensor:
    """Second pass: the KL of each student layer to its match, summed over tokens [S]. Gradients reach h [S, T, d] only.

    A layer matched to None has KL 0 and gradient 0. matrix: the result of `kl_matrix` for the same h and signal.
    Raises ValueError for a match outside the window.
    """
    _check(h, unembedding, signal, match)
    for layer, (column, columns) in enumerate(zip(match, matrix.window, strict=True)):
        if column is not None and column not in columns:
            raise ValueError(
                f"student layer {layer} is matched to teacher layer {column}, outside its window {columns}"
            )
    if isinstance(signal, HiddenSignal):
        frozen = unembedding.detached()
        zero = torch.zeros((), dtype=accumulator(unembedding.weight.dtype), device=h.device)
        pairs = zip(h, match, strict=True)
        return torch.stack([zero if j is None else column_kl(x, frozen, signal, j, chunk) for x, j in pairs])
    sums = torch.zeros(len(h), dtype=accumulator(unembedding.weight.dtype), device=h.device)
    gradient = torch.zeros_like(h)
    with torch.no_grad():
        for layer, (column, candidates) in enumerate(zip(match, matrix.candidates, strict=True)):
            if column is not None and candidates is not None:
                sums[layer] = _second_pass(gradient[layer], unembedding, signal, column, candidates)
    return attach_gradients(sums, (h,), (gradient,))


def column_kl(h: Tensor, unembedding: Unembedding, signal: Signal, column: int, chunk: int | None = None) -> Tensor:
    """The KL of one student layer h [T, d] to one teacher layer, summed over tokens: a scalar.

    It is used for the last layers. Gradients reach h, and the head's weight and bias where these require one. Raises
    ValueError where shapes or vocabularies do not fit.
    """
    _check(h[None], unembedding, signal, (column,))
    if isinstance(signal, HiddenSignal):
        layer_gradients: LayerGradients = partial(_exact_gradients, signal, column)
    else:
        layer_gradients = partial(_sparse_gradients, signal, column)
    return head_loss(h[None], unembedding, layer_gradients, chunk)[0]


def _sparse_gradients(
    signal: SparseSignal, column: int, h: Tensor, add_losses: Callable[[Tensor], None], workspace: Workspace
) -> Gradients:
    def loss(rows: slice, logits: Tensor) -> None:
        target = signal.part(rows, column)
        bucket = None if target.bucket is None else StudentBucket.of(logits, target.bucket.outside)
        log_q, log_total, total = exp_(logits, target.ids)
        logits.div_(total)
        kl, alpha, beta = _kl_terms(log_q, target)
        if target.bucket is None or bucket is None:
            logits.mul_(alpha[:, None]).scatter_add_(1, target.ids, -beta)
        else:
            surprisal, pull = bucket.terms(log_total, target.bucket.mass.to(kl.dtype))
            kl = kl + surprisal
            logits.mul_((alpha + pull)[:, None]).scatter_add_(1, target.ids, -beta)
            logits.index_add_(1, target.bucket.outside, bucket.share * pull[:, None], alpha=-1)
        add_losses(kl)

    return product_gradients(h, workspace, loss)


def _exact_gradients(
    signal: HiddenSignal, column: int, h: Tensor, add_losses: Callable[[Tensor], None], workspace: Workspace
) -> Gradients:
    """The gradients of the exact KL. The teacher's logits are computed in the same way as the student's.

    So the KL of a model to itself is 0 to the last bit. A chunk is one tile, because the teacher's logits need a matrix
    product too.
    """
    teacher = Workspace(signal.unembedding, workspace.chunk)

    def loss(rows: slice, logits: Tensor) -> None:
        teacher_logits = teacher.logits(teacher.products(signal.hidden[rows, column]))
        log_p = teacher_logits.to(logits.dtype).log_softmax(1)
        log_q = logits.log_softmax(1)
        p = log_p.exp()
        torch.sub(log_q.exp(), p, out=logits)
        add_losses(log_p.sub_(log_q).mul_(p).sum(1))

    return product_gradients(h, workspace, loss, tile=workspace.chunk)


def _kl_terms(log_q: Tensor, target: SparseSignal) -> tuple[Tensor, Tensor, Tensor]:
    """From log q at the kept ids [..., K]: the KL [...], alpha [...] and beta [..., K].

    The gradient at the logits is alpha q, minus beta at the kept ids. Where the student's tail is below TAIL_FLOOR, the
    KL stops growing and the ids of the tail get no gradient. The kept ids still get theirs, q - p, which moves mass
    back to the tail.
    """
    p = target.probs.to(log_q.dtype)
    kl, mass = target.neg_entropy.to(log_q.dtype) - (p * log_q).sum(-1), p.sum(-1)
    if not target.has_tail:
        return kl, mass, p
    tail = target.tail.to(log_q.dtype)
    q = log_q.exp().masked_fill_(p == 0, 0.0)
    student_tail = 1.0 - q.sum(-1)
    floored = student_tail.clamp_min(TAIL_FLOOR)
    rho = torch.where(student_tail > TAIL_FLOOR, tail / floored, 0.0)
    return kl - tail * floored.log(), mass + tail - rho, p - rho[..., None] * q


def _first_pass(
    values: Tensor,
    h: Tensor,
    workspace: Workspace,
    signal: SparseSignal,
    columns: range,
) -> _Candidates:
    """Add the KL of one student layer h [T, d] to each candidate into values [J]; return what the gradients share."""
    weight, vocab = workspace.unembedding.weight, workspace.unembedding.vocab
    (tokens, _), kept = h.shape, signal.ids.shape[2]
    wide = accumulator(weight.dtype)
    heavy = min(HEAVY, vocab) if signal.has_tail else 1
    candidates = _Candidates(
        columns=columns,
        log_q=h.new_empty(tokens, len(columns), kept, dtype=wide),
        log_sum=h.new_empty(tokens, 1, dtype=wide),
        heavy_ids=h.new_empty(tokens, heavy, dtype=torch.int64),
        heavy_log_q=h.new_empty(tokens, heavy, dtype=wide),
        light=h.new_empty(tokens, weight.shape[1], dtype=weight.dtype),
        bucket=None if signal.bucket is None else bucket_surprisal(h, workspace, signal.bucket.outside),
    )
    within = slice(columns.start, columns.stop)

    def collect(rows: slice, heavy_ids: Tensor, log_q: Tensor, log_sum: Tensor) -> None:
        candidates.heavy_ids[rows], candidates.heavy_log_q[rows] = heavy_ids, log_q[:, :heavy]
        candidates.log_q[rows] = log_q[:, heavy:].unflatten(1, (len(columns), kept))
        candidates.log_sum[rows] = log_sum

    ids = signal.ids[:, within].flatten(1)
    for rows, light in probability_chunks(h, workspace, ids, heavy, collect):
        candidates.light[rows] = times_weight(light, weight[:vocab]).to(weight.dtype)
    some = signal.part(slice(None), within)
    kl, _, _ = _kl_terms(candidates.log_q, some)
    if candidates.bucket is not None and some.bucket is not None:
        kl = kl + some.bucket.mass * candidates.bucket[0][:, None]
    values[within] += kl.sum(0, dtype=values.dtype)
    return candidates


def _second_pass(
    gradient: Tensor, unembedding: Unembedding, signal: SparseSignal, column: int, candidates: _Candidates
) -> Tensor:
    """The KL of one student layer to one of its candidates, summed over tokens. Fills in `gradient` [T, d]."""
    target = signal.part(slice(None), column)
    log_q = candidates.log_q[:, column - candidates.columns.start]
    kl, alpha, beta = _kl_terms(log_q, target)
    heavy_q = candidates.heavy_log_q.exp()
    at_light, at_heavy = alpha * heavy_q[:, 0], alpha[:, None] * heavy_q
    slope, heavy_slope = (cap_slope(x + candidates.log_sum, unembedding) for x in (log_q, candidates.heavy_log_q))
    if slope is not None and heavy_slope is not None:
        beta, at_heavy = beta * slope, at_heavy * heavy_slope
    for rows in row_chunks(len(gradient), rows_per_chunk(candidates.heavy_ids.shape[1] * beta.shape[1])):
        ids, heavy_ids = target.ids[rows], candidates.heavy_ids[rows]
        same = heavy_ids[:, :, None] == ids[:, None, :]
        heavy = at_heavy[rows] - (same * beta[rows, None, :]).sum(2)
        light = beta[rows].masked_fill(same.any(1), 0.0)
        sparse = torch.nn.functional.embedding_bag(
            torch.cat((heavy_ids, ids), 1),
            unembedding.weight,
            per_sample_weights=torch.cat((heavy, -light), 1).to(unembedding.weight.dtype),
            mode="sum",
        )
        gradient[rows] = (at_light[rows, None] * candidates.light[rows] + unembedding.scale * sparse).to(gradient.dtype)
    if candidates.bucket is not None and target.bucket is not None:
        surprisal, pull = candidates.bucket
        kl = kl + target.bucket.mass * surprisal
        gradient += (target.bucket.mass[:, None] * pull).to(gradient.dtype)
    return kl.sum(dtype=torch.float64)


def _add_exact(
    values: Tensor, h: Tensor, unembedding: Unembedding, signal: HiddenSignal, window: Sequence[range], chunk: int
) -> None:
    """Add the exact KL of each pair in the window into values [S, J]. A chunk's teacher logits are computed once."""
    wide = accumulator(unembedding.weight.dtype)
    for rows in row_chunks(h.shape[1], max(1, chunk // (len(h) + 1))):
        log_q = [wide_logits(layer[rows], unembedding).log_softmax(1) for layer in h]
        for column in sorted({column for columns in window for column in columns}):
            log_p = wide_logits(signal.hidden[rows, column], signal.unembedding).to(wide).log_softmax(1)
            p = log_p.exp()
            for layer, columns in enumerate(window):
                if column in columns:
                    values[layer, column] += (log_p - log_q[layer]).mul_(p).sum(dtype=values.dtype)


def _check(h: Tensor, unembedding: Unembedding, signal: Signal, layers: Sequence[object]) -> None:
    tokens = len(signal.hidden if isinstance(signal, HiddenSignal) else signal.ids)
    if h.dim() != 3 or h.shape[1] != tokens or len(h) != len(layers):
        raise ValueError(
            f"h is {tuple(h.shape)} [student layers, tokens, width], but the signal has {tokens} tokens "
            f"and there are {len(layers)} windows or matches"
        )
    if isinstance(signal, HiddenSignal) and signal.unembedding.vocab != unembedding.vocab:
        raise ValueError(
            f"the teacher's head is cut to {signal.unembedding.vocab} ids, the student's to {unembedding.vocab}: "
            "both must be the common vocabulary"
        )
