"""What is installed is what constraints.txt says, and the lock knows every requirement that setup.cfg names."""

from __future__ import annotations

import configparser
import re
import shlex
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from launch import cache, console, train
from pipeline.errors import RecipeError
from pipeline.recipe.checks import load_deepspeed_config
from pipeline.recipe.resolve import SHIPPED, load_recipe

ROOT = Path(__file__).parents[1]
NOT_PINNED = {"vlsi-distillation", "pip"}
"""The project itself, and what the Python that made the environment brought along."""
NOT_LOCKED = {"eval", "trackio"}
"""Extras that would hold other packages of the lock back: the Makefile says which (LOCKED)."""


def lock() -> dict[str, str]:
    """{name: version} of the lines of constraints.txt that hold for this Python and platform."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [one for one in wanted if one.marker is None or one.marker.evaluate()]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in here}


def differences(installed: dict[str, str], pinned: dict[str, str]) -> list[str]:
    found = []
    for name, version in sorted(installed.items()):
        if pinned.get(name) is None or Version(version).public != Version(pinned[name]).public:
            found.append(f"{name}: installed {version}, constraints.txt has {pinned.get(name)}")
    return found


def test_every_installed_package_is_pinned_at_its_version():
    if Path(sys.prefix) != ROOT / ".venv" or not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("not the environment of make setup")
    own = metadata.distributions(path=[sysconfig.get_paths()["purelib"]])  # not what `make peers` put beside
    installed = {canonicalize_name(one.name): one.version for one in own}
    unpinned = {name for name in ("setuptools", "wheel") if name not in lock()}
    assert differences({n: v for n, v in installed.items() if n not in NOT_PINNED | unpinned}, lock()) == []


def test_a_drift_is_found():
    pinned = {"a": "1.0", "b": "2.0"}
    assert differences({"a": "1.0+cpu", "b": "2.1", "c": "1"}, pinned) == [
        "b: installed 2.1, constraints.txt has 2.0",
        "c: installed 1, constraints.txt has None",
    ]


def test_every_requirement_is_in_the_lock_within_its_range():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {name: text for name, text in setup["options.extras_require"].items() if name not in NOT_LOCKED}
    text = "\n".join([setup["options"]["install_requires"], *extras.values()])
    wanted = [
        Requirement(line.strip()) for line in text.splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    pinned = lock()
    assert len(wanted) > 20
    for one in wanted:
        version = pinned[canonicalize_name(one.name)]
        assert one.specifier.contains(version), f"{one} is {version} in constraints.txt: make lock"


def test_what_the_first_steps_leave_goes_neither_into_git_nor_into_an_image():
    """The cluster's page puts 160 GB of weights into models/."""
    for file in (".gitignore", ".dockerignore"):
        ignored = {line.strip("/") for line in (ROOT / file).read_text().splitlines()}
        assert {"models", "data", "runs", "build", "site.yaml"} <= ignored, file


def test_the_launchers_options_stand_before_the_script_and_ours_behind_it():
    given = shlex.split("--num_gpus 2 --stage 2 --hostfile h --recipe R --set a=2 b=2 -q --include node1:0,1")
    launcher, *rest = console.command(train, given)
    script = rest.index(str((ROOT / "launch" / "train.py").resolve()))
    assert Path(launcher).name == "deepspeed"
    assert rest[:script] == shlex.split("--num_gpus 2 --hostfile h -q --include node1:0,1")
    assert rest[script + 1 :] == shlex.split("--stage 2 --recipe R --set a=2 b=2")
    assert console.command(cache, ["--recipe", "R"])[-3:] == [str(ROOT / "launch" / "cache.py"), "--recipe", "R"]


def test_what_is_wrong_in_our_own_options_is_said_before_a_launcher_starts(capsys):
    with pytest.raises(SystemExit):
        console.command(train, ["--stage", "2", "--recipe", "R", "--only", "cache"])
    assert "--only cache is no step of stage 2" in capsys.readouterr().err


def test_under_a_launcher_the_program_runs_as_it_is(monkeypatch):
    ran = []
    monkeypatch.setattr(train, "main", lambda arguments: ran.append(arguments) or 0)
    monkeypatch.setattr("sys.argv", ["vlsi-train", "--stage", "1", "--recipe", "R"])
    monkeypatch.setenv("RANK", "0")
    assert console.train() == 0 and ran == [["--stage", "1", "--recipe", "R"]]


def test_tasks_of_srun_that_do_not_know_their_rank_start_no_launcher_each(monkeypatch, capsys):
    monkeypatch.setattr("os.execvp", lambda *_: pytest.fail("a launcher for each task"))
    monkeypatch.setattr("sys.argv", ["/bin/vlsi-train", "--stage", "1", "--recipe", "R"])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    said = []
    for task in ("0", "7"):
        monkeypatch.setenv("SLURM_PROCID", task)
        assert console.train() == 2
        said.append(capsys.readouterr().err)
    assert "expected RANK in the environment of each of srun's 8 tasks" in said[0] and said[1] == "", "said once"
    assert f"Run: srun bash {ROOT}/launch/slurm/as_rank.sh vlsi-train --stage 1 --recipe R" in said[0]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # of one task, a launcher is what is asked for
    monkeypatch.setattr("os.execvp", lambda *line: said.append(line))
    console.train()
    assert len(said) == 3


def test_a_shipped_deepspeed_config_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "recipes" / "demo.yaml"
    named = load_recipe(recipe).recipe.deepspeed
    assert named.is_absolute() and named.parent == SHIPPED / "ds_configs" and load_deepspeed_config(named)
    (tmp_path / "ds_configs").mkdir()
    own = tmp_path / "ds_configs" / named.name
    own.write_text("{}")
    assert load_recipe(recipe).recipe.deepspeed == Path("ds_configs") / named.name, "one's own comes first"
    missing = load_recipe(recipe, ["deepspeed=ds_configs/none.json"]).recipe.deepspeed
    with pytest.raises(RecipeError, match=r"no file ds_configs/none.json; the shipped ones are in /.*ds_configs"):
        load_deepspeed_config(missing)


def test_env_says_what_is_broken_and_goes_on(monkeypatch, capsys):
    from pipeline.__main__ import main
    from pipeline.results import environment

    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(environment, "_devices", broken)
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert "not known: ImportError: libcudart.so.13" in said
    assert re.search(r"packages +transformers +\d", said) and str(SHIPPED / "recipes") in said
    assert main(["env", "--json"]) == 0
    assert '"deepspeed": "0.' in capsys.readouterr().out
