"""Read the config.json of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from pipeline.errors import RecipeError


def read_config(folder: Path | str) -> Any:
    """The folder's config, as transformers' class for it. Code that the folder brings along is not run.

    Raises RecipeError where the file is missing or damaged, or of a model that transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of a damaged file, transformers raises whatever it met
        raise RecipeError(
            f"{folder}/config.json is not the config of a model that can be used here: {error}"
        ) from error
