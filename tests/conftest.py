"""Fixtures that many tests share: tiny models, made once."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, which reads it only then
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """{(kind, "teacher" | "student"): folder}: a teacher of 6 layers x 32 and a student of 3 x 32."""
    import tiny

    root = tmp_path_factory.mktemp("models")
    return {
        (kind, role): tiny.write_vlm(root / kind / role, kind, layers, 32, seed=layers)
        for kind in (*tiny.KINDS, *tiny.MORE_KINDS)
        for role, layers in (("teacher", 6), ("student", 3))
    }


SURVIVED = "survived "


@pytest.fixture
def survived(record_property) -> Callable[..., None]:
    """survived(kills=1, faults=2): what a test did without a loss; called at its end, added up over all tests."""

    def add(**counts: int) -> None:
        for what, count in counts.items():
            record_property(SURVIVED + what, count)

    return add


def pytest_terminal_summary(terminalreporter) -> None:
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, count in report.user_properties:
            if name.startswith(SURVIVED):
                counts[name.removeprefix(SURVIVED)] += count
    if counts:
        terminalreporter.line(
            "survived, with nothing lost: " + ", ".join(f"{n:,} {what}" for what, n in counts.items())
        )
