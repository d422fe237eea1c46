"""The arms: ways to train the student. Each is the demo's recipe with a few values changed, by the real commands."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

MAIN, MATCHINGS, ALL = "main", "matchings", "all"
"""Which arms a cell runs: the main ones, these and those that match other layers, or all."""


@dataclass(frozen=True)
class Arm:
    """One way to train the student, in multiples of a cell's number of updates."""

    name: str
    group: str
    """Heading of the table under which it stands."""
    text: str
    """What it does, for the table."""
    interact: float = 0.0
    """Updates of interaction."""
    reinforce: float = 0.0
    """Updates of finetuning, after them."""
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    """Other values of the recipe, for stage 2."""
    stage_1: Mapping[str, object] = field(default_factory=dict, hash=False)
    """Values of the recipe for stage 1. Arms with equal ones share its verbalizers and cache."""
    verbalizers_wrong: float | None = None
    """Share of wrong answers in the samples that its verbalizers learn from; None: those of the cell."""
    answers: bool = False
    """Whether finetuning is on the teacher's answers."""
    factors: tuple[float, ...] = (1.0,)
    """Multiples of all updates that are tried in the sweep: a way to stop early, with a whole schedule each time."""
    program: str = "launch/train.py"
    """The program of stage 2, as arguments of python: a file, or -m and a module."""
    rate_of: str | None = None
    """The arm whose learning rate it takes; None: it has a sweep of its own."""
    main: bool = False
    """Whether it runs in every cell."""

    def seeds(self, of_cell: int, of_variants: int) -> range:
        """The seeds that it runs on in a cell: all of them, but of a variant at most `of_variants`."""
        return range(min(of_cell, of_variants) if self.group == VARIANTS else of_cell)

    @property
    def stage_1_name(self) -> str:
        """Name of the folder of its stage 1: that of the first arm with the same settings, unless it has none."""
        ours = self.stage_1, self.verbalizers_wrong
        first = next((arm for arm in ARMS if (arm.stage_1, arm.verbalizers_wrong) == ours), self)
        return "stage-1" if ours == ({}, None) else f"stage-1-{first.name}"

    @property
    def uses_stage_1(self) -> bool:
        """Whether it needs verbalizers or a cache."""
        return self.interact > 0

    @property
    def matches_otherwise(self) -> bool:
        """Whether it differs from `interaction` by which layers are matched, and by nothing else."""
        same = self.group == VARIANTS and not self.stage_1 and self.program == Arm.program
        return same and self.options.keys() <= {"interact.matching", "interact.temperature"}

    def settings(self, updates: int, learning_rate: float, factor: float) -> dict[str, object]:
        """The recipe's values for stage 2 that make a run of this arm."""
        rates = {
            f"{step}.{key}": value
            for step in ("interact", "reinforce")
            for key, value in (("learning_rate", learning_rate), ("final_learning_rate", learning_rate / 100))
        }
        steps = {
            "interact.steps": round(self.interact * factor * updates),
            "reinforce.steps": round(self.reinforce * factor * updates),
        }
        return {**self.stage_1, **rates, **steps, **self.options}


NO_TEACHER, ANSWERS, LAST, LAYERS, VARIANTS = (
    "without a teacher",
    "the teacher's answers",
    "the teacher's last layer",
    "the teacher's layers",
    "variants of interaction to the end",
)

_LAST_ONLY = {"interact.matching": "last_only"}
_SUPERVISED = {
    **_LAST_ONLY,
    "interact.last_weight": 0,
    "interact.cross_entropy_weight": 1,
    "interact.deep_supervision_weight": 1,
}


_UNIFORM = {"interact.matching": "uniform"}
_STATES = {"verbalize.steps": 0, "cache.codec": {"name": "hidden", "dtype": "float32"}}
"""A cache of the teacher's normed states: verbalizers that were not trained change nothing."""


def _variant(
    name: str,
    text: str,
    options: Mapping[str, object],
    stage_1: Mapping[str, object] | None = None,
    program: str = Arm.program,
) -> Arm:
    return Arm(
        name, VARIANTS, text, interact=1, options=options, stage_1=stage_1 or {}, program=program, rate_of="interaction"
    )


