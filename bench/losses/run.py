"""Compare the losses with their unavoidable matrix products, with dense torch, and with other packages.

`make bench-losses` writes bench/results/losses.json (losses_gpu.json if torch finds a GPU). Times are wall seconds; the
forms run in turn; ratios are medians over the rounds. Memory is the growth of its peak. "ours", dense torch and the
other packages are compared on one student layer with its candidates. The floor (the products, into memory that already
exists) is compared on all student layers. Weights are frozen unless an entry says "trained".
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.losses.peers import (
    cut_cross_entropy,
    liger_cross_entropy,
    liger_pair,
    naive,
    naive_cross_entropy,
    naive_frugal,
    naive_shared,
    trl_pair,
)
from bench.losses.problem import DEVICE, Case, Problem, interaction
from bench.timing import interleaved, machine, peak_mib, ratio, write_results
from pipeline.loss.linear_ce import linear_cross_entropy
from pipeline.loss.sparse_kl import column_kl

ON_GPU = DEVICE == "cuda"

FEW_ROUNDS = 4
"""Number of rounds for forms that are slow or far from their goal."""

FUSED = {"liger_fused": liger_cross_entropy, "cut_cross_entropy": cut_cross_entropy}
"""Other packages' cross-entropy of a language head; their kernels are in Triton."""


QUICK = Case(tokens=32, width=64, vocab=5_000)
GPU_CASES = {
    "interaction": Case(tokens=4096, teachers=14),
    "interaction_wide": Case(tokens=4096, width=3584, teachers=14),
}
GPU_DENSE_TOKENS = 512
"""Tokens of the comparison with dense torch there; with 4,096 it would need more memory than a card has."""


def products(problem: Problem, layers: int, trained: bool = False) -> Callable[[], None]:
    """The floor: two products per student layer, three with a trained head, into memory that already exists.

    Only the third product allocates: its output becomes the weight's gradient, which is new in every step.
    """
    case, weight, h = problem.case, problem.weight.detach(), problem.h.detach()
    logits, gradient = weight.new_empty(case.tokens, case.vocab), weight.new_empty(case.tokens, case.width)

    def run() -> None:
        for layer in h[:layers]:
            torch.mm(layer, weight.T, out=logits)
            torch.mm(logits, weight, out=gradient)
            if trained:
                torch.mm(logits.T, layer)

    return run


def dense_form(problem: Problem, form: Callable[..., Tensor]) -> Tensor:
    """One student layer in a dense form, which follows the first of its candidates."""
    columns = problem.ranges[0]
    return form(problem.h[0], problem.weight, problem.signal, columns, columns.start)


def prepared(
    case: Case, threads: int, work: Callable[[Problem], object], trained: bool = False
) -> Callable[[], object]:
    """The work on a new problem, for a process that measures its memory."""
    torch.set_num_threads(threads)
    return partial(work, Problem(case, trained))


def agreement(problem: Problem) -> dict[str, float]:
    """Relative differences (of norms) between our values and gradient and dense torch's in the same dtype."""
    problem.clear()
    values, match = interaction(problem)
    assert problem.h.grad is not None
    ours, columns = problem.h.grad[0].double(), problem.ranges[0]
    problem.clear()
    dense = naive_shared(problem.h[0], problem.weight, problem.signal, columns, match[0]).double()
    theirs = problem.h.grad[0].double()
    problem.clear()
    return {
        "value_difference": float((values[0, columns.start : columns.stop] - dense).norm() / dense.norm()),
        "gradient_difference": float((ours - theirs).norm() / theirs.norm()),
    }


def without_old_gradients(problem: Problem, work: Callable[[Problem], object]) -> Callable[[], None]:
    """The work to be timed, with the gradients of earlier runs dropped first."""

    def run() -> None:
        problem.clear()
        work(problem)

    return run


NAIVE = {"naive": naive, "naive_shared": naive_shared, "naive_frugal": naive_frugal}
"""Dense torch: as in most libraries; with one log-softmax for all candidates; and with a graph for only one of them."""


