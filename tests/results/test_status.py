import json
import os

import pytest
import tiny
import yaml
from tiny_run import write_recipe

from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.results.status import planned, show, size_of, status
from pipeline.runtime.folder import clear_requeue, mark_done, write_kernels, write_requeue


@pytest.fixture
def run(made, tmp_path):
    folder = tmp_path / "run"
    write_recipe(folder, made.root)
    return folder


def states(run):
    return [step.state for step in status(run)[0]]


def test_an_empty_folder_has_begun_nothing(tmp_path, capsys):
    steps, following = status(tmp_path)
    assert [step.state for step in steps] == ["not begun"] * 4
    assert following.startswith("deepspeed launch/train.py --stage 1 --recipe RECIPE")
    show(tmp_path, steps, following)
    assert "not begun" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere is no run: expected .*recipe.yaml in it; found no such folder"):
        status(tmp_path / "nowhere")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RecipeError, match="found other files"):
        status(tmp_path)


def test_a_recipe_alone_asks_for_stage_1(run):
    assert states(run) == ["not begun"] * 4
    assert status(run)[1] == f"deepspeed launch/train.py --stage 1 --recipe {run}/recipe.yaml"


def test_the_kernels_of_the_newest_invocation_are_shown(run, capsys):
    show(run, *status(run))
    assert "kernels:" not in capsys.readouterr().out
    write_kernels(run, "torch: rank 3: Triton found no C compiler")
    show(run, *status(run))
    assert "\nkernels: torch: rank 3: Triton found no C compiler\n" in capsys.readouterr().out


def test_a_half_run_shows_its_last_update_and_its_shards(run):
    mark_done(run / "verbalize", {"updates": 3, "losses": {"teacher/1": 2.0, "teacher/2": 1.5, "student/1": 2.5}})
    for name, shards, begun in (("topk-1", 1, 200), ("sampled-2", 2, 100)):  # the second one was begun earlier
        folder = run / "cache" / name
        folder.mkdir(parents=True)
        (folder / "cache.json").touch()
        os.utime(folder / "cache.json", (begun, begun))
        for shard in range(shards):
            (folder / f"{shard:06d}.tar").write_bytes(b"x" * 2048)
    steps, following = status(run)
    assert [step.state for step in steps] == ["done", "begun", "not begun", "not begun"]
    assert steps[0].losses["teacher/2"] == 1.5
    assert (steps[1].progress, steps[1].size) == ("1 of 1 shards", 3 * 2048)
    assert "--stage 1" in following
    mark_done(run / "cache", {"samples": 12})
    lines = [
        {"step": "interact", "update": n, "layer/1": 2.0 / n, "last": 1.0, "tokens": 9, "match": [2]} for n in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": "inte')
    (run / "interact").mkdir()
    (run / "interact" / "checkpoint").write_text("")
    steps, following = status(run)
    assert (steps[2].state, steps[2].progress) == ("begun", "update 2 of 3")
    assert steps[2].losses == {"layer/1": 1.0, "last": 1.0}
    assert following == f"deepspeed launch/train.py --stage 2 --recipe {run}/recipe.yaml"


def test_a_complete_run_asks_for_its_evaluation_then_for_a_trace(run):
    for step in ("verbalize", "cache", "interact", "reinforce"):
        mark_done(run / step, {"updates": 3})
    of_all = {"asked": ["teacher", "untouched", "distilled"]}
    for results in (
        None,
        {},
        {"untouched": {}, "question_only": {}},  # of before stage 2
        {"untouched": of_all, "distilled": of_all, "question_only": {}},  # ended within the teacher, the largest
    ):
        if results is not None:
            (run / "evaluation.json").write_text(json.dumps(results))
        assert status(run)[1] == f"python -m pipeline evaluate --run {run}", results
    for results in ({name: of_all for name in of_all["asked"]}, {"untouched": {}, "distilled": {}}):
        (run / "evaluation.json").write_text(json.dumps(results))
        assert status(run)[1].startswith(f"python -m pipeline trace --run {run}"), results


def test_without_interaction_stage_1_is_not_asked_for(run):
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("interact: {steps: 3", "interact: {steps: 0"))
    assert status(run)[1] == f"deepspeed launch/train.py --stage 2 --recipe {run}/recipe.yaml"
    mark_done(run / "interact", {"updates": 0})
    assert status(run)[0][2].progress == "left out (0 updates)"


def test_updates_are_counted_in_the_data_that_the_step_reads(run, tmp_path):
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    for step in ("interact", "reinforce"):
        values[step] |= {"steps": None, "epochs": 3, "batch_size": 4}
    values["data"]["train"] = str(tiny.write_data(tmp_path / "given", 20))
    values["reinforce"]["train"] = str(tiny.write_data(tmp_path / "answered", 12))
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(run / "recipe.yaml").recipe
    assert (planned(recipe, "interact"), planned(recipe, "reinforce")) == (15, 9)


