"""The losses in naive form: dense logits and autograd, in the dtype of the inputs.

S student layers, J teacher layers, T tokens, K kept ids, V vocabulary, d width."""

import torch

from pipeline.signal import HiddenSignal, SparseSignal, Unembedding


def dense_logits(h, head):
    bias = 0 if head.bias is None else head.bias
    logits = (head.scale * (h @ head.weight.T + bias))[..., : head.vocab]
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def dense_ce(h, head, labels):
    log_probs = dense_logits(h, head).log_softmax(-1)
    return -log_probs.gather(-1, labels.expand(len(h), -1)[..., None]).sum((1, 2))


def dense_kl(h, head, signal, column):
    """h [T, d] -> the KL of each token [T]."""
    log_q = dense_logits(h, head).log_softmax(-1)
    if isinstance(signal, HiddenSignal):
        log_p = dense_logits(signal.hidden[:, column].to(h.dtype), as_dtype(signal.unembedding, h.dtype)).log_softmax(
            -1
        )
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    kl = []
    for t in range(len(h)):
        kept = signal.probs[t, column] > 0
        p, ids, r = (
            signal.probs[t, column][kept].to(h.dtype),
            signal.ids[t, column][kept],
            signal.tail[t, column].to(h.dtype),
        )
        one = (p * (p.log() - log_q[t, ids])).sum()
        if r > 0:
            rest = torch.ones(head.vocab, dtype=torch.bool).index_fill(0, ids, False)
            one = one + r * (r.log() - log_q[t, rest].logsumexp(0))
        kl.append(one)
    return torch.stack(kl) if kl else h.sum(-1)


def as_dtype(head, dtype):
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return Unembedding(head.weight.detach().to(dtype), head.vocab, bias, head.scale, head.softcap)


def make_head(vocab, width, dtype=torch.float64, padding=0, bias=False, scale=1.0, softcap=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab + padding, width, generator=generator, dtype=torch.float64) / width**0.5
    bias = torch.randn(vocab + padding, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return Unembedding(weight.to(dtype), vocab, bias, scale, softcap)


def make_h(*shape, dtype=torch.float64, spread=2.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def topk_signal(probs, kept, tail=True):
    """The k most likely ids of dense probabilities [T, J, V]. The others are the tail; or dropped, p renormalised."""
    p, ids = probs.topk(kept, -1)
    if not tail:
        p = p / p.sum(-1, keepdim=True)
    rest = probs.clone().scatter_(-1, ids, 0).sum(-1) if tail else torch.zeros_like(p[..., 0])
    neg_entropy = torch.special.xlogy(p, p).sum(-1) + torch.special.xlogy(rest, rest)
    return SparseSignal(ids, p, rest, neg_entropy, has_tail=tail)


def random_probs(tokens, teachers, vocab, spread=2.0, seed=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(
        spread * torch.randn(tokens, teachers, vocab, generator=generator, dtype=torch.float64), -1
    ).to(dtype)


def grads(loss, *inputs, unused=False):
    return torch.autograd.grad(loss, inputs, allow_unused=unused, retain_graph=True)


def assert_as_accurate(ours, reference, truth, tiny):
    """Check that the error of `ours` is at most that of the naive `reference`, plus `tiny` (relative).

    The error is the norm of the difference to the float64 `truth`.
    """
    ours, reference, truth = ours.double(), reference.double(), truth.double()
    error, naive = (ours - truth).norm(), (reference - truth).norm()
    assert error <= naive + tiny * truth.norm() + 1e-12, (
        f"error {error:.3e}, naive {naive:.3e}, truth {truth.norm():.3e}"
    )
