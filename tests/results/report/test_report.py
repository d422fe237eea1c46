"""Reports: of a run that is done, that has died, that has hardly begun, and of two side by side."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from pipeline.__main__ import main
from pipeline.results.evaluate.changes import Change, changes, compared
from pipeline.results.report.curves import PALETTE, POINTS, apart, curves, label_ends
from pipeline.results.report.facts import differences, read_run
from pipeline.results.report.figures import kl_maps
from pipeline.results.report.page import loss_series
from pipeline.results.report.run import keep_report
from pipeline.results.trace.matches import read_matches
from pipeline.runtime.versions import keep_environment, read_environment

HOSTILE = "</pre><script>alert(1)</script>"


def interact_line(update: int) -> dict:
    return {
        "step": "interact", "update": update, "time": 1e9 + update, "layer/1": 0.5 / update, "layer/2": 0.25,
        "last": 1.5, "learning_rate": 1e-3, "tokens": 10, "tokens_per_s": 100.0, "update_s": 36.0, "data_wait": 0.1,
        "real_share": 0.9, "gradient_norm": 1.0, "checkpoint_s": 0.0,
        "match": [1 + update % 2, 3], "draw_entropy": [0.69, 0.0],
        "kl": [[1, 1, 0.5], [1, 2, 0.25], [2, 3, 0.125]],
    }  # fmt: skip


@pytest.fixture
def run(made, tmp_path):
    """A run whose interaction died after five updates, in the middle of a line, with two bad samples."""
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(interact_line(update)) + "\n" for update in range(1, 6)) + '{"step": "interact", "upda'
    )
    rejects = [{"key": key, "shard": "0", "reason": HOSTILE} for key in ("a", "b")] + [{"key": "c", "reason": "torn"}]
    (run / "rejects.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rejects) + '{"key": "d')
    result = {"exact_match": 0.25, "low": 0.1, "high": 0.5, "samples": 8, "read": 8, "perplexity": 2.0, "data": "d"}
    wrong = list("abcdef")
    evaluation = {
        "untouched": result | {"wrong": wrong},
        "distilled": result | {"exact_match": 0.5, "wrong": wrong[:4]},
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


def page_of(*arguments: object) -> str:
    assert main(["report", *map(str, arguments)]) == 0
    return open(arguments[-1] if "--output" in arguments else f"{arguments[0]}/report.html").read()


def test_the_page_says_what_the_files_say(run):
    text = page_of(run)
    for expected in ("0.05", "25.0 %", "10.0 to 50.0", "update 5 of 3", "torn", "data: {train: ", "wrong to right"):
        assert expected in text, expected
    facts = read_run(run)
    assert facts.hours == {"interact": pytest.approx(5 * 36 / 3600)}
    assert facts.rejects == [(HOSTILE, 2, "a"), ("torn", 1, "c")]
    assert len(facts.lines["interact"]) == 5 and not facts.lines["reinforce"] and facts.cache is None
    assert text.count("<figure>") == 13, (
        "2 of losses; 2 match maps, lines, 3 KL, entropy; tokens, wait, real share, time"
    )
    assert text.count("<svg") == 13 + 5, "all curves but the entropies, which fall to 0, are there on a log scale too"


def test_held_out_data_is_in_the_same_curves(run, tmp_path):
    lines = [interact_line(update) for update in range(1, 6)]
    for line in lines[1::2]:
        line |= {"held_out_loss": 0.75, "held_out_exact_match": 0.5, "held_out_s": 1.0}
    assert loss_series(lines)["held_out_loss"] == ([2, 4], [0.75, 0.75])
    assert "held_out_s" not in loss_series(lines)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page_of(run)
    assert "over the updates: last, held_out_loss" in text and "interact, held-out exact match" in text
    shutil.copytree(run, tmp_path / "other")
    text = page_of(run, tmp_path / "other", "--output", tmp_path / "both.html")
    assert "interact, held_out_loss, in nat a token, over the updates: run, other" in text
    assert "interact, held-out exact match, in share, over the updates: run, other" in text


def test_a_run_that_follows_the_last_layer_alone_has_no_matches_to_show(run):
    lines = [interact_line(update) | {"match": [None, None], "kl": [], "draw_entropy": []} for update in range(1, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_matches(run) is None
    text = page_of(run)
    assert "Which teacher layer each student layer followed" not in text and "interact: losses" in text


def test_text_from_files_is_escaped_and_nothing_is_loaded(run):
    text = page_of(run)
    assert "<script>alert(1)" not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text) and not re.search(r"url\((?!#)", text)


def test_a_run_that_has_hardly_begun_has_a_report(made, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(made.recipe, run)
    assert "next" in page_of(run)


def test_two_runs_show_their_difference_first_and_their_curves_together(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"run: {run}", f"run: {other}") + "seed: 7\n")
    assert ("seed", ["-", "7"]) in differences([read_run(run), read_run(other)])
    output = tmp_path / "both.html"
    text = page_of(run, other, "--output", output)
    assert text.index("What differs") < text.index("several runs") < text.index("<h2>run</h2>")
    assert "run: distilled and untouched differ by 25.0 points: within chance on 8 samples." in text


def test_runs_that_were_evaluated_on_other_samples_are_not_compared(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    file = other / "evaluation.json"
    evaluation = json.loads(file.read_text())
    evaluation["distilled"] |= {"read": 4, "wrong": ["a"]}
    file.write_text(json.dumps(evaluation))
    text = page_of(run, other, "--output", tmp_path / "both.html")
    assert "other and run cannot be compared: they were evaluated with other samples (4, 8)" in text
    assert "other answers" not in text


def test_answers_that_changed_are_counted_with_one_of_each_kind(tmp_path):
    before = {"wrong": ["b", "c", "d", "x"], "data": "d ata"}
    after = {"wrong": ["a", "d"], "data": "d ata", "rejected": [{"key": "x", "reason": "torn"}]}
    assert changes(before, after) == [
        Change("wrong to right", 2, "b"), Change("right to wrong", 1, "a"), Change("wrong in both", 1, "d"),
    ]  # fmt: skip
    assert changes(after, after)[0] == Change("wrong to right", 0, "")
    assert compared(tmp_path, {"untouched": before, "distilled": after}) == (before, after)
    assert compared(tmp_path, {"untouched": before, "distilled": after | {"data": "other"}}) is None
    assert compared(tmp_path, {"untouched": before}) is None
    named = {name: after | {"model": str(tmp_path / name / "student")} for name in ("other", "mine")}
    found = compared(tmp_path / "mine", {"untouched": before, **named})
    assert found is not None and found[1] is named["mine"], "the demo's students have names of their own"


def test_the_page_says_what_each_step_ran_on(run):
    keep_environment(run, "interact", 4, "cpu")
    text = page_of(run)
    found = read_environment(run, "interact")
    assert "What ran it" in text and f"<td>interact</td><td>{found['begun']}</td><td>4</td><td>cpu</td>" in text
    assert f"torch {found['packages']['torch']}" in text


def test_a_report_that_fails_is_a_warning_with_the_command(run, capsys):
    keep_report(run)
    assert (run / "report.html").is_file() and capsys.readouterr().out == ""
    (run / "evaluation.json").write_text("{")
    keep_report(run)
    said = capsys.readouterr().out
    assert "warning" in said and f"python -m pipeline report {run}" in said and "The run goes on" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "RUN"], "two of the runs have one name"),
        (["RUN", "OTHER"], "needs --output"),
        (["nowhere"], "is no run"),
    ],
)
def test_what_cannot_be_reported(run, tmp_path, capsys, arguments, message):
    shutil.copytree(run, tmp_path / "other")
    paths = {"RUN": run, "OTHER": tmp_path / "other"}
    assert main(["report", *(str(paths.get(one, one)) for one in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_losses_are_told_from_other_numbers():
    skipped = {"step": "interact", "update": 3, "checkpoint_s": 0.1, "skipped": True}
    assert set(loss_series([interact_line(1), interact_line(2), skipped])) == {"layer/1", "layer/2", "last"}


def test_a_long_curve_is_thinned_to_means():
    svg = curves({"loss": (range(10_000), [1.0] * 10_000)}, "t", "nat").linear
    longest = max(re.findall(r' d="(M[^"]*)"', svg), key=len)
    assert len(re.findall("[ML] ", longest)) <= POINTS


def test_kl_maps_need_lines_that_have_them():
    without = {name: value for name, value in interact_line(1).items() if name != "kl"}
    assert list(kl_maps([without])) == []
    maps = list(kl_maps([interact_line(update) for update in range(1, 6)]))
    assert [f"update {update}" in one.linear for update, one in zip((1, 3, 5), maps, strict=True)] == [True] * 3
    assert len(list(kl_maps([interact_line(1)]))) == 1, "the first is the last"


def test_labels_are_apart_in_order_and_near_what_they_name():
    for seed in range(20):
        wanted = np.random.default_rng(seed).random(9)
        found = apart(wanted, 0.1)
        assert (np.argsort(found) == np.argsort(wanted)).all() and found.min() >= 0 and found.max() <= 1 + 1e-9
        assert np.diff(np.sort(found)).min() >= 0.1 - 1e-9
    assert apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9]), "what is apart stays"
    assert apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55]), "in the middle of what they name"
    assert apart([0.0] * 21, 0.1) == pytest.approx(np.linspace(0, 1, 21)), "no room: evenly"


def test_a_label_stands_at_the_height_where_its_curve_ends():
    axes = Figure().add_subplot()
    for end in (0, 10):
        axes.plot([1, 2], [5, end], label=f"{end}")
    label_ends(axes, 0.1)
    assert [one.get_position()[1] for one in axes.texts] == pytest.approx([0.5 / 11, 10.5 / 11]), "margins of 5 %"


def test_curves_stand_out_on_a_light_page_and_on_a_dark_one():
    """A contrast of 3 (WCAG, for graphics) with both papers of page.css."""

    def luminance(colour) -> float:
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in to_rgb(colour)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for colour in PALETTE(np.linspace(0, 1, 30)):
        for paper in ("#fbfbfa", "#16181c"):
            dark, light = sorted((luminance(colour), luminance(paper)))
            assert (light + 0.05) / (dark + 0.05) >= 3


def test_each_curve_is_named_where_it_ends_or_below_where_its_name_is_long():
    ends = curves({f"layer {n}": ([1, 2], [1.0, n]) for n in (1, 2)}, "t", "nat")
    assert re.search(">layer 1<", ends.linear) and ends.linear.count(">layer 2<") == 1 and "legend_1" not in ends.linear
    below = curves({name * 9: ([1, 2], [0.0, 1.0]) for name in ("one", "two")}, "t", "nat")
    assert "legend_1" in below.linear and below.log is None, "0 has no place on a log scale"
    stopped = curves({"a": ([1, 2], [1.0, float("nan")]), "b": ([1], [float("nan")])}, "t", "nat")
    assert ">a<" in stopped.linear and ">b<" not in stopped.linear
