"""A trained model as an ordinary Hugging Face folder, with the student's own config, names and processor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.vlm.whole import whole_folder

# save_pretrained writes its own; the model card describes the model that training began with.
_NOT_COPIED = {"config.json", "generation_config.json", "README.md"}


def save_student(model: Any, weights: dict[str, Tensor], original: Path, folder: Path) -> None:
    """Write weights (whole, on the CPU) as safetensors beside the original's tokenizer, processor and chat template.

    The folder is whole or absent. Raises OSError, naming it, where the disk does not take it.
    """
    with whole_folder(folder) as aside:
        model.save_pretrained(aside, state_dict=weights)
        for path in sorted(original.iterdir()):
            if path.is_file() and path.name not in _NOT_COPIED and not _is_weights(path):
                shutil.copy2(path, aside / path.name)


def copy_student(original: Path, folder: Path) -> None:
    """Copy a model's folder, or its adapters', unchanged: the result of a step with zero updates."""
    with whole_folder(folder) as aside:
        shutil.copytree(original, aside, dirs_exist_ok=True)


def _is_weights(path: Path) -> bool:
    return ".safetensors" in path.name or path.suffix in (".bin", ".pt", ".pth", ".gguf")
