"""A model folder's weights are safetensors: pickles are not read, whatever else is there."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import RecipeError
from pipeline.vlm.backbone import load_vlm


def test_a_folder_with_pickles_alone_is_refused(tiny_models, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(tiny_models["qwen2_vl", "student"], folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    load_vlm(folder, torch.float32)  # the pickle beside them does not matter
    weights.unlink()
    with pytest.raises(RecipeError, match=r"pytorch_model\.bin is a pickle and is not read\. Convert it once"):
        load_vlm(folder, torch.float32)
