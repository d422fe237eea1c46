"""Error of a coded teacher against the dense one: in the KL, in its gradient, and in the matching's draw.

T tokens of one batch, J teacher layers, S student layers, P pairs of a student and a teacher layer, K kept ids, d
width, V vocabulary. The pairs are those in the search ranges of the matching, and the pair of the last layers. The
computation is dense and naive, and shares no code with the project's losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bench.cache.layer_outputs import LayerOutputs
from pipeline.loss.matching import draw_probabilities, search_ranges
from pipeline.signal import HiddenSignal, Signal, SparseSignal

ROWS = 32
"""Number of tokens whose logits, of all layers, exist at the same time."""


@dataclass(frozen=True)
class Divergences:
    """KL of each pair and token of a batch [P, T], and its gradient at the student's head input [P, T, d]."""

    kl: Tensor
    gradient: Tensor


@dataclass
class CodecError:
    """Error of one codec, collected over batches of equal size; each value is [P] float64."""

    pairs: list[tuple[int, int]]
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    draw_tv: list[float] = field(default_factory=list)
    """Total variation of the draw: one value per batch and student layer."""

    def add(self, true: Divergences, coded: Divergences, inputs: Tensor) -> None:
        """Add a batch; inputs [P, T, d] are the student's head inputs."""
        error = (coded.kl - true.kl).double()
        token, coded_token = true.gradient.double(), coded.gradient.double()
        layer, coded_layer = (one.transpose(1, 2) @ inputs.double() for one in (token, coded_token))  # sum_t g_t x_t^T
        self.batches.append(
            {
                "bias": error.mean(1),
                "squared": error.square().mean(1),
                "token_error": (coded_token - token).square().sum((1, 2)),
                "token_norm": token.square().sum((1, 2)),
                "layer_error": (coded_layer - layer).square().sum((1, 2)),
                "layer_norm": layer.square().sum((1, 2)),
                "cosine": torch.cosine_similarity(layer.flatten(1), coded_layer.flatten(1)),
            }
        )
        self.draw_tv += _draw_tv(self.pairs, true.kl.mean(1), coded.kl.mean(1))

    def summary(self, groups: Mapping[str, range]) -> dict[str, object]:
        """Averages over teacher layers with equal weights: over all layers, and over each group of teacher columns.

        A relative error is sqrt(sum of squared errors / sum of squared norms).
        """
        averages = {name: torch.stack([batch[name] for batch in self.batches]).mean(0) for name in self.batches[0]}
        per_pair = {
            "kl_bias_nats": averages["bias"],
            "kl_rms_nats": averages["squared"].sqrt(),
            "grad_relative_error_token": (averages["token_error"] / averages["token_norm"]).sqrt(),
            "grad_relative_error_batch": (averages["layer_error"] / averages["layer_norm"]).sqrt(),
            "grad_cosine_batch": averages["cosine"],
        }
        layers = range(max(layer for _, layer in self.pairs) + 1)
        bias = torch.tensor([self._mean(batch["bias"], layers) for batch in self.batches])
        return {
            **{name: self._mean(value, layers) for name, value in per_pair.items()},
            "kl_bias_standard_error": float(bias.std()) / len(bias) ** 0.5,
            "draw_tv": sum(self.draw_tv) / len(self.draw_tv),
            "groups": {
                group: {name: self._mean(value, columns) for name, value in per_pair.items()}
                for group, columns in groups.items()
            },
        }

    def _mean(self, per_pair: Tensor, columns: range) -> float:
        """Mean over the given teacher layers of the mean over each layer's pairs."""
        of_layers = [[value for value, (_, j) in zip(per_pair, self.pairs, strict=True) if j == c] for c in columns]
        return float(torch.stack([torch.stack(one).mean() for one in of_layers]).mean())


def candidate_pairs(students: int, teachers: int) -> list[tuple[int, int]]:
    """(student, teacher) layer pairs of the search ranges, followed by the pair of the last layers."""
    ranges = search_ranges(students, teachers)
    return [(i, j) for i, columns in enumerate(ranges) for j in columns] + [(students, teachers)]


