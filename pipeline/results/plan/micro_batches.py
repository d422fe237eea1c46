"""The largest micro-batch of a step, and which settings of its own a step has."""

from __future__ import annotations

from pathlib import Path

from pipeline.recipe.schema import Recipe, Training
from pipeline.runtime.data.loader import WINDOW_WORKERS
from pipeline.runtime.node import MOST_WORKERS


def samples_at_most(training: Training, longest: int) -> int:
    """Samples of a micro-batch of the longest ones: micro_batch_size, or as many as fit in micro_batch_tokens."""
    tokens = training.micro_batch_tokens
    return training.micro_batch_size if tokens is None else max(1, tokens // longest)


def deepspeed_of(recipe: Recipe, step: str) -> tuple[str, Path]:
    """(the key that names a step's DeepSpeed config, its path). To change it for one step, its own key is used."""
    return f"{step}.deepspeed", recipe.deepspeed_of(getattr(recipe, step))


def loader_workers(recipe: Recipe, step: str) -> int:
    """Loader processes of a rank: data.workers, or as many as a rank takes at most by itself."""
    most = WINDOW_WORKERS if step == "cache" else MOST_WORKERS
    return most if recipe.data.workers is None else recipe.data.workers
