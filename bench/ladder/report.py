"""What has run so far as JSON, as the tables of docs/evidence.md and docs/evidence_regimes.md, and as figures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.ladder.arms import ARMS, BY_NAME, MAIN, Arm, arms_of
from bench.ladder.cells import TASKS, Cell, Scale
from bench.ladder.plan import SeedFolder
from bench.ladder.statistics import holm, interval, paired
from bench.ladder.sweep import choose, sweep, swept_arm
from bench.timing import machine, read_results, write_results

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("evidence.md", "evidence_regimes.md")
"""Those with tables."""
BASELINE = "finetune"
MODELS = (("Teacher", "teacher"), ("untouched student", "untouched"))
COMPARED = (
    ("interaction", "last_layer"),
    ("interaction", "teacher_answers"),
    ("interaction", "paper"),
    ("interaction_ce", "interaction"),
    ("interaction_ce", "last_layer_ce"),
    ("last_layer", "teacher_answers"),
    ("interaction", "teacher_answers_equal_time"),
    ("interaction", "random"),
    ("interaction", "cold"),
    ("ordered_argmin", "interaction"),
)
"""Arms whose difference is reported beside that from finetuning, which the table has."""
COMPARED_AFTERWARDS = (
    ("interaction", "logit_lens"),
    ("uniform", "distil_lens"),
    ("features_l2", "uniform"),
    ("wrong_verbalizers", "interaction"),
    ("wrong_verbalizers", "finetune_equal_time"),
    ("interaction_ce", "finetune_equal_time"),
)
"""Further ones, chosen when results had been seen: corrected apart, so that the others keep their p."""
PUBLISHED = ("cpu", "real")
"""Scales whose cells PAGES show."""
RECALLS = (0.5, 0.8, 0.95, 1.0)

Results = dict[str, Any]


def write(folder: Path, scale: Scale, name: str) -> None:
    """Write bench/results/ladder_NAME.json; at the scales in PUBLISHED also the tables of PAGES, and figures.

    A cell of which less has run here than the file has stays as it is there: cells may be made one by one, on several
    machines.
    """
    before = read_results(f"ladder_{name}").get("cells", {})
    now = {cell.name: _the_larger(before.get(cell.name, {}), cell_results(folder, cell, scale)) for cell in scale.cells}
    results = {
        "scale": name,
        "learning_rates": list(scale.learning_rates),
        "cells": {cell: found for cell, found in now.items() if found},
    }
    print(f"written to {write_results(f'ladder_{name}', results)}")
    if name in PUBLISHED:
        from bench.ladder import figure, regimes

        small, real = (read_results(f"ladder_{scale}").get("cells", {}) for scale in PUBLISHED)
        figure.draw(small, DOCS / "figures" / "ladder.svg")
        regimes.draw(small, DOCS / "figures" / "regimes.svg")
        for page in map(DOCS.joinpath, PAGES):
            page.write_text(with_tables(page.read_text(), {**small, **real}))


def _the_larger(before: Results, now: Results) -> Results:
    """A cell as it ran here if that has all that the file has, else as the file has it.

    Those of two machines are not mixed, for they are paired.
    """

    def missing() -> list[str]:
        ours = {name: len(arm["seeds"]) for name, arm in now.get("arms", {}).items()}
        return [name for name, arm in before.get("arms", {}).items() if ours.get(name, 0) < len(arm["seeds"])]

    if not (fewer := missing()):
        return now
    if now:
        print(f"{now['name']}: fewer seeds of {', '.join(fewer)} here than in the file, which stays as it is")
    return with_comparisons(before)


def cell_results(folder: Path, cell: Cell, scale: Scale) -> Results:
    """The settings of a cell, and {arm: results}; empty where no arm has run."""
    arms = {arm.name: found for arm in ARMS if (found := _arm(folder, cell, scale, arm))}
    if not arms:
        return {}
    models = {name: _untrained(folder, cell, name) for name in ("teacher", "untouched")}
    suspects = {"suspects": found} if (found := _suspects(folder, cell)) else {}
    made = {"commits": _commits(folder / cell.name), "reported": machine()}
    return with_comparisons({**asdict(cell), "made": made, **models, **suspects, "arms": arms})


def with_comparisons(cell: Results) -> Results:
    """A cell, as it ran or as the file has it, with the differences of its arms from finetuning and of both lists."""
    arms = cell["arms"]
    against = _differences(arms, [(name, BASELINE) for name in arms if name != BASELINE])
    compared = _differences(arms, COMPARED) | _differences(arms, COMPARED_AFTERWARDS)
    return {
        **cell,
        "compared": {f"{ours} minus {theirs}": found for (ours, theirs), found in compared.items()},
        "arms": {
            name: {**arm, **({f"minus_{BASELINE}": against[name, BASELINE]} if (name, BASELINE) in against else {})}
            for name, arm in arms.items()
        },
    }


def _commits(folder: Path) -> list[str]:
    """The commits under which the cell's jobs ran."""
    return sorted({json.loads(marker.read_text())["commit"] for marker in folder.glob("*/*.done")})


