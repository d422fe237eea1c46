"""The cells: data, share of wrong answers and number of updates under which the arms are compared; and the scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bench.ladder.arms import ALL, MAIN, MATCHINGS

SWEEP_SEEDS = (100,)
"""Learning rates are chosen on these seeds, which are not quoted: no arm is chosen by the samples that judge it."""


@dataclass(frozen=True)
class Task:
    """What the student of a pair of models learns."""

    recipe: str
    models: str
    """Folder of the pair: teacher and student."""
    shard: tuple[str, ...]
    """The command that makes the data, as arguments of python."""
    questions: tuple[str, ...]
    """Its options for the training mix and the held-out samples."""
    other_questions: tuple[str, ...]
    """The same for the other held-out samples that every arm answers, of what `other` says."""
    other: str = "other task"
    """Heading of their column: naming a tile, naming a colour; or a control."""
    common: Mapping[str, object] = field(
        default_factory=lambda: {"deepspeed": "ds_configs/zero0.json", "data.memory_mb": 256}
    )
    """Values of the recipe for all runs: one process on a CPU, and data that is read many times."""
    micro_batch_size: int = 32
    made_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """role -> the command that makes its model, as arguments of python, where the ladder has to."""


def _demo(recipe: str, pair: str, source: str, questions: tuple[str, ...], other: tuple[str, ...]) -> Task:
    """A pair of the demo's, on a source of data_prep."""
    return Task(recipe, f"demo/models/{pair}", ("-m", "data_prep", "shard", "--source", source), questions, other)


DEEP = ("--level", "deep")


def _wide(pair: str, recipe: str) -> Task:
    """A pair of more and wider layers than the demo's, which learns the same; trained on the GPU first."""
    models = f"build/wide/models/{pair}"
    layers = {"teacher.layers": list(range(1, 12)), "student.layers": list(range(1, 6))}
    paths = {f"{role}.path": f"{models}/{role}" for role in ("teacher", "student")}
    train = ("-m", "demo.build_models", "--size", "wide", "--device", "cuda", "--pair", pair, "--role")
    return replace(
        _demo(recipe, pair, pair, (), ("--kinds", "tile")), models=models,
        common={"deepspeed": "ds_configs/zero0.json", "data.memory_mb": 256, **paths, **layers},
        made_by={"teacher": (*train, "teacher", "--at-least", "0.9"), "student": (*train, "student")},
    )  # fmt: skip


TASKS: Mapping[str, Task] = {
    "puzzles": _demo("recipes/demo.yaml", "puzzles", "puzzles", (), ("--kinds", "tile")),
    "puzzles-deep": _demo(
        "recipes/demo_puzzles_deep.yaml", "puzzles-deep", "puzzles", DEEP, (*DEEP, "--kinds", "tile")
    ),
    "easy-vqa": _demo(
        "recipes/demo_easy_vqa.yaml", "easy-vqa", "easy-vqa", ("--types", "shape,yes-no"), ("--types", "color")
    ),
    "puzzles-wide": _wide("puzzles", "recipes/demo.yaml"),
    "real": Task(
        "bench/real/recipes/distil.yaml", "build/real/models", ("-m", "bench.real.shard"), (),
        ("--pictures", "shuffled"), "shuffled pictures", {"deepspeed": "ds_configs/zero1.json"}, 16,
    ),
}  # fmt: skip
"""Pair of models -> its task."""


@dataclass(frozen=True)
class Cell:
    """One setting in which arms are compared."""

    name: str
    text: str
    """The setting in words, for the table."""
    data: str
    """The pair of models, and with it the task: a key of TASKS."""
    wrong: float
    """Share of the training samples with a wrong answer."""
    samples: int = 1000
    updates: int = 300
    held_out: int = 500
    seeds: int = 5
    """Of the arms that are compared."""
    variant_seeds: int = 3
    """Of the variants, which say where to look."""
    arms: str = MAIN
    also: tuple[str, ...] = ()
    """Names of further arms."""
    stage_1: int | None = None
    """Updates of the verbalizers; None: the recipe's."""

    @property
    def task(self) -> Task:
        """Recipe and questions of its data."""
        return TASKS[self.data]


