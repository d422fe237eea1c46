"""launch.submit: the scripts it writes, what it leaves out, what it asks for and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, tiny_recipe
from submitting import run, script
from tiny import write_data

from launch import submit
from launch.job_times import seconds
from pipeline.cache.find import codec_and_layers, recipe_fingerprints
from pipeline.cache.hashes import HashStore
from pipeline.cache.layout import CacheIdentity
from pipeline.recipe.resolve import load_recipe
from pipeline.results.jobs import read_jobs
from pipeline.runtime.folder import done, mark_done


def test_each_job_follows_the_one_before(slurm, recipe, tmp_path, capsys):
    assert run(recipe, "--partition", "gpu") == 0
    calls = (slurm / "calls.txt").read_text().splitlines()
    assert [Path(call.split()[-1]).stem for call in calls] == ["stage1", "cache", "stage2", "evaluate"]
    assert "--dependency" not in calls[0]
    for before, call in enumerate(calls[1:], start=1):
        assert f"--dependency=afterok:{before} --kill-on-invalid-dep=yes" in call
    assert [(job.name, job.id) for job in read_jobs(tmp_path / "run")] == [
        ("stage1", "1"), ("cache", "2"), ("stage2", "3"), ("evaluate", "4"),
    ]  # fmt: skip
    assert "python -m pipeline status" in capsys.readouterr().out


def test_the_scripts_are_the_plain_ones_with_this_runs_header(recipe, tmp_path, capsys):
    assert run(recipe, "--partition", "gpu", "--set", "seed=3", "teacher.layers=[1, 2]", "--dry-run") == 0
    for name in ("stage1", "cache", "stage2", "evaluate"):
        text = script(tmp_path, name)
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
        assert {"--requeue", "--time=24:00:00", "--partition=gpu", "--gpus-per-node=8"} <= set(options)
        assert len({option.partition("=")[0] for option in options}) == len(options)  # none of the plain script's left
        assert "--signal=USR1@600" in options
    stage1 = script(tmp_path, "stage1")
    assert "#SBATCH --nodes=4\n" in stage1 and "#SBATCH --array" not in stage1
    assert f"RECIPE={recipe}\nONLY='--only verbalize'\noverrides=(--set seed=3 'teacher.layers=[1, 2]')\n" in stage1
    plain = (Path(submit.__file__).parent / "slurm" / "stage1.sbatch").read_text()
    assert stage1.endswith(plain.partition("\nset -euo pipefail\n")[2])
    assert "#SBATCH --nodes=1\n" in script(tmp_path, "cache") and "#SBATCH --array=0-3\n" in script(tmp_path, "cache")
    assert "without --dry-run" in capsys.readouterr().out and read_jobs(tmp_path / "run") == []


def test_a_site_file_reaches_every_job(recipe, tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text(
        "account: lab\nqos: long\npartition: h100\nsbatch: [--constraint=ib]\nmodules: [cuda/12.8]\nwarning_s: 300\n"
        "max_requeues: 7\n"
        "environment: {NCCL_SOCKET_IFNAME: ib0, MESSAGE: 'two words'}\n"
        "container: {runtime: apptainer, image: /images/vlsi.sif, mounts: [/data]}\n"
    )
    assert run(recipe, "--site", str(site), "--dry-run") == 0
    text = script(tmp_path, "stage2")
    for option in ("account=lab", "qos=long", "partition=h100", "constraint=ib", "signal=USR1@300"):
        assert f"#SBATCH --{option}\n" in text
    assert "\nmodule load cuda/12.8 || " in text
    assert "\nexport NCCL_SOCKET_IFNAME=ib0\nexport MESSAGE='two words'\n" in text
    assert "\nMAX_REQUEUES=7\nREQUEUES_SET_BY='max_requeues of the site file'\n" in text
    inside = f"in_container=(apptainer exec --nv --bind {os.getcwd()} --bind /data /images/vlsi.sif)\n"
    assert inside in text and str(Path(sys.executable).parent) not in text
    site.write_text("container: {runtime: enroot, image: lab/vlsi:1, mounts: ['/data', '/a:/b']}\n")
    assert run(recipe, "--site", str(site), "--dry-run") == 0
    text = script(tmp_path, "stage2")
    assert f"--container-image=lab/vlsi:1 --container-mounts={os.getcwd()}:{os.getcwd()},/data:/data,/a:/b" in text


@pytest.mark.parametrize("wanted", [True, False])
def test_a_site_may_leave_the_preflight_out(recipe, tmp_path, wanted):
    """Its judgement must not keep a cluster from training."""
    (tmp_path / "site.yaml").write_text(f"preflight: {str(wanted).lower()}\n")
    assert run(recipe, "--site", str(tmp_path / "site.yaml"), "--dry-run") == 0
    for name in ("stage1", "cache", "stage2"):
        assert ("preflight.py" in script(tmp_path, name)) == wanted
        assert '\nranks "$LAUNCH/' in script(tmp_path, name)


def test_the_shipped_site_file_is_taken_and_reaches_the_jobs(recipe, tmp_path):
    assert run(recipe, "--site", str(ROOT / "site.example.yaml"), "--dry-run") == 0
    text = script(tmp_path, "stage2")
    for option in ("account=lab", "partition=h100", "exclusive", "mem=0"):
        assert f"#SBATCH --{option}\n" in text


def test_a_site_file_with_a_slip_is_refused_whole(recipe, tmp_path, capsys):
    site = tmp_path / "site.yaml"
    site.write_text("acount: lab\nwarning_s: 5\ncontainer: {runtime: docker, image: x, mount: []}\n")
    assert run(recipe, "--site", str(site), "--dry-run") == 2
    said = capsys.readouterr().err
    assert "4 problem(s) in the site file" in said
    assert "'acount'; did you mean 'account'?" in said and "'container.mount'; did you mean 'mounts'?" in said
    assert "warning_s: " in said and "container.runtime: " in said


@pytest.fixture
def stage_1_done(recipe, tmp_path):
    """A run with verbalizers and a cache of two shards, as its cache.json and done.json tell; the run's folder."""
    folder, values = tmp_path / "run", load_recipe(recipe).recipe
    mark_done(folder / "verbalize", {"updates": 3, "teacher": {"layers": [1, 2], "depth": 4}})
    (folder / "verbalize" / "teacher.safetensors").write_bytes(b"verbalizers")
    codec, layers = codec_and_layers(values, done(folder / "verbalize"), None)
    identity = CacheIdentity(codec, layers, 20, recipe_fingerprints(values, HashStore()))
    (folder / "cache" / "sampled-1").mkdir(parents=True)
    (folder / "cache" / "sampled-1" / "cache.json").write_text(json.dumps(identity.to_json()))
    mark_done(folder / "cache", {"folder": "sampled-1", "shards": 3, "bytes": 1})
    return folder


