"""Files that others could have written, wrong in a thousand ways: none runs code, and each is refused or harmless.

A process with little memory reads them all (fuzzing.py, fuzz_targets.py). Another seed: python tests/faults/fuzzing.py
FOLDER SEED, with VLSI_FUZZ_CANARY naming a file that does not exist.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutations import CANARY

FUZZING = Path(__file__).with_name("fuzzing.py")
FINE = ("refused", "equal", "accepted")
TARGETS = {"data shard", "data manifest", "cache", "cache record", "recipe", "verbalizers", "model", "done.json"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("fuzz")
    environment = {**os.environ, CANARY: str(folder / "canary"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(FUZZING), str(folder / "inputs"), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    last = found[-1] if found else "the first input"
    assert done.returncode == 0, f"exit code {done.returncode} after {last}\n{done.stderr[-3000:]}"
    return found


def test_every_input_is_refused_or_harmless(outcomes, capsys, survived):
    """No code run, no file elsewhere, no memory, no hang, and no other data in silence where there is a hash."""
    counts = Counter(one["outcome"] for one in outcomes)
    with capsys.disabled():
        print(f"\nfuzz: {len(outcomes)} inputs: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    wrong = [one for one in outcomes if one["outcome"] not in FINE]
    assert wrong == []
    survived(**{"inputs fuzzed": len(outcomes)})
    assert len(outcomes) > 900 and {one["target"].split(",")[0] for one in outcomes} >= TARGETS


def test_what_is_refused_says_something(outcomes):
    assert [one for one in outcomes if one["outcome"] == "refused" and len(one["detail"]) < 10] == []


PLANTED = """
import os, pickle, sys
from pathlib import Path
import fuzzing
from fuzz_targets import Case
from mutations import CANARY, pickles

def spin():
    while True:
        pass

folder, fuzzing.LIMIT_S = Path(sys.argv[1]), 1
harmless = pickles()[1].replace(b"touch", b"true ")
reads = {
    "runs code": lambda: Path(os.environ[CANARY]).touch(),
    "loads a pickle": lambda: pickle.loads(harmless),
    "writes elsewhere": lambda: folder.with_name("elsewhere").touch(),
    "takes memory": lambda: bytearray(2**32),
    "hangs": spin,
    "leaks": lambda: {}["no such key"],
    "gives other data": lambda: 2,
    "gives the data": lambda: 1,
}
fuzzing.main(folder, (Case("planted", what, read, 1) for what, read in reads.items()))
"""


def test_the_watch_notices_what_is_planted(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    path = os.pathsep.join([str(FUZZING.parent), str(FUZZING.parents[1]), str(FUZZING.parents[2])])
    environment = {**os.environ, CANARY: str(tmp_path / "canary"), "PYTHONPATH": path}
    command = [sys.executable, str(tmp_path / "planted.py"), str(tmp_path / "inputs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {one["what"]: one["outcome"] for one in map(json.loads, done.stdout.splitlines())}
    assert found == {
        "runs code": "code ran",
        "loads a pickle": "escaped",
        "writes elsewhere": "escaped",
        "takes memory": "memory",
        "hangs": "hang",
        "leaks": "leaked KeyError",
        "gives other data": "silently other",
        "gives the data": "equal",
    }
