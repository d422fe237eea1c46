"""The losses beside the matrix products that they cannot do without, dense torch, and other packages.

`make bench-losses` leaves bench/results/losses.json. Times are wall seconds, forms run in turn, ratios are medians over
the rounds; memory is by how much a fresh process's resident peak grows. One student layer with its candidates is the
unit in which ours, dense torch and the peers are compared; the floor is compared with all student layers. Weights are
frozen but where an entry says "trained".
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.other_losses import liger_pair, naive, naive_cross_entropy, naive_shared, trl_pair
from bench.timing import interleaved, machine, peak_mib, ratio, write_results
from pipeline.loss.linear_ce import linear_cross_entropy
from pipeline.loss.matching import adaptive, search_ranges
from pipeline.loss.sparse_kl import column_kl, kl_matrix, matched_kl
from pipeline.teacher.signal import SparseSignal, Unembedding

FEWER = 2
"""Rounds of what is slow or not near its goal."""

NOT_RUN = {
    "liger_fused": "its fused kernels are Triton's: they need a GPU",
    "cut_cross_entropy": "its kernels are Triton's: they need a GPU",
}
"""Peers that this bench has no figures for, and why."""


@dataclass(frozen=True)
class Case:
    """What is measured: by default a small student's head beside a large teacher's layers."""

    tokens: int = 256
    width: int = 1536
    vocab: int = 151_936
    students: int = 7
    teachers: int = 20
    kept: int = 64
    """Ids a teacher layer names for a token; no tail, as the default codec."""


QUICK = Case(tokens=32, width=64, vocab=5_000)


def normal(*shape: int, spread: float, seed: int) -> Tensor:
    """Random numbers in bfloat16, without a float32 copy in between."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=spread, generator=generator)


@cache
def head_weight(vocab: int, width: int) -> Tensor:
    """[V, d]; drawing it takes seconds, and all problems may have the same."""
    return normal(vocab, width, spread=width**-0.5, seed=0)


class Problem:
    """Tensors of a case, in bfloat16; the student's distributions have an entropy of about ln V - 8 nat."""

    def __init__(self, case: Case, trained: bool = False):
        generator = torch.Generator().manual_seed(0)

        self.case = case
        self.h = normal(case.students, case.tokens, case.width, spread=4.0, seed=1).requires_grad_()
        self.hidden = normal(case.tokens, case.width, spread=4.0, seed=2)
        self.weight = head_weight(case.vocab, case.width).detach().requires_grad_(trained)
        self.head = Unembedding(self.weight, case.vocab)
        said = (case.tokens, case.teachers, case.kept)
        ids = torch.randint(case.vocab, said, generator=generator)
        probs = torch.full(said, 1 / case.kept)
        self.signal = SparseSignal(ids, probs, torch.zeros(said[:2]), probs.log().mean(-1), tailed=False)
        self.labels = ids[:, 0, 0].contiguous()
        self.windows = search_ranges(case.students, case.teachers)

    def clear(self) -> None:
        """Forget gradients, so that every run allocates its own."""
        self.h.grad = self.weight.grad = None


def interaction(problem: Problem) -> tuple[Tensor, list[int]]:
    """Ours: search, draw, and the gradient of what was drawn, for all student layers. KL [S, J] and the match."""
    matrix = kl_matrix(problem.h, problem.head, problem.signal, problem.windows)
    match = adaptive(matrix.values / problem.case.tokens, torch.Generator().manual_seed(0))
    matched_kl(problem.h, problem.head, problem.signal, match, matrix).sum().backward()
    return matrix.values, [column for column in match if column is not None]


def products(problem: Problem, layers: int, trained: bool = False) -> None:
    """The floor: two products a student layer, three where the head is trained, into memory that is there already."""
    case, weight = problem.case, problem.weight.detach()
    logits, gradient = weight.new_empty(case.tokens, case.vocab), weight.new_empty(case.tokens, case.width)
    of_weight = torch.empty_like(weight) if trained else None
    for h in problem.h.detach()[:layers]:
        torch.mm(h, weight.T, out=logits)
        torch.mm(logits, weight, out=gradient)
        if of_weight is not None:
            torch.mm(logits.T, h, out=of_weight)