def with_tables(text: str, cells: dict[str, Results]) -> str:
    """The text with a new table between each pair of lines `<!-- ladder NAME -->` and `<!-- end -->`.

    NAME is a cell, or `overview` for one row a cell.
    """

    def table(found: re.Match[str]) -> str:
        cell = cells.get(found[1])
        lines = overview(cells) if found[1] == "overview" else markdown(cell) if cell else ["(has not run)"]
        body = "\n".join(lines)
        return f"<!-- ladder {found[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- ladder (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def overview(cells: dict[str, Results]) -> list[str]:
    """A row for each cell, a column for each arm that runs in all: the mean, in bold within chance of the row's best.

    Within chance: the 95 % interval of the paired difference from the arm of the highest mean holds 0, without a
    correction. One seed has no interval.
    """
    arms = [arm.name for arm in arms_of(MAIN)]
    lines = [
        "| | teacher | untouched | " + " | ".join(f"`{name}`" for name in arms) + " | seeds |",
        "| --- " * (len(arms) + 4) + "|",
    ]
    for cell in cells.values():
        found = {name: cell["arms"][name] for name in arms if name in cell["arms"]}
        best = max(found.values(), key=lambda arm: arm["mean"])
        means = [_emphasised(found.get(name), best) for name in arms]
        models = [_exact(cell[name]["mean"]) for _, name in MODELS]
        lines.append("| " + " | ".join([cell["text"], *models, *means, str(len(best["seeds"]))]) + " |")
    return lines


def _emphasised(arm: Results | None, best: Results) -> str:
    if arm is None:
        return ""
    mean, difference = _exact(arm["mean"]), _difference(best["seeds"], arm["seeds"])
    if len(arm["seeds"]) == 1 or difference is None:
        return mean
    return f"**{mean}**" if arm is best or difference["low"] is None or difference["low"] <= 0 else mean


