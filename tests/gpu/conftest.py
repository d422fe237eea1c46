"""The device of the tests marked `gpu`: a CUDA device, or a CPU where their twin is asked for."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device(monkeypatch) -> str:
    """ "cuda" or "cpu"; DeepSpeed is told the same."""
    kind = "cuda" if torch.cuda.is_available() else os.environ.get("GPU_TESTS_ON")
    if kind is None:
        pytest.skip("needs a CUDA device; GPU_TESTS_ON=cpu runs the twin, as make check-gpu DEVICE=cpu does")
    monkeypatch.setenv("DS_ACCELERATOR", kind)
    return kind
