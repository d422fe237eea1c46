"""Which of lmms-eval's model classes serves a model family, and with which arguments.

Read from lmms-eval 0.7.3. Its generic class `huggingface` is no way out for other families: it takes AutoModel, which
has no language head, because it looks for the name of a family among config classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.vlm.config import read_config
from pipeline.vlm.image_size import NO_LIMITS, PixelLimits
from pipeline.vlm.processing import load_processor


@dataclass(frozen=True)
class ModelClass:
    """A model class of lmms-eval."""

    name: str
    """As in its --model."""
    pixel_limits: bool = False
    """Whether it has limits on an image's area of its own, which replace those of the model's folder."""
    one_at_a_time: bool = False
    """Whether it takes no batch of more than one sample."""


_LLAVA = ModelClass("llava_hf", one_at_a_time=True)

CLASSES: Mapping[str, ModelClass] = {
    "qwen2_vl": ModelClass("qwen2_vl", pixel_limits=True),
    "qwen2_5_vl": ModelClass("qwen2_5_vl", pixel_limits=True),
    "qwen3_vl": ModelClass("qwen3_vl", pixel_limits=True),  # it knows one with experts by a size in its path alone
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "gemma3": ModelClass("gemma3"),
    "internvl": ModelClass("internvl_hf", one_at_a_time=True),
}
"""model_type of config.json -> the class."""


def model_class(folder: Path) -> ModelClass:
    """The class for a folder's model. Raises RecipeError where lmms-eval has none for its family."""
    family = str(read_config(folder).model_type)
    if family not in CLASSES:
        raise RecipeError(
            f"{folder}: lmms-eval has no model class that serves model_type {family!r} in transformers' format; it has "
            f"some for {', '.join(sorted(CLASSES))}. Evaluate it without --benchmarks, on a shard folder with --data"
        )
    return CLASSES[family]


def model_arguments(folder: Path, limits: PixelLimits = NO_LIMITS) -> dict[str, Any]:
    """The --model_args of a folder's model, less where it runs.

    limits: a run's, of the pictures that its student was trained on. The model sees pictures as large as then; a limit
    that the run leaves out is the folder's own, for lmms-eval's classes bring lower ones, 602,112 pixels for Qwen2-VL.
    Raises RecipeError where the path would not survive lmms-eval's syntax, or lmms-eval has no class for the family.
    """
    chosen, path = model_class(folder), str(folder.absolute())
    if "," in path or "=" in path:
        raise RecipeError(
            f"{path}: lmms-eval reads ',' and '=' in a path as its own; link the folder under another name"
        )
    arguments: dict[str, Any] = {"pretrained": path}
    if chosen.pixel_limits:
        own = PixelLimits.of(load_processor(folder))
        if own is not None:
            smallest, largest = limits.smallest or own.smallest, limits.largest or own.largest
            arguments |= {"min_pixels": smallest, "max_pixels": largest}
    return arguments