def test_what_is_done_is_left_out(slurm, recipe, stage_1_done, capsys):
    folder = stage_1_done
    mark_done(folder / "cache", {"folder": "sampled-1", "shards": 2, "bytes": 1})
    assert run(recipe) == 0
    assert [job.name for job in read_jobs(folder)] == ["cache", "stage2", "evaluate"]  # a third shard has come
    mark_done(folder / "cache", {"folder": "sampled-1", "shards": 3, "bytes": 1})
    assert run(recipe) == 0
    assert [job.name for job in read_jobs(folder)] == ["stage2", "evaluate"]
    mark_done(folder / "reinforce", {"updates": 3})
    (folder / "student").mkdir()
    (folder / "student" / "config.json").touch()
    (folder / "evaluation.json").write_text('{"untouched": {}, "distilled": {}}')
    capsys.readouterr()
    assert run(recipe) == 0 and "nothing to do: all is done" in capsys.readouterr().out


def test_a_cache_that_stage_2_would_refuse_is_made_again(slurm, recipe, stage_1_done):
    def jobs(*more):
        assert run(recipe, *more) == 0
        return [job.name for job in read_jobs(stage_1_done)]

    assert jobs() == ["stage2", "evaluate"]
    for value in ("cache.codec.points=32", "seed=3", "data.max_length=1000", "interact.teacher_layers=[1, 3]"):
        assert jobs("--set", value) == ["cache", "stage2", "evaluate"], value
    assert jobs("--set", "interact.teacher_layers=[2]") == ["stage2", "evaluate"]
    (stage_1_done / "verbalize" / "teacher.safetensors").write_bytes(b"others")
    assert jobs() == ["cache", "stage2", "evaluate"]
    (stage_1_done / "cache" / "sampled-1" / "cache.json").unlink()  # moved aside
    assert jobs() == ["cache", "stage2", "evaluate"]
    mark_done(stage_1_done / "interact", {"updates": 3})  # what is left needs none
    assert jobs() == ["stage2", "evaluate"]


def test_data_is_made_first_where_it_is_asked_for(slurm, recipe, tmp_path, capsys):
    (tmp_path / "data" / "manifest.json").unlink()
    assert run(recipe) == 2
    assert "and no job is asked to make it; add what python -m data_prep shard takes" in capsys.readouterr().err
    assert run(recipe, "--data-ranks", "16", "--", "--source", "llava", "--input", "my file.json") == 0
    text = script(tmp_path, "data")
    assert "#SBATCH --ntasks-per-node=16\n" in text and "--gpus-per-node" not in text
    assert "set -- --source llava --input 'my file.json'\n" in text