def markdown(cell: Results) -> list[str]:
    """A cell's table: a line for each arm, in groups."""
    other = TASKS[cell["data"]].other
    models = ", ".join(f"{text} {_exact(cell[name]['mean'])}{_other(cell[name], other)}" for text, name in MODELS)
    lines = [
        f"{cell['samples']:,} samples, {cell['updates']} updates, {cell['held_out']} held-out samples. {models}.",
        "",
        f"| arm | exact match (95 %) | minus finetuning (p) | seeds | seconds, of which before | MB | {other} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    group = None
    for name, found in cell["arms"].items():
        if BY_NAME[name].group != group:
            group = BY_NAME[name].group
            lines.append(f"| *{group}* | | | | | | |")
        lines.append(_line(name, found))
    return [*lines, *_by_type(cell), *_comparisons(cell)]


def _models(cell: Results) -> list[tuple[str, Results]]:
    return [(name, cell[name]) for _, name in MODELS]


def _by_type(cell: Results) -> list[str]:
    """Exact match for each type of question, and the perplexity of the right answers, where there are several types."""
    rows = {name: found for name, found in [*_models(cell), *cell["arms"].items()] if len(found.get("by_type", {})) > 1}
    if not rows:
        return []
    types = list(next(iter(rows.values()))["by_type"])
    lines = ["", f"| | {' | '.join(types)} | perplexity |", "| --- " * (len(types) + 2) + "|"]
    for name, found in rows.items():
        shares = " | ".join(_exact(found["by_type"][kind]) for kind in types)
        lines.append(f"| `{name}` | {shares} | {found['perplexity']:.2f} |")
    return lines


def _comparisons(cell: Results) -> list[str]:
    """The differences between single arms, and how well planted wrong answers are found, below the table."""
    lines = [
        f"* {names}: {found['mean']:+.3f} ({_range(found)}, {_p(found['p_holm'])})"
        for names, found in cell["compared"].items()
        if found["p_holm"] is not None
    ]
    if "suspects" in cell:
        shares = ", ".join(f"{name} {_exact(found['mean'])}" for name, found in cell["suspects"].items())
        lines.append(f"* `cache-info --suspects` on the planted wrong answers: {shares}")
    return ["", *lines] if lines else []


def _range(found: Results) -> str:
    return f"{found['low']:+.3f} to {found['high']:+.3f}"


def _other(model: Results, name: str) -> str:
    return f" ({name} {_exact(model['other_task'])})" if "other_task" in model else ""


def _line(name: str, found: Results) -> str:
    difference = found.get(f"minus_{BASELINE}")
    several = len(found["seeds"]) > 1
    against = "" if difference is None else f"{difference['mean']:+.3f}"
    against += f" ({_p(difference['p_holm'])})" if difference is not None and several else ""
    before = sum(seconds for part, seconds in found["seconds"].items() if part not in ("train", "total"))
    other = found.get("other_task")
    cells = (
        f"`{name}`: {BY_NAME[name].text}",
        _exact(found["mean"]) + (f" ({_exact(found['low'])} to {_exact(found['high'])})" if several else ""),
        against,
        str(len(found["seeds"])),
        f"{found['seconds']['total']:.0f}, {before:.0f}",
        f"{found['bytes'] / 1e6:.1f}" if found["bytes"] else "",
        "" if other is None else _exact(other),
    )
    return "| " + " | ".join(cells) + " |"


def _arm(folder: Path, cell: Cell, scale: Scale, arm: Arm) -> Results:
    tried = choose(folder, cell, scale, arm)
    seeds = {seed: SeedFolder(folder / cell.name, cell, seed, other_task=True) for seed in range(cell.seeds)}
    scores = _scores(seeds, tried.name, "held_out")
    other = _scores(seeds, tried.name, "other")
    if not scores:
        return {}
    means = sweep(folder, cell, scale, swept_arm(arm))
    drawn = [entropy for seed in scores if (entropy := seeds[seed].draw_entropy(tried)) is not None]
    return {
        "seeds": scores,
        **asdict(interval(list(scores.values()))),
        "seconds": _with_total(seeds[min(scores)].seconds(tried)),
        "bytes": seeds[min(scores)].bytes_of(tried),
        "learning_rate": tried.learning_rate,
        "updates": round((arm.interact + arm.reinforce) * tried.factor * cell.updates),
        "sweep": {f"{one.learning_rate:g} x {one.factor:g}": mean for one, mean in means.items()},
        **_held_out_means(seeds, tried.name),
        **({"other_task": interval(list(other.values())).mean} if other else {}),
        **({"draw_entropy": sum(drawn) / len(drawn)} if drawn else {}),
    }


def _scores(seeds: dict[int, SeedFolder], run: str, kind: str) -> dict[int, float]:
    results = {seed: one.results(kind) for seed, one in seeds.items()}
    return {seed: found[run]["exact_match"] for seed, found in results.items() if run in found}


def _suspects(folder: Path, cell: Cell) -> Results:
    """How well the cache finds planted wrong answers: precision at RECALLS, and the mean over seeds of each."""
    ranked = [SeedFolder(folder / cell.name, cell, seed, other_task=False).planted() for seed in range(cell.seeds)]
    found = [[precision_at(planted, recall) for recall in RECALLS] for planted in ranked if any(planted)]
    return {
        f"precision at recall {recall:g}": asdict(interval(list(values)))
        for recall, values in zip(RECALLS, zip(*found, strict=True), strict=False)
    }


def precision_at(planted: list[bool], recall: float) -> float:
    """Of the most suspicious samples that hold this share of all planted ones, the share that was planted."""
    wanted, seen = math.ceil(recall * sum(planted)), 0
    for rank, is_planted in enumerate(planted, start=1):
        seen += is_planted
        if seen >= wanted:
            return seen / rank
    raise ValueError("nothing was planted")


def _with_total(seconds: dict[str, float]) -> dict[str, float]:
    """Of the first seed, as the bytes are: they hardly differ between seeds."""
    return {**seconds, "total": round(sum(seconds.values()), 1)}


def _differences(arms: dict[str, Results], pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Results]:
    """{(ours, theirs): their difference} of the pairs that share a seed; `p_holm` is corrected for all of these."""
    both = [(ours, theirs) for ours, theirs in pairs if ours in arms and theirs in arms]
    found = {pair: _difference(*(arms[name]["seeds"] for name in pair)) for pair in both}
    known = {pair: one for pair, one in found.items() if one is not None}
    corrected = holm([one["p"] for one in known.values()])
    return {pair: {**one, "p_holm": p} for (pair, one), p in zip(known.items(), corrected, strict=True)}


def _difference(ours: dict[int, float], theirs: dict[int, float]) -> Results | None:
    both = sorted(set(ours) & set(theirs))
    if not both:
        return None
    found = paired([ours[seed] for seed in both], [theirs[seed] for seed in both])
    return {**asdict(found.interval), "p": found.p}


def _untrained(folder: Path, cell: Cell, model: str) -> Results:
    seeds = {seed: SeedFolder(folder / cell.name, cell, seed, other_task=False) for seed in range(cell.seeds)}
    scores, other = _scores(seeds, model, "held_out"), _scores(seeds, model, "other")
    return {
        "seeds": scores,
        **asdict(interval(list(scores.values()))),
        **_held_out_means(seeds, model),
        **({"other_task": interval(list(other.values())).mean} if other else {}),
    }


def _held_out_means(seeds: dict[int, SeedFolder], run: str) -> Results:
    """Of a model on the held-out samples, over seeds: perplexity, and exact match by type of question."""
    found = [results[run] for one in seeds.values() if run in (results := one.results("held_out"))]
    if not found:
        return {}
    types = {kind: _mean([one["by_type"][kind]["exact_match"] for one in found]) for kind in found[0]["by_type"]}
    return {"perplexity": _mean([one["perplexity"] for one in found]), "by_type": types}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _exact(share: float | None) -> str:
    """.965; 1.000 has no shorter form, and what is not known is a dash."""
    return "-" if share is None else f"{min(max(share, 0.0), 1.0):.3f}".removeprefix("0")


def _p(p: float | None) -> str:
    return "-" if p is None else ("p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", "."))
