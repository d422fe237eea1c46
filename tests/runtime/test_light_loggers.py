"""What a run may do without: matplotlib, until a picture is drawn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_steps_that_draw_nothing_and_traces_in_the_terminal_need_no_matplotlib(tmp_path):
    program = f"""
import sys
sys.modules["matplotlib"] = None
import pipeline.results.trace.run
from pathlib import Path
from pipeline.runtime.metrics import Metrics
metrics = Metrics(Path({str(tmp_path)!r}), "verbalize", 0)
metrics.write(1, {{"student/1": 2.0}})
metrics.close()
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert list((tmp_path / "tensorboard" / "verbalize").glob("events.*"))
