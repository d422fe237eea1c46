"""A recipe's values, and the folders that they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def values(tmp_path: Path) -> dict:
    for role, depth in (("teacher", 8), ("student", 4)):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": depth}}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    (tmp_path / "zero.json").write_text('{"gradient_clipping": "auto", "zero_optimization": {"stage": 2}}')
    training = {"steps": 10, "batch_size": 8, "micro_batch_size": 2}
    return {
        "run": str(tmp_path / "run"),
        "deepspeed": str(tmp_path / "zero.json"),
        "data": {"train": str(tmp_path / "data")},
        "teacher": {"path": str(tmp_path / "teacher"), "layers": [1, 2, 3, 4, 5, 6, 7]},
        "student": {"path": str(tmp_path / "student"), "layers": [1, 2, 3]},
        "verbalize": dict(training),
        "interact": dict(training),
        "reinforce": dict(training),
    }