def compare_floor(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    """The interaction loss of all student layers against its products."""
    whole = Problem(case)
    floor = interleaved(
        {"floor": products(whole, case.students), "ours": without_old_gradients(whole, interaction)}, rounds
    )
    return {
        **asdict(case),
        "dtype": "bfloat16",
        "time_over_floor": ratio(floor["ours"], floor["floor"]),
        "seconds": {name: statistics.median(times) for name, times in floor.items()},
        "ratios_by_round": [o / f for o, f in zip(floor["ours"], floor["floor"], strict=True)],
        "peak_mib": {"ours": peak_mib(partial(prepared, case, threads, interaction))},
    }


def compare_dense(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """One student layer against dense torch, and against TRL's and Liger's divergences of one pair of layers."""
    layer = Problem(replace(case, students=1, teachers=case.teachers - case.students + 1))
    works = {name: partial(dense_form, form=form) for name, form in NAIVE.items()}
    peers, absent = peer_forms(layer)
    forms = {name: without_old_gradients(layer, work) for name, work in {"ours": interaction, **works}.items()}
    seconds = interleaved({**forms, **peers}, FEW_ROUNDS)
    ours = peak_mib(partial(prepared, case, threads, interaction))
    peak = {name: peak_mib(partial(prepared, layer.case, threads, work)) for name, work in works.items()}
    entry: dict[str, Any] = {"seconds_one_layer": {name: statistics.median(seconds[name]) for name in forms}}
    for name in NAIVE:
        entry[f"{name}_over_ours_time"] = ratio(seconds[name], seconds["ours"])
        entry[f"{name}_over_ours_memory"] = peak[name] / ours
    note = "ours: all student layers; dense torch: one of them, the others would add to it"
    entry |= {"dense_peak_mib": {"ours": ours, **peak}, "memory_note": note, **agreement(layer)}
    return entry, peer_entries(layer, seconds, absent)


def interaction_over_peers(layer: Problem) -> dict[str, dict[str, Any]]:
    """Other packages' divergences of one student layer, over our time for it."""
    peers, absent = peer_forms(layer)
    seconds = interleaved({"ours": without_old_gradients(layer, interaction), **peers}, FEW_ROUNDS)
    return peer_entries(layer, seconds, absent)


def peer_forms(layer: Problem) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """(other packages' forms that can be timed here, {entry: reason} for those that cannot)."""
    h, weight, hidden = layer.h[0], layer.weight, layer.hidden
    forms: dict[str, Callable[[], object]] = {}
    absent: dict[str, str] = {}
    trl, why = tried(lambda: partial(trl_pair(h, weight, hidden), False))
    if trl is None:
        absent["trl_chunked"] = why
    else:
        both = partial(trl_pair(h, weight, hidden), True)
        forms |= {"trl_forward": trl, "trl_both": without_old_gradients(layer, lambda _: both())}
    liger, why = tried(lambda: liger_pair(h, weight, hidden))
    if liger is None:
        absent["liger_chunked"] = why
    else:
        forms["liger_both"] = without_old_gradients(layer, lambda _: liger())
    return forms, absent


def tried(make: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object] | None, str]:
    """(another package's form once it has run, or None; why it cannot run here).

    Its kernels may not fit the device, its memory, or the installed Triton: that must not end our own measurement.
    """
    try:
        form = make()
        form()
    except ImportError as error:
        return None, f"not installed: {error}"
    except Exception as error:
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return form, ""


def peer_entries(layer: Problem, seconds: dict[str, list[float]], absent: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The time of one pair, multiplied by the pairs that a student layer needs, over our time for a student layer."""
    candidates = len(layer.ranges[0])
    entries: dict[str, dict[str, Any]] = {name: {"not_run": why} for name, why in absent.items()}
    if "trl_both" in seconds:
        searched = [
            (candidates - 1) * one + both for one, both in zip(seconds["trl_forward"], seconds["trl_both"], strict=True)
        ]
        entries["trl_chunked"] = {
            "over_ours_time": ratio(searched, seconds["ours"]),
            "seconds_a_pair": statistics.median(seconds["trl_both"]),
            "note": f"one pair timed; {candidates} forwards and one backward counted"
            + ("" if ON_GPU else "; float32 products on a CPU, where it is not at home"),
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
            "floor": products(problem, 1, trained),
            "ours": without_old_gradients(problem, work),
        }
        absent: dict[str, str] = {}
        if work is cross_entropy:
            fused, absent = fused_forms(problem)
            forms |= {"naive": without_old_gradients(problem, dense_cross_entropy), **fused}
        seconds = interleaved(forms, FEW_ROUNDS)
        peak = {"ours": peak_mib(partial(prepared, case, threads, work, trained))}
        entries[name] = {
            "time_over_floor": ratio(seconds["ours"], seconds["floor"]),
            "products": 3 if trained else 2,
            "seconds": {form: statistics.median(times) for form, times in seconds.items()},
            "peak_mib": peak,
            "peers_not_run": absent,
        }
        if work is cross_entropy:
            peak["naive"] = peak_mib(partial(prepared, case, threads, dense_cross_entropy, trained))
            entries[name] |= {
                "naive_over_ours_time": ratio(seconds["naive"], seconds["ours"]),
                "naive_over_ours_memory": peak["naive"] / peak["ours"],
                **{f"{name}_over_ours_time": ratio(seconds[name], seconds["ours"]) for name in FUSED if name in forms},
            }
    return entries


def fused_forms(problem: Problem) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """(other packages' fused cross-entropy, {name: reason} for those that cannot run here)."""
    if not ON_GPU:
        return {}, dict.fromkeys(FUSED, "its kernels are Triton's and need a GPU")
    forms: dict[str, Callable[[], object]] = {}
    absent: dict[str, str] = {}
    for name, make in FUSED.items():
        run, why = tried(partial(make, problem.h[0], problem.weight, problem.labels))
        if run is None:
            absent[name] = why
        else:
            forms[name] = without_old_gradients(problem, lambda _, run=run: run())  # type: ignore[misc]
    return forms, absent


def show(results: dict[str, Any], console: Console) -> None:
    """Print the entries' ratios as a table."""
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
        for peer, why in entry.get("peers_not_run", {}).items():
            console.print(f"{peer} beside {name}: not run, {why}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the interaction loss and its floor (10)")
    parser.add_argument("--quick", action="store_true", help="a small case, to try the script; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = {"interaction": QUICK} if arguments.quick else GPU_CASES if ON_GPU else {"interaction": Case()}
    results: dict[str, Any] = machine()
    for name, case in cases.items():
        results[name] = compare_floor(case, arguments.rounds, arguments.threads)
    case = cases["interaction"]
    dense, peers = compare_dense(replace(case, tokens=min(case.tokens, GPU_DENSE_TOKENS)), arguments.threads)
    results["interaction"] |= dense
    results |= {**peers, **compare_one_layer(case, arguments.threads)}
    console = Console()
    show(results, console)
    if not arguments.quick:
        console.print(f"written: {write_results('losses_gpu' if ON_GPU else 'losses', results)}")
