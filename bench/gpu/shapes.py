"""The sizes of the checks: real ones for a card, tiny ones for the twin on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.losses.problem import Case


@dataclass(frozen=True)
class Shapes:
    """What the checks measure, and how often."""

    pairs: tuple[str, ...]
    """Pairs of bench.steps, the smallest first."""
    product: int
    """Side of the square matrices whose product shows what the device can do."""
    copy_mib: int
    """Size of the copy, and of the collectives' tensor."""
    kernel_vocabs: tuple[int, ...]
    kernel_width: int
    losses: Mapping[str, Case]
    loss_rounds: int
    step_rounds: int
    cache_rounds: int
    """Of the teacher's passes, which read all samples and so take seconds."""
    updates: int
    """Updates of stage 2 by which the data wait is measured, and of transformers' Trainer."""
    demo_size: str
    """SIZE of launch/demo.sh."""
    demo_students: tuple[str, ...]
    """STUDENTS of launch/demo.sh. A card's minutes are not for the answers of the teacher, which take the longest."""


CARD = Shapes(
    pairs=("real-0.5b", "real-2b"),
    product=8192,
    copy_mib=4096,
    kernel_vocabs=(1, 4097, 151_936),
    kernel_width=896,
    losses={
        "d1536": Case(tokens=4096, width=1536, teachers=20),  # 14 of 20 teacher layers are candidates of each of 7
        "d3584": Case(tokens=4096, width=3584, teachers=20),
    },
    loss_rounds=10,
    step_rounds=7,
    cache_rounds=2,
    updates=20,
    demo_size="full",
    demo_students=("finetuned", "paper", "interaction"),
)
TWIN = Shapes(
    pairs=("tiny",),
    product=256,
    copy_mib=4,
    kernel_vocabs=(1, 513),
    kernel_width=32,
    losses={"tiny": Case(tokens=24, width=32, vocab=600, students=2, teachers=5, kept=8)},
    loss_rounds=2,
    step_rounds=2,
    cache_rounds=2,
    updates=2,
    demo_size="smallest",
    demo_students=("interaction",),
)


def shapes_of(device: str) -> Shapes:
    """The shapes of a kind of device."""
    return CARD if device == "cuda" else TWIN
