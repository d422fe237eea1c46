"""What each demo model is trained on, and for how long."""

from __future__ import annotations

from demo.batches import BatchSource, EasyVQABatches, PuzzleBatches
from demo.training import TrainingPlan

PLANS = {
    ("puzzles", "teacher"): TrainingPlan(tower_steps=800, steps=1600, rate=1.5e-3, tower_rate=5e-4),
    ("puzzles", "student"): TrainingPlan(tower_steps=800, steps=400, rate=2e-3, tower_rate=5e-4),
    ("puzzles-deep", "teacher"): TrainingPlan(tower_steps=400, steps=1600, rate=1.5e-3, tower_rate=0.0),
    ("puzzles-deep", "student"): TrainingPlan(tower_steps=800, steps=1200, rate=2e-3, tower_rate=5e-4),
    ("easy-vqa", "teacher"): TrainingPlan(tower_steps=2500, steps=1500, rate=1.5e-3, tower_rate=3e-4, probe_rate=2e-3),
    ("easy-vqa", "student"): TrainingPlan(tower_steps=1000, steps=200, rate=2e-3, tower_rate=3e-4, probe_rate=2e-3),
}
"""(pair, role) -> steps and learning rates.

The tower of the deep teacher stays as it is while the decoder learns: with attention over the whole row, a tower that
went on learning could solve the puzzle itself, and leave the decoder's layers nothing to do.
"""

NEXT_SHARE = {"teacher": 0.7, "student": 0.0}
"""Share of a puzzle model's questions that ask what comes next; the others ask for a tile that is there."""

PUZZLE_LEVELS = {"puzzles": "plain", "puzzles-deep": "deep"}
"""Pair -> level of its puzzles."""


def batches_for(pair: str, role: str) -> BatchSource:
    """Make the source of batches for a model. Raises ImportError for easy-vqa without its package."""
    return EasyVQABatches() if pair == "easy-vqa" else PuzzleBatches(NEXT_SHARE[role], PUZZLE_LEVELS[pair])
