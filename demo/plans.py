"""What each demo model is taught, and for how long."""

from __future__ import annotations

from demo.batches import EasyVQALessons, Lessons, PuzzleLessons
from demo.training import Plan

PLANS = {
    ("puzzles", "teacher"): Plan(tower_steps=800, steps=1600, rate=1.5e-3, tower_rate=5e-4),
    ("puzzles", "student"): Plan(tower_steps=800, steps=400, rate=2e-3, tower_rate=5e-4),
    ("easy-vqa", "teacher"): Plan(tower_steps=2500, steps=1500, rate=1.5e-3, tower_rate=3e-4, read_out_rate=2e-3),
    ("easy-vqa", "student"): Plan(tower_steps=1000, steps=200, rate=2e-3, tower_rate=3e-4, read_out_rate=2e-3),
}
"""(pair, role) -> how it is taught."""

NEXT_SHARE = {"teacher": 0.7, "student": 0.0}
"""Share of a puzzle model's questions that ask what comes next; the others ask for a tile that is there."""


def lessons_for(pair: str, role: str) -> Lessons:
    """Make the supply of lessons for a model. Raises ImportError for easy-vqa without its package."""
    return PuzzleLessons(NEXT_SHARE[role]) if pair == "puzzles" else EasyVQALessons()
