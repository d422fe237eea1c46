"""launch/preflight.py on a tiny recipe: two ranks that are right, one that is wrong, one that is left alone."""

import re
import socket
import subprocess
import sys

import pytest
from running import ROOT, deepspeed, python, tiny_recipe
from s3 import s3_server
from tiny import write_data

from data_prep.storage import listed, location
from launch import preflight
from pipeline.errors import REQUEUE_EXIT, RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.results.preflight import facts
from pipeline.results.preflight.needs import needs
from pipeline.results.preflight.together import JOINING, Deadline, share_folder
from pipeline.runtime.ranks import Ranks

LINES = ["hosts", "commit", "versions", "shared paths", "disk", "memory", "/dev/shm", "devices", "all-reduce", "recipe"]


@pytest.fixture
def recipe(tmp_path, tiny_models):
    return tiny_recipe(tmp_path, tiny_models, "qwen2_vl", write_data(tmp_path / "data", 16))


def test_two_ranks_look_at_their_machine_and_sum(recipe, tmp_path):
    said = deepspeed(2, "preflight.py", "--recipe", recipe)
    lines = [line for line in said.splitlines() if line.startswith(("ok ", "WRONG "))]
    assert [line[6:].partition(":")[0] for line in lines] == LINES and all(line.startswith("ok ") for line in lines)
    assert re.search(r"all-reduce: +33.6 MB over 2 ranks by gloo, \d+\.\d\d GB/s a rank", said)
    assert list((tmp_path / "run").iterdir()) == []  # no file of it is left


def test_the_memory_of_a_machine_is_what_the_job_may_take_of_it(recipe, monkeypatch):
    monkeypatch.setattr(facts, "available_memory", lambda: 7)
    assert facts.look(load_recipe(recipe).recipe, {}, 0, "cpu").memory == 7


def test_what_is_wrong_comes_with_exit_code_2_and_all_at_once(recipe, tmp_path):
    text = recipe.read_text().replace(str(tmp_path / "data"), str(tmp_path / "nowhere"))
    recipe.write_text(text.replace("student:\n  layers:\n  - 1\n", "student:\n  layers:\n  - 9\n"))
    said = python("launch/preflight.py", "--recipe", recipe, "--steps", "verbalize", "cache", check=2)
    assert re.search(rf"WRONG data.train: +no {tmp_path}/nowhere/manifest.json \(No such file", said)
    assert re.search(r"WRONG recipe: +2 problem\(s\) in the recipe:.*student.layers", said)


@pytest.fixture
def meeting(monkeypatch):
    """Where two ranks are to meet, with rank 0's socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("WORLD_SIZE", 2), ("RANK", 0)):
            monkeypatch.setenv(name, str(value))
        yield server


def end_of_a_wait(capsys, monkeypatch) -> str:
    """What a rank says that has waited for the others too long."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    deadline = Deadline(2, JOINING, 0.05)
    deadline.timer.join(30)
    assert codes == [2]
    return capsys.readouterr().err


def test_a_rank_that_never_comes_is_missed_where_the_ranks_meet(meeting, capsys, monkeypatch):
    with socket.create_connection(meeting.getsockname()):
        said = end_of_a_wait(capsys, monkeypatch)
    port = meeting.getsockname()[1]
    assert f"waiting for the other ranks for 0 s; 2 ranks are to meet at 127.0.0.1:{port}" in said
    assert "connections are there from 127.0.0.1 (1). Look at the hosts that are not named" in said