def test_times_come_from_the_command_line_or_the_plan_or_are_asked_for(recipe, tmp_path, capsys):
    asked = ["--recipe", str(recipe), "--nodes", "4", "--dry-run"]
    assert submit.main(asked) == 2  # no models here, so no plan
    assert "the plan cannot tell the times" in (said := capsys.readouterr().err)
    assert "Add --time stage1=HH:MM:SS --time cache=HH:MM:SS --time stage2=HH:MM:SS" in said
    stages = ["--time", "stage1=1-00:00:00", "--time", "cache=90", "--time", "stage2=12:00:00"]
    assert submit.main([*asked, *stages]) == 2
    assert "no plan tells how long evaluate takes; add --time evaluate=HH:MM:SS" in capsys.readouterr().err
    assert submit.main([*asked, *stages, "--time", "4:00:00"]) == 0
    assert "#SBATCH --time=1-00:00:00\n" in script(tmp_path, "stage1")
    assert "#SBATCH --time=4:00:00\n" in script(tmp_path, "evaluate")
    with pytest.raises(SystemExit):
        submit.main([*asked, "--time", "stage3=4:00:00"])
    assert "JOB of data, stage1, cache, stage2, evaluate, found 'stage3=4:00:00'" in capsys.readouterr().err


def test_the_plans_hours_follow_the_machines(tmp_path, tiny_models):
    """The scripts once had fixed times: 12 h for a stage 1 that takes 15 on four times the machines."""
    work = {"steps": 10**6, "batch_size": 1024}  # enough samples an update that none of 32 GPUs goes without
    path = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", write_data(tmp_path / "data", 16), verbalize=work)
    (tmp_path / "site.yaml").write_text("gpu_tflops: 0.0005")  # computing, not the network, takes the time
    hours = {}
    for nodes in (1, 4):
        asked = ["--recipe", str(path), "--nodes", str(nodes), "--site", str(tmp_path / "site.yaml"), "--dry-run"]
        assert submit.main(asked) == 0
        (line,) = [line for line in script(tmp_path, "stage1").splitlines() if line.startswith("#SBATCH --time=")]
        hours[nodes] = int(line.partition("=")[2].removesuffix(":00:00"))
    assert 3.9 < hours[1] / hours[4] < 4.1


def test_a_time_that_leaves_no_room_for_the_warning_is_refused(recipe, capsys):
    """SLURM would send the signal at once, and the job would only ever go back to the queue."""
    assert submit.main(["--recipe", str(recipe), "--nodes", "4", "--time", "15", "--dry-run"]) == 2
    assert "--time stage1=15: expected at least twice the 600 s" in capsys.readouterr().err
    assert run(recipe, "--time", "evaluate=10", "--dry-run") == 2, "it has no checkpoint, but is warned as the others"
    assert "--time evaluate=10: expected at least twice the 600 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93600), ("1-2:30", 95400), ("1-2:30:10", 95410)],
)
def test_a_time_is_read_as_sbatch_reads_it(time, expected):
    assert seconds(time) == expected


def test_a_second_chain_on_a_run_is_refused(slurm, recipe, capsys):
    assert run(recipe) == 0
    (slurm / "queue.txt").write_text("\x1f".join(["2_0", "RUNNING", "None", "0", "1:00", "0", "\n"]))
    assert run(recipe) == 2
    assert "has jobs in the queue already: cache 2_0 (RUNNING). Wait for them, or end them: scancel 2_0" in (
        capsys.readouterr().err
    )


def test_a_second_chain_is_refused_where_slurm_does_not_say_what_is_in_the_queue(
    slurm, recipe, tmp_path, capsys, monkeypatch
):
    assert run(recipe) == 0
    sent = read_jobs(tmp_path / "run")
    monkeypatch.setenv("SAYS", "Socket timed out on send/recv operation")
    assert run(recipe) == 2
    said = capsys.readouterr().err
    assert "SLURM does not say whether" in said and "stage1 1, cache 2, stage2 3, evaluate 4" in said
    assert "again when squeue answers" in said and f"remove {tmp_path / 'run' / 'jobs' / 'jobs.json'} before" in said
    assert read_jobs(tmp_path / "run") == sent
    monkeypatch.setenv("SAYS", "Invalid job id specified")  # of one job alone: it is gone
    assert run(recipe) == 0


def test_what_slurm_refuses_is_said_with_what_is_in_the_queue(slurm, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAIL", "stage2")
    assert run(recipe) == 2
    said = capsys.readouterr().err
    assert "SLURM refused the job stage2: sbatch: error: Invalid qos specification" in said
    assert "--site" in said and said.strip().endswith("scancel 1 2")
    assert [job.name for job in read_jobs(tmp_path / "run")] == ["stage1", "cache"]


def test_without_slurm_other_ways_are_named(recipe, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert run(recipe) == 2
    assert "no sbatch here" in (said := capsys.readouterr().err) and "--dry-run" in said and "--hostfile" in said


def test_a_run_with_another_run_s_cache_has_no_cache_job(slurm, recipe, tmp_path):
    assert run(recipe, "--set", f"cache_from={tmp_path / 'other'}") == 0
    assert [job.name for job in read_jobs(tmp_path / "run")] == ["stage1", "stage2", "evaluate"]
    stage2 = (slurm / "calls.txt").read_text().splitlines()[1]
    assert "--dependency=afterok:1 " in stage2
