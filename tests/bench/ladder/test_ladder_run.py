"""What `python -m bench.ladder` runs: the sweep before the seeds, each cell by itself."""

import sys

import pytest

from bench.ladder import run
from bench.ladder.arms import ALL, ARMS, BY_NAME, VARIANTS
from bench.ladder.cells import SCALES, SWEEP_SEEDS, Cell, Scale
from bench.ladder.jobs import JobsFailed

CELLS = tuple(Cell(name, name, "puzzles", 0.4, seeds=2) for name in ("first", "second"))


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """(the jobs that were asked for, how often a report was written, start): nothing runs."""
    jobs, reports = [], []
    monkeypatch.setitem(SCALES, "cpu", Scale(CELLS, learning_rates=(1e-3, 3e-3)))
    monkeypatch.setattr(run, "run_jobs", lambda asked, workers, title, device: jobs.append((title, list(asked))))
    monkeypatch.setattr(run.report, "write", lambda *arguments: reports.append(arguments))

    def start(*options):
        monkeypatch.setattr(sys, "argv", ["ladder", "--folder", str(tmp_path), *options])
        run.main()

    return jobs, reports, start


def test_every_rate_is_tried_on_the_sweeps_seed_and_one_on_the_quoted_ones(asked):
    jobs, reports, start = asked
    start("--cells", "first", "--arms", "finetune")
    by_title = dict(jobs)
    swept = {job.path.name for job in by_title["first: sweep"] if job.path.name.startswith("finetune")}
    quoted = {job.path.parent.name: job.path.name for job in by_title["first: seeds"] if "finetune" in job.path.name}
    assert swept == {"finetune-0.001", "finetune-0.003"}
    assert {job.path.parent.name for job in by_title["first: sweep"]} == {f"seed-{seed}" for seed in SWEEP_SEEDS}
    assert quoted == {"seed-0": "finetune-0.001", "seed-1": "finetune-0.001"}, "nothing has run: the grid's first"
    assert len(reports) == 1


@pytest.mark.parametrize("variants", [3, 5])
def test_variants_run_on_the_cells_seeds_for_them_and_what_they_are_compared_with_on_all(asked, monkeypatch, variants):
    jobs, _, start = asked
    cell = Cell("all", "all", "puzzles", 0.4, seeds=5, variant_seeds=variants, arms=ALL)
    monkeypatch.setitem(SCALES, "cpu", Scale((cell,), learning_rates=(3e-3,)))
    start()
    runs = [job.path for job in dict(jobs)["all: seeds"]]
    seeds = {arm.name: sorted(path.parent.name for path in runs if path.name == f"{arm.name}-0.003") for arm in ARMS}
    few, all_five = [f"seed-{seed}" for seed in range(variants)], [f"seed-{seed}" for seed in range(5)]
    assert seeds.pop("finetune_early") == [], "its rate has a factor beside it"
    assert seeds.pop("wrong_verbalizers") == [], "a cell has to name it"
    assert seeds == {name: few if BY_NAME[name].group == VARIANTS else all_five for name in seeds}


def test_a_cell_that_fails_does_not_keep_the_others_from_running(asked, monkeypatch):
    jobs, reports, start = asked

    def fails(folder, cell, *rest):
        jobs.append((cell.name, []))
        if cell.name == "first":
            raise JobsFailed("one of its jobs")

    monkeypatch.setattr(run, "run_cell", fails)
    with pytest.raises(SystemExit, match="first: one of its jobs"):
        start()
    assert [title for title, _ in jobs if title in ("first", "second")] == ["first", "second"] and len(reports) == 2


def test_an_unknown_cell_is_refused_by_name(asked):
    jobs, reports, start = asked
    with pytest.raises(SystemExit, match="--cells third: expected some of first, second"):
        start("--cells", "first", "third")
    assert not jobs and not reports
