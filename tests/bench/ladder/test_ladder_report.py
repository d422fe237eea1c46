"""The sweep and the report, on a folder of invented results."""

import json
import os

import pytest

from bench import timing
from bench.ladder import report
from bench.ladder.arms import BY_NAME
from bench.ladder.cells import SWEEP_SEEDS, Cell, Scale
from bench.ladder.plan import SeedFolder, Tried
from bench.ladder.statistics import holm, interval
from bench.ladder.sweep import choose

CELL = Cell("some", "some cell", "puzzles", 0.4, samples=64, updates=100, held_out=16, seeds=3)
SCALE = Scale((CELL,), learning_rates=(1e-3, 3e-3))

SWEPT = {
    "finetune-0.001": 0.3, "finetune-0.003": 0.5,
    "finetune_early-0.001-0.25": 0.4, "finetune_early-0.001-0.5": 0.7,
    "finetune_early-0.003-0.25": 0.6, "finetune_early-0.003-0.5": 0.2,
    "interaction-0.001": 0.9, "interaction-0.003": 0.8,
}  # fmt: skip
SCORES = {  # over seeds 0, 1, 2: there the other learning rates are better
    "finetune-0.003": (0.50, 0.55, 0.45), "finetune-0.001": (1.0, 1.0, 1.0),
    "finetune_early-0.001-0.5": (0.60, 0.66, 0.66),
    "interaction-0.001": (0.80, 0.90, 0.85), "interaction-0.003": (1.0, 1.0, 1.0),
    "teacher": (1.0, 0.98, 0.99), "untouched": (0.2, 0.3, 0.1),
}  # fmt: skip


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def evaluation(folder, seed, number, scores, kind="held_out"):
    path = folder / CELL.name / f"seed-{seed}" / f"{kind}-{number}"
    for name in scores:
        if not path.with_name(f"{name}.done").exists():
            write(path.with_name(f"{name}.done"), {"cpu_seconds": 10.0 + seed, "command": [], "commit": "abc"})
    kinds = {"next": 0.4, "tile": 0.6}
    by_type = {kind: {"exact_match": share, "samples": 1} for kind, share in kinds.items()}
    models = {name: {"exact_match": score, "perplexity": 2.0, "by_type": by_type} for name, score in scores.items()}
    write(path.with_suffix(".json"), models)
    write(path.with_suffix(".done"), {"cpu_seconds": 1.0, "command": [], "commit": "abc"})


@pytest.fixture
def folder(tmp_path):
    for seed in SWEEP_SEEDS:
        evaluation(tmp_path, seed, 0, SWEPT)
    for seed in range(CELL.seeds):
        scores = {name: values[seed] for name, values in SCORES.items()}
        later = {name: scores.pop(name) for name in ("interaction-0.001", "interaction-0.003")}
        evaluation(tmp_path, seed, 0, scores)
        evaluation(tmp_path, seed, 1, later)  # a new arm is evaluated alone
        evaluation(tmp_path, seed, 0, {"interaction-0.001": 0.25 * seed}, "other")
        ours = tmp_path / CELL.name / f"seed-{seed}"
        write(ours / "stage-1.done", {"cpu_seconds": 40.0, "command": [], "commit": "abc"})
        (ours / "stage-1" / "cache").mkdir(parents=True)
        (ours / "stage-1" / "cache" / "records").write_bytes(b"12345")
    return tmp_path


@pytest.mark.parametrize(
    ("arm", "rate", "factor"),
    [
        ("finetune", 3e-3, 1.0),
        ("finetune_early", 1e-3, 0.5),
        ("finetune_equal_time", 3e-3, 1.0),  # finetune's
        ("interaction", 1e-3, 1.0),
        ("distil_lens", 1e-3, 1.0),  # interaction's
        ("paper", 1e-3, 1.0),  # its sweep has not run: the first of the grid
    ],
)
def test_the_sweep_decides_and_not_the_quoted_seeds(folder, arm, rate, factor):
    assert choose(folder, CELL, SCALE, BY_NAME[arm]) == Tried(BY_NAME[arm], rate, factor)


