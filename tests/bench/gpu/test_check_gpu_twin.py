"""`make check-gpu DEVICE=cpu` for real: every check runs the code that a card runs, and gives figures."""

import json
import math
import os
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from running import make

from bench.gpu.needs import NEEDED
from bench.gpu.plan import checks_for

CHECKS = [check.name for group in checks_for("cpu") for check in group]
LIMIT_MINUTES = 14
BARE = Path(__file__).with_name("bare")


def allowed() -> set[str]:
    """Names that can be imported of what is needed, and of what comes with torch."""
    needed, waiting = {"triton", *NEEDED}, ["torch"]
    while waiting:
        needed.add(name := waiting.pop())
        for one in map(Requirement, metadata.requires(name) or []):
            if (one.marker is None or one.marker.evaluate({"extra": ""})) and canonicalize_name(one.name) not in needed:
                waiting.append(canonicalize_name(one.name))
    names = metadata.packages_distributions()
    return {name for name, makers in names.items() if {canonicalize_name(maker) for maker in makers} & needed}


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """(exit code, what it printed, its folder); on a machine that has only the packages that are said to be needed."""
    out = tmp_path_factory.mktemp("check_gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONLY_PACKAGES", " ".join(sorted(allowed())))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(BARE), *filter(None, [os.environ.get("PYTHONPATH")])]))
        done = make("check-gpu", "DEVICE=cpu", f"OUT={out}", f"MINUTES={LIMIT_MINUTES}")
    return done.returncode, done.stdout + done.stderr, out


@pytest.mark.timeout(60 * (LIMIT_MINUTES + 1))
def test_every_check_gives_figures(twin):
    code, said, out = twin
    assert code == 0, said[-6000:]
    for name in CHECKS:
        found = json.loads((out / f"{name.replace(':', '-')}.json").read_text())
        assert found["status"] == "ok", (name, found["output"])
        assert found["figures"] and all(math.isfinite(figure["value"]) for figure in found["figures"]), name


@pytest.mark.timeout(60 * (LIMIT_MINUTES + 1))
def test_the_table_has_every_check_and_the_goals_beside_the_figures(twin):
    _, _, out = twin
    table = (out / "table.md").read_text()
    assert "these figures mean nothing" in table and "failed: none" in table
    for name in CHECKS:
        assert f"| {name} | ok |" in table
    for figure, goal in (
        ("interact over finetune", "at most 1.15"),
        ("verbalize over forwards", "at most 1.15"),
        ("cache speed over forward", "at least 0.9"),
        ("data wait", "under 2.0"),
        ("verbalize: measured over planned memory", "between 0.85 and 1.15"),
        ("cache: measured over planned memory", "between 0.85 and 1.15"),
        ("interact: measured over planned memory", "between 0.85 and 1.15"),
        ("interaction, tiny: over its products", "at most 1.3"),
        ("interaction, tiny: memory", "under 1000.0"),
        ("finetune over transformers' Trainer", "at most 1.0"),
        ("losses in bfloat16: worst error over that allowed", "at most 1.0"),
        ("failed", "at most 0"),
    ):
        (line,) = [line for line in table.splitlines() if line.startswith(f"|  | {figure} |")]
        assert f"| {goal} |" in line
    assert table.count("| kernel | ms | share | calls |") == 7, "a profile of each timed call"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{name.replace(':', '-')}.json" for name in CHECKS), "table.md"]
    )
