"""Jobs of the ladder: their order, what is run again and what is not, and what a failure takes with it."""

import json

import pytest

from bench.ladder.jobs import Job, JobsFailed, environment, run_jobs, settings


@pytest.fixture
def ran(tmp_path):
    """The names of the jobs that ran, in order."""
    path = tmp_path / "ran"
    path.touch()
    return lambda: path.read_text().split()


def job(folder, name, *needs, before=""):
    """A job that runs `before`, then says that it ran."""
    line = f"import time\n{before}\nopen({str(folder / 'ran')!r}, 'a').write({name!r} + '\\n')"
    return Job(folder / name, ("-c", line), tuple(folder / one for one in needs))


FAILS = "print('the reason'); raise SystemExit(3)"


def test_a_job_waits_for_what_it_needs(tmp_path, ran):
    slow = job(tmp_path, "first", before="while time.process_time() < .5: pass")
    run_jobs([job(tmp_path, "third", "second"), job(tmp_path, "second", "first"), slow], workers=3, title="test")
    assert ran() == ["first", "second", "third"]
    assert slow.seconds() >= 0.5


def test_seconds_are_the_processor_s(tmp_path, ran):
    sleeps = job(tmp_path, "sleeps", before="time.sleep(2)")
    run_jobs([sleeps], workers=1, title="test")
    assert 0 < sleeps.seconds() < 1.5


def test_what_is_done_is_not_run_again(tmp_path, ran):
    first = job(tmp_path, "first")
    run_jobs([first], workers=1, title="test")
    run_jobs([first, job(tmp_path, "second", "first")], workers=1, title="test")
    assert ran() == ["first", "second"]


def test_a_failure_takes_its_dependents_with_it_and_no_other(tmp_path, ran):
    jobs = [
        job(tmp_path, "fails", before=FAILS),
        job(tmp_path, "dependent", "fails"),
        job(tmp_path, "its_dependent", "dependent"),
        job(tmp_path, "other", before="time.sleep(.5)"),
        job(tmp_path, "after_other", "other"),
    ]
    with pytest.raises(JobsFailed, match=r"(?s)1 jobs failed.*fails\.log.*the reason.*exit code 3"):
        run_jobs(jobs, workers=2, title="test")
    assert ran() == ["other", "after_other"]
    assert [one.is_done() for one in jobs] == [False, False, False, True, True]
    with pytest.raises(FileNotFoundError):
        jobs[0].seconds()


def test_a_failed_job_is_run_again(tmp_path, ran):
    mended = tmp_path / "mended"
    fails_once = job(tmp_path, "first", before=f"import os; assert os.path.exists({str(mended)!r})")
    with pytest.raises(JobsFailed, match="AssertionError"):
        run_jobs([fails_once], workers=1, title="test")
    mended.touch()
    run_jobs([fails_once], workers=1, title="test")
    assert ran() == ["first"]


def test_the_result_of_another_command_is_refused(tmp_path, ran):
    run_jobs([job(tmp_path, "first")], workers=1, title="test")
    with pytest.raises(JobsFailed, match=r"another command.*remove .*first and .*first\.done"):
        run_jobs([job(tmp_path, "first", before="pass")], workers=1, title="test")
    assert ran() == ["first"]


def test_jobs_side_by_side_are_one_process_each_on_a_cpu(tmp_path):
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    line = f"import json, os; print(json.dumps([os.environ[name] for name in {names}]))"
    jobs = [Job(tmp_path / name, ("-c", line)) for name in ("a", "b")]
    run_jobs(jobs, workers=2, title="test")
    found = [dict(zip(names, json.loads(one.log.read_text()), strict=True)) for one in jobs]
    assert found[0].pop("MASTER_PORT") != found[1].pop("MASTER_PORT")
    expected = {"RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    assert found == [{**expected, "OMP_NUM_THREADS": "1"}] * 2


@pytest.mark.parametrize(("visible", "first"), [("5,6", "5"), (None, "0")])
def test_jobs_on_a_gpu_see_the_first_one_alone(monkeypatch, visible, first):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment(device="cuda")["CUDA_VISIBLE_DEVICES"] == first
    assert environment()["CUDA_VISIBLE_DEVICES"] == ""


def test_settings_are_values_of_yaml():
    found = settings({"a.b": 3e-05, "c": [2, 4], "d": {"name": "topk"}, "e": True})
    assert found == ["--set", "a.b=3e-05", "c=[2, 4]", 'd={"name": "topk"}', "e=true"]