def test_a_run_that_was_removed_or_made_again_is_to_be_evaluated_again(folder):
    ours = SeedFolder(folder / CELL.name, CELL, 0, other_task=False)
    assert ours.results()["interaction-0.001"]["exact_match"] == 0.80
    marker = folder / CELL.name / "seed-0" / "interaction-0.001.done"
    later = marker.stat().st_mtime + 10
    os.utime(marker, (later, later))
    assert "interaction-0.001" not in ours.results() and "finetune-0.003" in ours.results()
    (folder / CELL.name / "seed-0" / "finetune-0.003.done").unlink()
    assert "finetune-0.003" not in ours.results() and "teacher" in ours.results()


def test_a_setting_counts_when_all_seeds_of_the_sweep_have_it(folder):
    evaluation(folder, SWEEP_SEEDS[0], 1, {"paper-0.003": 0.1})
    assert choose(folder, CELL, SCALE, BY_NAME["paper"]).learning_rate == 3e-3


def test_the_json_has_every_arm_with_its_seeds_interval_and_seconds(folder, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", folder / "results")
    report.write(folder, SCALE, "test")
    written = json.loads((folder / "results" / "ladder_test.json").read_text())
    cell = written["cells"]["some"]
    assert list(cell["arms"]) == ["finetune", "finetune_early", "interaction"]
    found = cell["arms"]["interaction"]
    assert found["seeds"] == {"0": 0.80, "1": 0.90, "2": 0.85}
    expected = interval([0.80, 0.90, 0.85])
    assert [found[key] for key in ("mean", "low", "high")] == [expected.mean, expected.low, expected.high]
    assert found["seconds"] == {"train": 10.0, "stage 1": 40.0, "total": 50.0}
    assert found["bytes"] == 5 and found["learning_rate"] == 1e-3 and found["updates"] == 100
    assert found["sweep"] == {"0.001 x 1": 0.9, "0.003 x 1": 0.8}
    assert found["other_task"] == 0.25
    assert found["minus_finetune"]["mean"] == pytest.approx(0.35) and found["minus_finetune"]["p"] < 0.05
    early = cell["arms"]["finetune_early"]
    assert early["updates"] == 50 and early["seconds"] == {"train": 10.0, "total": 10.0} and early["bytes"] == 0
    assert "minus_finetune" not in cell["arms"]["finetune"]
    both = [cell["arms"][name]["minus_finetune"] for name in ("finetune_early", "interaction")]
    assert [one["p_holm"] for one in both] == pytest.approx(holm([one["p"] for one in both]))
    assert cell["made"]["commits"] == ["abc"] and "cores" in cell["made"]["reported"]["machine"]
    assert cell["teacher"]["mean"] == pytest.approx(0.99) and cell["untouched"]["mean"] == pytest.approx(0.2)


def test_a_cell_that_has_not_run_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    report.write(tmp_path, SCALE, "test")
    assert json.loads((tmp_path / "results" / "ladder_test.json").read_text())["cells"] == {}


def test_a_cell_that_was_made_elsewhere_stays(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    report.write(folder, SCALE, "test")
    before = (tmp_path / "results" / "ladder_test.json").read_text()
    report.write(tmp_path / "nothing here", SCALE, "test")
    assert (tmp_path / "results" / "ladder_test.json").read_text() == before


@pytest.mark.parametrize("more", [{}, {"random-0.001": 0.5}], ids=["fewer runs", "more runs, of another arm"])
def test_seeds_that_only_the_file_has_are_not_replaced(folder, monkeypatch, capsys, more):
    monkeypatch.setattr(timing, "RESULTS", folder / "results")
    report.write(folder, SCALE, "test")
    path = folder / "results" / "ladder_test.json"
    before = json.loads(path.read_text())["cells"]
    (folder / CELL.name / "seed-2" / "held_out-1.done").unlink()  # interaction of one seed
    for seed in range(CELL.seeds):
        evaluation(folder, seed, 2, more)
    report.write(folder, SCALE, "test")
    assert json.loads(path.read_text())["cells"] == before
    assert "some: fewer seeds of interaction here than in the file, which stays as it is" in capsys.readouterr().out


def test_arms_without_a_common_seed_are_not_compared(folder):
    for seed, name in ((0, "interaction-0.001"), (1, "finetune_early-0.001-0.5"), (2, "finetune_early-0.001-0.5")):
        (folder / CELL.name / f"seed-{seed}" / f"{name}.done").unlink()
    cell = report.cell_results(folder, CELL, SCALE)
    assert set(cell["arms"]["interaction"]["seeds"]) == {1, 2} and set(cell["arms"]["finetune_early"]["seeds"]) == {0}
    assert "interaction minus finetune_early" not in cell["compared"] and report.markdown(cell)


def test_the_number_of_an_evaluation_is_never_taken_again(folder):
    ours = SeedFolder(folder / CELL.name, CELL, 0, other_task=False)
    (ours.folder / "held_out-0.done").unlink()
    (job,) = [one for one in ours.jobs([Tried(BY_NAME["random"], 1e-3)]) if one.path.name.startswith("held_out")]
    assert job.path.name == "held_out-2"


def test_the_published_scales_write_tables_and_figures(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    report.DOCS.mkdir()
    pages = [report.DOCS / name for name in report.PAGES]
    for page in pages:
        page.write_text("<!-- ladder some -->\n<!-- end -->\n")
    report.write(folder, SCALE, "cpu")
    assert all("| `interaction`" in page.read_text() for page in pages)


def test_the_overview_has_a_row_for_each_cell(folder):
    cells = {"some": report.cell_results(folder, CELL, SCALE)}
    text = report.with_tables("<!-- ladder overview -->\n<!-- end -->\n", cells)
    _, head, _, row, *_ = text.splitlines()
    columns = [column.strip() for column in head.split("|")]
    found = dict(zip(columns, (column.strip() for column in row.split("|")), strict=True))
    assert found["`interaction`"] == "**.850**" and found["`finetune`"] == ".500" and found["`paper`"] == ""
    assert (found["teacher"], found["untouched"], found["seeds"]) == (".990", ".200", "3")


def test_what_is_within_chance_of_the_best_is_bold_too():
    best = {"seeds": {0: 0.9, 1: 0.8, 2: 0.85}, "mean": 0.85}
    near = {"seeds": {0: 0.8, 1: 0.85, 2: 0.85}, "mean": 0.833}
    assert report._emphasised(near, best) == "**.833**"


def test_tables_stand_between_their_markers(folder):
    cells = {"some": report.cell_results(folder, CELL, SCALE)}
    text = (
        "before\n<!-- ladder some -->\nold\n<!-- end -->\nbetween\n<!-- ladder other -->\n<!-- end -->\nafter | old\n"
    )
    once = report.with_tables(text, cells)
    table, rest = once.removeprefix("before\n<!-- ladder some -->\n").split("<!-- end -->\n", 1)
    assert rest == "between\n<!-- ladder other -->\n(has not run)\n<!-- end -->\nafter | old\n"
    lines = table.splitlines()
    assert "old" not in lines and lines == report.markdown(cells["some"])
    (ours,) = [line for line in lines if line.startswith("| `interaction`:")]
    assert "| .850 (" in ours and "| +0.350 (p = .0" in ours and ours.endswith("| 3 | 50, 40 | 0.0 | .250 |")
    assert "Teacher .990, untouched student .200." in lines[0]
    assert report.with_tables(once, cells) == once


@pytest.mark.parametrize(("recall", "precision"), [(1 / 3, 1.0), (0.5, 1.0), (0.9, 0.75), (1.0, 0.75)])
def test_precision_at_a_recall(recall, precision):
    assert report.precision_at([True, True, False, True, False], recall) == precision


def test_pairs_of_arms_are_compared_below_the_table(folder, monkeypatch):
    monkeypatch.setattr(report, "COMPARED", (("interaction", "finetune_early"), ("interaction", "paper")))
    cell = report.cell_results(folder, CELL, SCALE)
    assert list(cell["compared"]) == ["interaction minus finetune_early"], "paper has not run"
    line = report.markdown(cell)[-1]
    assert line.startswith("* interaction minus finetune_early: +0.210 (") and "p = ." in line


def test_a_cell_of_several_types_has_a_table_of_them(folder):
    lines = report.markdown(report.cell_results(folder, CELL, SCALE))
    assert "| | next | tile | perplexity |" in lines
    assert "| `interaction` | .400 | .600 | 2.00 |" in lines