def dense_form(problem: Problem, form: Callable[..., Tensor]) -> Tensor:
    """One student layer by a dense form, following the first of its candidates."""
    columns = problem.windows[0]
    return form(problem.h[0], problem.weight, problem.signal, columns, columns.start)


def ready(case: Case, threads: int, work: Callable[[Problem], object], trained: bool = False) -> Callable[[], object]:
    """The work on a fresh problem, for a process that measures its memory."""
    torch.set_num_threads(threads)
    return partial(work, Problem(case, trained))


def agreement(problem: Problem) -> dict[str, float]:
    """How far our values and gradient are from dense torch's in the same dtype, relative, norm for norm."""
    values, match = interaction(problem)
    assert problem.h.grad is not None
    ours, columns = problem.h.grad[0].double(), problem.windows[0]
    problem.clear()
    dense = naive_shared(problem.h[0], problem.weight, problem.signal, columns, match[0]).double()
    theirs = problem.h.grad[0].double()
    problem.clear()
    return {
        "value_difference": float((values[0, columns.start : columns.stop] - dense).norm() / dense.norm()),
        "gradient_difference": float((ours - theirs).norm() / theirs.norm()),
    }


def fresh(problem: Problem, work: Callable[[Problem], object]) -> Callable[[], None]:
    """The work as it is timed: without gradients left by the one before."""

    def run() -> None:
        problem.clear()
        work(problem)

    return run