@torch.no_grad()
def batch_divergences(
    outputs: LayerOutputs, pairs: list[tuple[int, int]], rows: slice, signals: Mapping[str, Signal]
) -> tuple[Divergences, dict[str, Divergences]]:
    """(true divergences, divergences from each signal) for a batch of tokens; the signals hold all tokens."""
    truth, found = [], {name: [] for name in signals}  # type: tuple[list[Divergences], dict[str, list[Divergences]]]
    for start in range(rows.start, rows.stop, ROWS):
        chunk = slice(start, min(start + ROWS, rows.stop))
        student = outputs.student[chunk].transpose(0, 1)
        log_q = outputs.student_unembedding.logits(student).log_softmax(-1)
        student_mean = log_q.exp() @ outputs.student_weight
        teacher = outputs.teacher[chunk].transpose(0, 1)
        truth.append(_dense(outputs, pairs, log_q, student_mean, outputs.unembedding.logits(teacher)))
        for name, signal in signals.items():
            if isinstance(signal, HiddenSignal):
                logits = signal.unembedding.logits(signal.hidden[chunk].transpose(0, 1))
                found[name].append(_dense(outputs, pairs, log_q, student_mean, logits))
            else:
                found[name].append(_sparse(outputs, pairs, log_q, student_mean, signal, chunk))
    return _concatenate(truth), {name: _concatenate(parts) for name, parts in found.items()}


def _dense(
    outputs: LayerOutputs, pairs: list[tuple[int, int]], log_q: Tensor, student_mean: Tensor, logits: Tensor
) -> Divergences:
    """KL = sum p (log p - log q), gradient E_q[W] - E_p[W].

    log_q [S + 1, t, V]; student_mean is E_q[W] [S + 1, t, d]; logits are the teacher's [J, t, V].
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    teacher_mean = p @ outputs.student_weight
    neg_entropy = (p * log_p).sum(-1)
    kl = torch.stack([neg_entropy[j] - (p[j] * log_q[i]).sum(-1) for i, j in pairs])
    return Divergences(kl, torch.stack([student_mean[i] - teacher_mean[j] for i, j in pairs]))


def _sparse(
    outputs: LayerOutputs,
    pairs: list[tuple[int, int]],
    log_q: Tensor,
    student_mean: Tensor,
    signal: SparseSignal,
    chunk: slice,
) -> Divergences:
    """KL and gradient with a tail r: rho = r / Q, where Q is the student's probability of the tail's ids.

    Gradient: (1 - rho) E_q[W] - sum (p - rho q) W.
    """
    kl, gradient = [], []
    for i, j in pairs:
        ids, p, r = signal.ids[chunk, j], signal.probs[chunk, j], signal.tail[chunk, j]
        log_q_at = log_q[i].gather(1, ids)
        q = log_q_at.exp().where(p > 0, 0.0)
        rest = (1.0 - q.sum(1)).clamp_min(1e-6)
        rho = r / rest
        kl.append(signal.neg_entropy[chunk, j] - (p * log_q_at).sum(1) - r * rest.log())
        kept = embedding_bag(ids, outputs.student_weight, per_sample_weights=p - rho[:, None] * q, mode="sum")
        gradient.append((p.sum(1) + r - rho)[:, None] * student_mean[i] - kept)
    return Divergences(torch.stack(kl), torch.stack(gradient))


def _concatenate(parts: list[Divergences]) -> Divergences:
    return Divergences(torch.cat([one.kl for one in parts], 1), torch.cat([one.gradient for one in parts], 1))


def _draw_tv(pairs: list[tuple[int, int]], true: Tensor, coded: Tensor) -> list[float]:
    """Total variation between the true and the coded draw of each student layer's first choice (Algorithm 1).

    true, coded: mean KLs [P].
    """
    found = []
    for student in sorted({i for i, _ in pairs[:-1]}):
        row = [number for number, (i, _) in enumerate(pairs[:-1]) if i == student]
        difference = draw_probabilities(true[row]) - draw_probabilities(coded[row])
        found.append(float(difference.abs().sum()) / 2)
    return found
