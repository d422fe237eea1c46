"""How a step's global batch is cut, and which settings of its own a step has."""

from __future__ import annotations

import math
from pathlib import Path

from pipeline.recipe.schema import Recipe, Training

MOST_WORKERS = 8
"""Loader processes of a rank where data.workers is left out: as many as a rank takes at most."""


def samples_at_most(training: Training, longest: int) -> int:
    """Samples of a micro-batch of the longest ones: micro_batch_size, or as many as fit in micro_batch_tokens."""
    tokens = token_limit(training)
    return training.micro_batch_size if tokens is None else max(1, tokens // longest)


def micro_steps(training: Training, ranks: int, mean_tokens: float) -> int:
    """Micro-steps of an update on one rank, for samples of mean length."""
    tokens = token_limit(training)
    if tokens is None:
        return max(1, training.batch_size // (training.micro_batch_size * ranks))
    return math.ceil(training.batch_size / ranks * mean_tokens / tokens)


def token_limit(training: Training) -> int | None:
    """micro_batch_tokens, where the recipe sets it."""
    return getattr(training, "micro_batch_tokens", None)


def deepspeed_of(recipe: Recipe, step: str) -> tuple[str, Path]:
    """(the key that names a step's DeepSpeed config, its path): the step's own, else the recipe's."""
    section = getattr(recipe, step)
    key = f"{step}.deepspeed" if "deepspeed" in type(section).model_fields else "deepspeed"
    return key, getattr(section, "deepspeed", None) or recipe.deepspeed


def loader_workers(recipe: Recipe) -> int:
    """Loader processes of a rank."""
    workers: int | None = recipe.data.workers
    return MOST_WORKERS if workers is None else workers
