"""What make check-gpu needs besides torch: all that is missing is named at once, and the docs name all of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from running import ROOT

from bench.gpu import needs

BARE = Path(__file__).with_name("bare")


def test_all_that_is_missing_is_named_before_a_check_starts(tmp_path):
    """The other way round than in the twin: what stays away is needed."""
    present = " ".join(set(metadata.packages_distributions()) - {"deepspeed", "matplotlib", "google", "rich"})
    environment = os.environ | {"PYTHONPATH": f"{BARE}{os.pathsep}{ROOT}", "ONLY_PACKAGES": present}
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    expected = "missing here: deepspeed>=0.19.8, matplotlib>=3.10, rich>=15, protobuf. Put wheels of all of them"
    assert expected in done.stderr and "Traceback" not in done.stderr


def test_old_packages_are_named_and_end_it_only_where_nothing_works_with_them(monkeypatch):
    assert needs.missing() == needs.old() == []
    version, there = metadata.version, {"transformers": "4.57.1", "rich": "13.9.4"}
    monkeypatch.setattr(metadata, "version", lambda name: there.get(name) or version(name))
    assert needs.old() == ["transformers>=5.20,<6 (4.57.1 is there)", "rich>=15 (13.9.4 is there)"]
    assert needs.missing() == ["transformers>=5.20,<6 (4.57.1 is there)"]


def test_what_no_package_at_hand_asks_for_is_not_missing(monkeypatch):
    """An older huggingface-hub, which will do, imports httpx and not httpx2."""
    monkeypatch.setattr(needs, "_is_there", lambda module: module != "httpx2")
    assert needs.missing() == ["httpx2"]
    requires = metadata.requires
    monkeypatch.setattr(metadata, "requires", lambda name: [one for one in requires(name) or [] if "httpx" not in one])
    assert needs.missing() == []


def test_every_package_has_a_version_and_stands_in_the_docs():
    pinned = list(needs.pinned())
    assert [one.partition("==")[0] for one in pinned] == list(needs.NEEDED)
    text = (ROOT / "docs" / "check_gpu.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^<!-- python -m bench.gpu.needs -->\n```\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert listed.split() == list(needs.NEEDED)