def test_a_rank_says_whether_the_meeting_point_answers(meeting, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert "it answers, so look at the ranks that do not say this" in end_of_a_wait(capsys, monkeypatch)
    meeting.close()
    assert "it does not answer ([Errno 111] Connection refused)" in end_of_a_wait(capsys, monkeypatch)


def test_the_minute_begins_when_all_ranks_are_there(recipe, monkeypatch):
    """Imports from a cold disk, or an image that one node still pulls, once ended a job for good after 55 s."""
    limits: list[float] = []

    class Looked(Exception):
        pass

    def join(verbose: bool) -> Ranks:
        limits.append(deadline.timer.interval)
        return Ranks()

    def look(*_) -> None:
        limits.append(deadline.timer.interval)
        raise Looked

    monkeypatch.setattr("pipeline.runtime.engine.start", join)
    monkeypatch.setattr("pipeline.results.preflight.facts.look", look)
    deadline = Deadline(2)
    started = deadline.timer
    with pytest.raises(Looked):
        preflight._preflight(preflight.parser().parse_args(["--recipe", str(recipe)]), deadline)
    deadline.call_off()
    assert [started.interval, *limits] == [590, 590, 55], "s to start, to meet as a training does, for all else"
    assert started.finished.is_set(), "what was counted before ends nothing any more"


def test_a_job_that_is_asked_to_end_before_it_began_may_be_started_again(recipe):
    program = (
        "import os, signal; from launch import preflight\n"
        "preflight._preflight = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"preflight.main(['--recipe', {str(recipe)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == REQUEUE_EXIT


def test_a_damaged_manifest_is_the_datas_fault(recipe, tmp_path):
    (tmp_path / "data" / "manifest.json").write_text("{")
    with pytest.raises(RecipeError, match=r"data.train: .*manifest.json"):
        needs(load_recipe(recipe).recipe, ["verbalize"], 2, 2)


def test_the_disk_must_hold_what_is_still_to_be_written(recipe):
    loaded = load_recipe(recipe).recipe
    steps = ["verbalize", "cache", "interact", "reinforce"]
    whole = needs(loaded, steps, 2, 2)
    # Of six verb-FFNs of width 32 three matrices each, 12 bytes an element, three checkpoints at a time.
    assert needs(loaded, ["verbalize"], 2, 2).disk > 3 * 12 * (4 + 2) * 3 * 32 * 32
    # Both steps train the whole student. interact's checkpoints are gone before reinforce writes its first.
    interact, reinforce = (needs(loaded, [step], 2, 2).disk for step in steps[2:])
    assert interact == reinforce and needs(loaded, steps[2:], 2, 2).disk < 1.5 * interact
    begun = loaded.run / "cache" / "sampled-1"
    begun.mkdir(parents=True)
    (begun / "cache.json").touch()
    before = needs(loaded, ["cache"], 2, 2).disk
    (begun / "000000.tar").write_bytes(bytes(before // 2))
    assert needs(loaded, ["cache"], 2, 2).disk == before - before // 2
    assert whole.memory[0] > 0 and whole.device[1] in steps


def test_a_run_that_was_stopped_needs_no_room_for_checkpoints_that_it_has(recipe):
    loaded, steps = load_recipe(recipe).recipe, ["interact", "reinforce"]
    before = needs(loaded, steps, 2, 2).disk
    for update in (1, 2):
        stands = loaded.run / "interact" / "checkpoints" / f"update_{update:09}"
        stands.mkdir(parents=True)
        (stands / "rank_00000.safetensors").write_bytes(bytes(1000))
    aside = stands.with_name("damaged_000000003")  # for the user to remove: the run makes no room of it
    aside.mkdir()
    (aside / "rank_00000.safetensors").write_bytes(bytes(1000))
    assert needs(loaded, steps, 2, 2).disk == before - 2000
    (stands / "rank_00001.safetensors").write_bytes(bytes(before))
    results = needs(loaded, steps, 2, 2).disk
    assert 0 < results < before, "the students are still to be written"


def test_a_folder_that_cannot_be_written_says_why(tmp_path):
    (tmp_path / "file").touch()
    assert share_folder(tmp_path / "file" / "run", Ranks()).endswith("cannot be written (Not a directory)")
    assert share_folder(tmp_path / "run", Ranks()) == "" and list((tmp_path / "run").iterdir()) == []


def test_a_bucket_for_the_cache_is_written_and_read(recipe):
    with s3_server() as server:
        told = ("--recipe", recipe, "--steps", "cache", "--set", "cache.folder=s3://bucket/caches")
        assert "cache.folder (written and read by all)" in python("launch/preflight.py", *told)
        assert listed(location("s3://bucket/caches")) == {}  # no file of it is left
        server.fault = lambda environ: "denied" if environ["REQUEST_METHOD"] == "PUT" else None
        said = python("launch/preflight.py", *told, check=2)
    assert re.search(
        r"WRONG cache.folder: +s3://bucket/caches/\.preflight-\w+-0: the store answers PermissionError", said
    )