ARMS = (
    Arm("finetune", NO_TEACHER, "finetuning on the given answers", reinforce=1, main=True),
    Arm("finetune_early", NO_TEACHER, "stopped early, when the sweep says", reinforce=1, factors=(0.25, 0.5)),
    Arm(
        "finetune_equal_time", NO_TEACHER, "3.5 times the updates: the time of stage 1 and interaction",
        reinforce=3.5, rate_of="finetune",
    ),
    Arm(
        "label_smoothing", NO_TEACHER, "finetuning with label smoothing of .2",
        reinforce=1, options={"reinforce.label_smoothing": 0.2}, rate_of="finetune",
    ),
    Arm(
        "generalised_ce", NO_TEACHER, "finetuning with generalised cross-entropy, q = .7",
        reinforce=1, options={"reinforce.loss_power": 0.7},
    ),
    Arm(
        "deep_supervision", NO_TEACHER, "cross-entropy of the student's own verbalizers too, to the end",
        interact=1, options=_SUPERVISED, main=True,
    ),
    Arm(
        "deep_supervision_finetune", NO_TEACHER, "the same, then finetuning",
        interact=0.5, reinforce=0.5, options=_SUPERVISED, rate_of="deep_supervision",
    ),
    Arm("teacher_answers", ANSWERS, "finetuning on the teacher's answers", reinforce=1, answers=True, main=True),
    Arm(
        "teacher_answers_equal_time", ANSWERS, "2.75 times the updates: the time of stage 1 and interaction",
        reinforce=2.75, answers=True, rate_of="teacher_answers",
    ),
    Arm("last_layer", LAST, "KL of the last layer, to the end", interact=1, options=_LAST_ONLY, main=True),
    Arm(
        "last_layer_finetune", LAST, "the same, then finetuning",
        interact=0.5, reinforce=0.5, options=_LAST_ONLY, rate_of="last_layer",
    ),
    Arm(
        "last_layer_ce", LAST, "with cross-entropy beside it, to the end",
        interact=1, options={**_LAST_ONLY, "interact.cross_entropy_weight": 1},
    ),
    Arm("paper", LAYERS, "the paper's order: interaction, then finetuning", interact=0.5, reinforce=0.5, main=True),
    Arm("interaction", LAYERS, "interaction to the end", interact=1, main=True),
    Arm(
        "interaction_ce", LAYERS, "with cross-entropy beside it, to the end",
        interact=1, options={"interact.cross_entropy_weight": 1}, main=True,
    ),
    Arm(
        "wrong_verbalizers", LAYERS, "interaction to the end, verbalizers of 40 % wrong answers",
        interact=1, verbalizers_wrong=0.4,
    ),
    Arm(
        "heavier_last", LAYERS, "interaction to the end, the last layer's KL weighs 4",
        interact=1, options={"interact.last_weight": 4},
    ),
    Arm(
        "short_finetune", LAYERS, "nine tenths of interaction, then finetuning",
        interact=0.9, reinforce=0.1, rate_of="paper",
    ),
    Arm(
        "interaction_answers", LAYERS, "interaction, then finetuning on the teacher's answers",
        interact=0.5, reinforce=0.5, answers=True, rate_of="paper",
    ),
    _variant("cold", "draw at a fixed temperature of .05 nat", {"interact.temperature": 0.05}),
    _variant("random", "drawn without looking at the KL", {"interact.matching": "random"}),
    _variant("uniform", "fixed, spread evenly", _UNIFORM),
    _variant("argmin", "least KL, without order", {"interact.matching": "argmin"}),
    _variant("ordered_argmin", "least total KL that keeps the order", {"interact.matching": "ordered_argmin"}),
    _variant("earliest", "the shallowest teacher layers", {"interact.matching": "earliest"}),
    _variant("latest", "the deepest teacher layers", {"interact.matching": "latest"}),
    _variant("without_last", "matched layers only", {"interact.last_weight": 0}),
    _variant("longer_stage_1", "verbalizers trained for three times the updates", {}, {"verbalize.steps": 360}),
    _variant("logit_lens", "no trained verbalizers", {}, {"verbalize.steps": 0}),
    _variant("sparser_layers", "teacher 2, 4, 6; student 2", {}, {"teacher.layers": [2, 4, 6], "student.layers": [2]}),
    _variant("topk_cache", "a cache of the 16 likeliest ids", {}, {"cache.codec": {"name": "topk", "k": 16}}),
    _variant("hidden_cache", "an exact cache", {}, {"cache.codec": {"name": "hidden", "dtype": "float32"}}),
    _variant(
        "features_l2", "L2 of hidden states behind a learned map (the paper's Table 4d); fixed, spread evenly",
        _UNIFORM, _STATES, "-m bench.ladder.features_l2",
    ),
    _variant(
        "distil_lens", "Jensen-Shannon of logit lenses (after DistillLens); fixed, spread evenly",
        _UNIFORM, _STATES, "-m bench.ladder.distil_lens",
    ),
)  # fmt: skip

BY_NAME = {arm.name: arm for arm in ARMS}


def arms_of(which: str, also: Collection[str] = ()) -> list[Arm]:
    """The arms of a cell: MAIN, MATCHINGS or ALL; and the named ones, as those must be that bring data of their own."""

    def runs(arm: Arm) -> bool:
        of_all = which == ALL and arm.verbalizers_wrong is None
        return of_all or arm.main or (which == MATCHINGS and arm.matches_otherwise) or arm.name in also

    return [arm for arm in ARMS if runs(arm)]