def compare_interaction(case: Case, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """The interaction loss beside its floor, dense torch, and what TRL and Liger have for a pair of layers."""
    whole, layer = Problem(case), Problem(replace(case, students=1, teachers=case.teachers - case.students + 1))
    floor = interleaved({"floor": partial(products, whole, case.students), "ours": fresh(whole, interaction)}, rounds)
    forms: dict[str, Callable[[], object]] = {
        "ours": fresh(layer, interaction),
        "naive": fresh(layer, partial(dense_form, form=naive)),
        "naive_shared": fresh(layer, partial(dense_form, form=naive_shared)),
    }
    peers, absent = peer_forms(layer)
    seconds = interleaved({**forms, **peers}, FEWER)
    memory = {
        "ours": peak_mib(partial(ready, case, threads, interaction)),
        "naive": peak_mib(partial(ready, layer.case, threads, partial(dense_form, form=naive))),
        "naive_shared": peak_mib(partial(ready, layer.case, threads, partial(dense_form, form=naive_shared))),
    }
    entry = {
        **asdict(case),
        "dtype": "bfloat16",
        "time_over_floor": ratio(floor["ours"], floor["floor"]),
        "naive_over_ours_time": ratio(seconds["naive"], seconds["ours"]),
        "naive_over_ours_memory": memory["naive"] / memory["ours"],
        "naive_shared_over_ours_time": ratio(seconds["naive_shared"], seconds["ours"]),
        "naive_shared_over_ours_memory": memory["naive_shared"] / memory["ours"],
        "seconds": {name: statistics.median(times) for name, times in floor.items()},
        "seconds_one_layer": {name: statistics.median(seconds[name]) for name in forms},
        "ratios_by_round": [o / f for o, f in zip(floor["ours"], floor["floor"], strict=True)],
        "peak_mib": memory,
        "memory_note": "ours: all student layers; dense torch: one of them, the others would add to it",
        **agreement(layer),
    }
    return {"interaction": entry, **peer_entries(layer, seconds, absent)}


def peer_forms(layer: Problem) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What can be timed of other packages here, and why the rest cannot."""
    forms: dict[str, Callable[[], object]] = {}
    absent = dict(NOT_RUN)
    h, weight, hidden = layer.h[0], layer.weight, layer.hidden
    try:
        trl = trl_pair(h, weight, hidden)
        forms |= {"trl_forward": partial(trl, False), "trl_both": fresh(layer, lambda _: trl(True))}
    except ImportError as error:
        absent["trl_chunked"] = f"not installed: {error}"
    try:
        liger = liger_pair(h, weight, hidden)
        forms["liger_both"] = fresh(layer, lambda _: liger())
    except ImportError as error:
        absent["liger_chunked"] = f"not installed: {error}"
    return forms, absent


def peer_entries(layer: Problem, seconds: dict[str, list[float]], absent: dict[str, str]) -> dict[str, dict[str, Any]]:
    """A pair's time, times what a student layer's candidates need of it, over ours for a student layer."""
    candidates = len(layer.windows[0])
    entries: dict[str, dict[str, Any]] = {name: {"not_run": why} for name, why in absent.items()}
    if "trl_both" in seconds:
        searched = [
            (candidates - 1) * one + both for one, both in zip(seconds["trl_forward"], seconds["trl_both"], strict=True)
        ]
        entries["trl_chunked"] = {
            "over_ours_time": ratio(searched, seconds["ours"]),
            "seconds_a_pair": statistics.median(seconds["trl_both"]),
            "note": f"one pair timed; {candidates} forwards and one backward counted; float32 products on a CPU",
        }
    if "liger_both" in seconds:
        searched = [candidates * both for both in seconds["liger_both"]]
        entries["liger_chunked"] = {
            "over_ours_time": ratio(searched, seconds["ours"]),
            "seconds_a_pair": statistics.median(seconds["liger_both"]),
            "note": f"one pair timed; {candidates} counted; not compiled; makes the weight's gradient, too",
        }
    return entries


def cross_entropy(problem: Problem) -> None:
    linear_cross_entropy(problem.h[:1], problem.head, problem.labels).sum().backward()


def dense_cross_entropy(problem: Problem) -> None:
    naive_cross_entropy(problem.h[0], problem.weight, problem.labels)


def last_layer(problem: Problem) -> None:
    column_kl(problem.h[0], problem.head, problem.signal, -1).backward()


def compare_one_layer(case: Case, threads: int) -> dict[str, dict[str, Any]]:
    """Cross-entropy with a frozen head (stage 1) and a trained one (reinforcement), and the last layer's KL."""
    case = replace(case, students=1)
    entries: dict[str, dict[str, Any]] = {}
    for name, work, trained in (
        ("cross_entropy_frozen", cross_entropy, False),
        ("cross_entropy_trained", cross_entropy, True),
        ("last_layer_trained", last_layer, True),
    ):
        problem = Problem(case, trained)
        forms: dict[str, Callable[[], object]] = {
            "floor": partial(products, problem, 1, trained),
            "ours": fresh(problem, work),
        }
        if work is cross_entropy:
            forms["naive"] = fresh(problem, dense_cross_entropy)
        seconds = interleaved(forms, FEWER)
        peak = {"ours": peak_mib(partial(ready, case, threads, work, trained))}
        entries[name] = {
            "time_over_floor": ratio(seconds["ours"], seconds["floor"]),
            "products": 3 if trained else 2,
            "seconds": {form: statistics.median(times) for form, times in seconds.items()},
            "peak_mib": peak,
        }
        if work is cross_entropy:
            peak["naive"] = peak_mib(partial(ready, case, threads, dense_cross_entropy, trained))
            entries[name] |= {
                "naive_over_ours_time": ratio(seconds["naive"], seconds["ours"]),
                "naive_over_ours_memory": peak["naive"] / peak["ours"],
            }
    return entries


def show(results: dict[str, Any], console: Console) -> None:
    """The entries' ratios as a table."""
    table = Table("entry", "ours / products, time", "it / ours, time", "it / ours, memory")
    entries = {name: entry for name, entry in results.items() if isinstance(entry, dict)}
    for name, entry in entries.items():
        naive = [entry.get(f"naive_over_ours_{what}", entry.get(f"over_ours_{what}")) for what in ("time", "memory")]
        cells = ("" if x is None else f"{x:.2f}" for x in (entry.get("time_over_floor"), *naive))
        if "not_run" not in entry:
            table.add_row(name, *cells)
    console.print(table, "it: dense torch, or the peer that gives the entry its name", sep="\n")
    for name, entry in entries.items():
        if "not_run" in entry:
            console.print(f"{name}: not run, {entry['not_run']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the interaction loss and its floor (4)")
    parser.add_argument("--quick", action="store_true", help="a small case, to try the script; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = QUICK if arguments.quick else Case()
    results: dict[str, Any] = {
        **machine(),
        **compare_interaction(case, arguments.rounds, arguments.threads),
        **compare_one_layer(case, arguments.threads),
    }
    console = Console()
    show(results, console)
    if not arguments.quick:
        console.print(f"written: {write_results('losses', results)}")


if __name__ == "__main__":
    main()
