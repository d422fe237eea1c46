"""The learning rate at an update: a function of the update alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from pipeline.errors import RecipeError
from pipeline.recipe.schema import Training


def learning_rate(training: Training, update: int, total: int) -> float:
    """Linear warm-up, then a cosine from learning_rate to final_learning_rate (paper, section 4); update from 0."""
    if update < training.warmup_steps:
        return training.learning_rate * (update + 1) / training.warmup_steps
    span = max(1, total - 1 - training.warmup_steps)
    progress = min(1.0, (update - training.warmup_steps) / span)
    height = training.learning_rate - training.final_learning_rate
    return training.final_learning_rate + height * (1 + math.cos(math.pi * progress)) / 2


def check_warmup(step: str, training: Training, total: int) -> None:
    """Raise RecipeError where a step of `total` updates would be warm-up to its end: of epochs nobody knew how many."""
    if 0 < total <= training.warmup_steps:
        raise RecipeError(
            f"{step}.warmup_steps: expected fewer than the step's {total} updates ({step}.epochs: {training.epochs}), "
            f"found {training.warmup_steps}; lower it, or raise {step}.epochs, and run the command again"
        )