@dataclass(frozen=True)
class Scale:
    """How much of the ladder runs."""

    cells: tuple[Cell, ...]
    learning_rates: tuple[float, ...]
    """The grid of the sweep, the same for all arms."""
    device: str = "cpu"
    """What its jobs run on: cpu, or cuda, the first GPU."""


CLEAN = ("finetune_equal_time", "wrong_verbalizers")
"""Arms that a cell without wrong answers has beside the main ones."""

FEW_UPDATES = ("last_layer_ce", "heavier_last")
"""Arms in which the last layer weighs more, or the answers beside it, where there are few updates."""

SCALES: Mapping[str, Scale] = {
    "cpu": Scale(
        cells=(
            Cell("puzzles-40", "puzzles, 40 % wrong answers", "puzzles", 0.4, arms=ALL),
            Cell(
                "puzzles-0",
                "puzzles, clean answers",
                "puzzles",
                0.0,
                also=("generalised_ce", "last_layer_ce", *CLEAN),
            ),
            Cell("easy-vqa-40", "easy-VQA (shapes, yes-no), 40 % wrong answers", "easy-vqa", 0.4, arms=ALL),
            Cell(
                "puzzles-40-few-updates",
                "puzzles, 40 % wrong, 100 updates",
                "puzzles",
                0.4,
                updates=100,
                seeds=3,
                also=FEW_UPDATES,
            ),
            Cell(
                "easy-vqa-40-few-updates",
                "easy-VQA (shapes, yes-no), 40 % wrong, 75 updates",
                "easy-vqa",
                0.4,
                updates=75,
                seeds=3,
                also=FEW_UPDATES,
            ),
            Cell("puzzles-40-many-updates", "puzzles, 40 % wrong, 900 updates", "puzzles", 0.4, updates=900, seeds=3),
            Cell("puzzles-40-few-samples", "puzzles, 40 % wrong, 300 samples", "puzzles", 0.4, samples=300, seeds=3),
            Cell("puzzles-40-many-samples", "puzzles, 40 % wrong, 4,000 samples", "puzzles", 0.4, 4000, seeds=3),
            Cell("puzzles-20", "puzzles, 20 % wrong answers", "puzzles", 0.2, seeds=3),
            Cell("puzzles-60", "puzzles, 60 % wrong answers", "puzzles", 0.6, seeds=3),
            Cell("easy-vqa-0", "easy-VQA (shapes, yes-no), clean answers", "easy-vqa", 0.0, also=CLEAN),
            Cell(
                "puzzles-deep-40",
                "deep puzzles, 40 % wrong answers",
                "puzzles-deep",
                0.4,
                seeds=8,
                variant_seeds=8,  # three had hinted that the matching matters: five fresh ones test it
                arms=MATCHINGS,
            ),
        ),
        learning_rates=(1.5e-3, 3e-3, 6e-3),
    ),
    "real": Scale(
        cells=(
            Cell("real-40", "SmolLM2 and pictures, 40 % wrong", "real", 0.4, 1200, 150, 600, seeds=3, arms=MATCHINGS),
            Cell("real-0", "SmolLM2 and pictures, clean answers", "real", 0.0, 1200, 150, 600, seeds=3, arms=MATCHINGS),
        ),
        learning_rates=(3e-4,),
    ),
    "gpu": Scale(
        cells=(
            Cell("puzzles-wide-40", "puzzles, wider and deeper, 40 % wrong answers", "puzzles-wide", 0.4, seeds=8),
            Cell("puzzles-wide-0", "puzzles, wider and deeper, clean answers", "puzzles-wide", 0.0, seeds=8),
        ),
        learning_rates=(7.5e-4, 1.5e-3, 3e-3),
        device="cuda",
    ),
    "smoke": Scale(
        cells=(Cell("smoke", "four updates: that everything runs", "puzzles", 0.4, 64, 4, 16, seeds=1, stage_1=2),),
        learning_rates=(3e-3,),
    ),
}