def test_the_table_names_parts_losses_and_sizes(run, capsys):
    mark_done(run / "verbalize", {"updates": 3, "losses": {"teacher/1": 2.0, "teacher/2": 1.5, "student/1": 2.5}})
    (run / "verbalize" / "teacher.safetensors").write_bytes(b"x" * 1_200_000)
    show(run, *status(run))
    out = capsys.readouterr().out
    for text in ("3 updates", "teacher  1: 2.000  2: 1.500", "student  1: 2.500", "1.2 MB", "recipe.yaml", "next:"):
        assert text in out
    assert size_of(run) > 1_200_000


def test_it_says_how_well_data_kept_up_in_the_step_that_ran_last(run, capsys):
    line = {"update_s": 2.0, "real_share": 0.5, "loader_workers": 3}
    lines = [{"step": "verbalize", "update": n, "data_wait": 0.9, **line} for n in range(5)]
    lines += [{"step": "interact", "update": n, "data_wait": 0.9 * (n < 10), **line} for n in range(30)]
    lines += [{"step": "interact", "update": 30, **line, "data_wait": 0.3, "update_s": 10.0, "real_share": 0.9}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    show(run, *status(run))
    expected = (
        "data:    interact, last 20 updates: 6% of the time waiting for data (3 loader workers a rank), 52% of the"
    )
    assert expected in capsys.readouterr().out, "19 updates of 2 s without waiting, one of 10 s with 3"


def test_it_says_how_well_data_kept_up_in_the_cache_job(run, capsys):
    lines = [{"step": "verbalize", "update": 1, "update_s": 2.0, "data_wait": 0.9, "real_share": 0.5}]
    lines += [{"step": "cache", "update": n, "data_wait": n / 10, "real_share": 0.8} for n in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**each, "loader_workers": 4}) + "\n" for each in lines))
    show(run, *status(run))
    expected = (
        "data:    cache, newest job: 20% of the time waiting for data (4 loader workers a rank), 80% of the computed"
    )
    assert expected in capsys.readouterr().out


def test_the_preset_is_named(run, capsys):
    show(run, *status(run))
    assert "preset:  paper: the paper's order" in capsys.readouterr().out
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    del values["reinforce"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(values | {"preset": "wrong_answers"}))
    show(run, *status(run))
    assert "preset:  wrong_answers: interaction to the end" in capsys.readouterr().out


def test_a_run_with_another_run_s_stage_1_goes_on_with_stage_2(run, tmp_path):
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(values | {"stage_1": str(tmp_path / "other")}))
    steps, following = status(run)
    assert [(step.state, step.progress) for step in steps[:2]] == [("in stage_1", str(tmp_path / "other"))] * 2
    assert "--stage 2" in following
    for step in ("interact", "reinforce"):
        mark_done(run / step, {"updates": 3})
    (run / "evaluation.json").write_text(json.dumps({"untouched": {}, "distilled": {}}))
    assert status(run)[1].startswith("python -m pipeline trace")


def test_a_run_that_was_asked_to_stop_says_so_until_it_goes_on(run, capsys):
    write_requeue(run, "interact: stopped after update 7 of 9: rank 1 got SIGTERM")
    show(run, *status(run))
    assert "\nstopped: interact: stopped after update 7 of 9: rank 1 got SIGTERM\n" in capsys.readouterr().out
    clear_requeue(run)
    show(run, *status(run))
    assert "stopped:" not in capsys.readouterr().out


def test_a_skipped_update_hides_no_losses(run):
    lines = [{"step": "verbalize", "update": 1, "teacher/1": 2.0}, {"step": "verbalize", "update": 2, "skipped": True}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    steps, _ = status(run)
    assert steps[0].losses == {"teacher/1": 2.0} and steps[0].progress.startswith("update 2 of ")


def test_the_newest_measurement_on_held_out_data_stays_in_sight(run, capsys):
    measured = {"held_out_loss": 0.512, "held_out_exact_match": 0.75, "held_out_s": 2.5}
    lines = [{"step": "interact", "update": n, "last": 1.0, **(measured if n == 2 else {})} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    steps, _ = status(run)
    assert steps[2].losses == {"last": 1.0} and steps[2].held_out == "held out  0.512, 75.0% right (update 2)"
    show(run, *status(run))
    assert "75.0%" in capsys.readouterr().out
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines[:2]))
    assert status(run)[0][2].losses == {"last": 1.0}, "what was trained on, also where both were measured"


def test_a_run_with_another_run_s_cache_trains_its_own_verbalizers_and_goes_on_with_stage_2(run, tmp_path):
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(values | {"cache_from": str(tmp_path / "other")}))
    steps, following = status(run)
    assert [step.state for step in steps[:2]] == ["not begun", "in cache_from"] and "--stage 1" in following
    mark_done(run / "verbalize", {"updates": 3})
    assert "--stage 2" in status(run)[1]
