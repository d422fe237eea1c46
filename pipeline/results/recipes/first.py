"""A first recipe for two models: each value chosen by a rule, with the rule's reason beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.shards import MANIFEST, ShardFolder
from data_prep.storage import is_file
from pipeline.errors import RecipeError
from pipeline.recipe.checks import check_recipe, number_of_layers
from pipeline.recipe.schema import STEPS, Recipe
from pipeline.results.plan.knobs import applied, fits, remedy
from pipeline.results.plan.machine import GIB, Machine
from pipeline.results.plan.models import planned_model, vision_of
from pipeline.results.plan.run import Planned, StepPlan
from pipeline.results.plan.samples import Given, Samples, describe_samples
from pipeline.results.plan.speed import largest_micro_batch, token_budget
from pipeline.results.recipes.target_layers import EVERY, Targets, choose_targets
from pipeline.results.recipes.text import written
from pipeline.vlm.assemble import encoders, shared_vocabulary
from pipeline.vlm.config import read_config

ASSUMED = Given(samples=500_000, tokens=900.0, response=150.0, image=650.0)
"""Of samples that cannot be measured: the lengths with which docs/scale.md plans the paper's pair."""
MANY_IMAGE_TOKENS = 2600
"""Mean image tokens of a sample from which on targets are sparse: 4 times those of ASSUMED (paper, appendix D)."""
PAPER_BATCH = {"verbalize": 256, "interact": 512, "reinforce": 512}
"""Global batch sizes of the paper's largest pair (section 4)."""
LEAST_UPDATES = 50
"""An epoch of few samples is cut into at least as many updates."""


@dataclass
class Draft:
    """A recipe in the making: flat keys in the order of the file."""

    values: dict[str, Any]
    reasons: dict[str, str]

    def set(self, key: str, value: Any, reason: str) -> None:
        """A value and why."""
        self.values[key], self.reasons[key] = value, reason

    def recipe(self) -> Recipe:
        """As a recipe."""
        nested: dict[str, Any] = {}
        for key, value in self.values.items():
            *sections, last = key.split(".")
            inner = nested
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        return Recipe.model_validate(nested)


def first_recipe(
    teacher: Path, student: Path, data: Path | None = None, machine: Machine | None = None, name: str | None = None
) -> str:
    """The recipe as YAML, each choice with its reason.

    data: its training data; what was held out of it is beside it, where data_prep made it. machine: whose memory
    decides the micro-batches. name: of the run. Raises RecipeError where a model's config.json is missing, the
    tokenizers differ, nothing makes a step fit, or with `data` the recipe fails its checks.
    """
    draft = _begin(teacher, student, data, name or f"{teacher.name}_to_{student.name}")
    measured = data is not None and _has_tokenizer(student)
    samples = _samples(draft, data is not None, measured)
    _choose_layers(draft, samples, measured)
    _choose_batches(draft, samples, data is not None, machine)
    if machine is not None:
        _fit(draft, samples, machine)
    recipe = draft.recipe()
    note = shared_vocabulary(recipe, encoders(recipe, ("teacher", "student"))).describe() if _both(recipe) else None
    if data is not None:
        check_recipe(recipe, STEPS, machine.gpus if machine else 1)
    return written(draft.values, draft.reasons, _head(teacher, student, samples, measured, note))


def _begin(teacher: Path, student: Path, data: Path | None, name: str) -> Draft:
    depths = {role: number_of_layers(folder) for role, folder in (("teacher", teacher), ("student", student))}
    draft = Draft({}, {})
    draft.set("run", f"runs/{name}", "its folder")
    dtype = str(getattr(read_config(student), "dtype", None) or "torch.bfloat16").removeprefix("torch.")
    precision = "fp32" if dtype == "float32" else "bf16"
    draft.set("precision", precision, f"the student's config.json says {dtype}")
    draft.set("deepspeed", "ds_configs/zero3.json", "the weights of both models over all GPUs")
    draft.set("gradient_checkpointing", True, "paper, section 4: less memory, more time")
    where = "--data" if data else "to be made: python -m data_prep shard --help"
    draft.set("data.train", str(data or "data/train"), where)
    if data is not None and (held_out := data.parent / "held_out") != data and is_file(held_out / MANIFEST):
        draft.set("data.held_out", str(held_out), "beside data.train: evaluate and trace --changed use it")
    draft.set("data.max_length", 4096, "the default: longer chats are cut")
    for role, folder in (("teacher", teacher), ("student", student)):
        draft.set(f"{role}.path", str(folder), f"{depths[role]} layers")
    for step in PAPER_BATCH:
        draft.set(f"{step}.epochs", 1, "the paper states none")
        draft.set(f"{step}.batch_size", PAPER_BATCH[step], "paper, section 4")
        if data is None or ShardFolder(data).has_sizes:
            fits_in = "data.max_length: safe; --gpus N --gpu-memory GIB says how many more fit"
            draft.set(f"{step}.micro_batch_tokens", draft.values["data.max_length"], fits_in)
        else:
            reason = "safe; data.train does not say how large samples are, so there are no micro_batch_tokens"
            draft.set(f"{step}.micro_batch_size", 1, reason)
        draft.set(f"{step}.checkpoint_minutes", 30, "what a job that dies may lose")
    draft.set("interact.lora_rank", 64, "paper, section 4 (alpha 64 is the default): less memory; 0 trains all weights")
    return draft


def _samples(draft: Draft, known: bool, measured: bool) -> Samples:
    recipe = draft.recipe()
    vision = vision_of(planned_model("student", recipe.student))
    given = Given() if measured else replace(ASSUMED, samples=None) if known else ASSUMED
    return describe_samples(recipe, given, vision.patches_per_token, vision.patch_numbers)


def _choose_layers(draft: Draft, samples: Samples, measured: bool) -> None:
    teacher, student = (number_of_layers(Path(draft.values[f"{role}.path"])) for role in ("teacher", "student"))
    sparse = measured and samples.image >= MANY_IMAGE_TOKENS
    targets = choose_targets(teacher, student, sparse)
    draft.set("teacher.layers", list(targets.teacher), _layers_reason("teacher", targets, sparse, samples))
    draft.set("student.layers", list(targets.student), _layers_reason("student", targets, sparse, samples))


def _layers_reason(role: str, targets: Targets, sparse: bool, samples: Samples) -> str:
    every = targets.teacher_every if role == "teacher" else targets.student_every
    if sparse:
        return f"every {every}: {samples.image:,.0f} image tokens a sample (paper, appendix D, has sparse targets then)"
    if every == EVERY:
        return "every 4th from 2 (paper, section 4)"
    if role == "teacher":
        return f"every {every}: with every 4th it would not have more targets than the student's {len(targets.student)}"
    return f"every {every}: with every 4th there is none, or the teacher cannot have more"


def _choose_batches(draft: Draft, samples: Samples, known: bool, machine: Machine | None) -> None:
    """The paper's batch sizes, smaller for little data, and multiples of the number of GPUs."""
    ranks = machine.gpus if machine else 1
    for step, paper in PAPER_BATCH.items():
        size, reason = paper, "paper, section 4"
        if known and samples.count < LEAST_UPDATES * paper:
            size = max(1, samples.count // LEAST_UPDATES)
            reason = f"{samples.count:,} samples in at least {LEAST_UPDATES} updates; the paper's {paper} is for 2.9M"
        if size % ranks:
            size = max(1, round(size / ranks)) * ranks
            reason += f", as a multiple of {ranks} GPUs"
        draft.set(f"{step}.batch_size", size, reason)


def _fit(draft: Draft, samples: Samples, machine: Machine) -> None:
    """What the memory model of `plan` asks for, step by step; then the largest micro-batches."""
    # GPUs without a shard idle while the cache is made, which `plan` says: no reason to refuse a recipe.
    planned = Planned(draft.recipe(), replace(samples, shards=max(samples.shards, machine.gpus)))
    for step in planned.steps:
        if not fits(planned.plan(step, machine), machine):
            changes = remedy(planned, step, machine)
            if changes is None:
                raise RecipeError(
                    f"{step} does not fit {machine.gpus} GPUs of {machine.gpu_memory:g} GiB, whatever is changed; give "
                    "more --gpus"
                )
            for change in changes:
                draft.set(change.key, _plain(change.value), f"without it {step} does not fit (plan)")
            planned = planned.with_recipe(applied(planned.recipe, changes))
    for step in PAPER_BATCH:
        by_tokens = getattr(planned.recipe, step).micro_batch_tokens is not None
        larger = (token_budget if by_tokens else largest_micro_batch)(planned, step, machine)
        if larger is not None:
            planned = planned.with_recipe(applied(planned.recipe, [larger]))
        key = f"{step}.{'micro_batch_tokens' if by_tokens else 'micro_batch_size'}"
        value = getattr(getattr(planned.recipe, step), key.partition(".")[2])
        draft.set(key, value, _micro_batch_reason(planned.plan(step, machine), machine))


def _micro_batch_reason(plan: StepPlan, machine: Machine) -> str:
    memory = f"{plan.memory.total / GIB:.0f} of {machine.usable / GIB:.0f} GiB"
    time = f"{plan.time.micro_steps:.3g} micro-steps an update, {plan.time.real_share:.0%} real tokens"
    return f"{memory}, {time}, by plan"


def _plain(value: Any) -> Any:
    return f"ds_configs/{value.name}" if isinstance(value, Path) else value


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def _both(recipe: Recipe) -> bool:
    return _has_tokenizer(recipe.teacher.path) and _has_tokenizer(recipe.student.path)


def _head(teacher: Path, student: Path, samples: Samples, measured: bool, note: str | None) -> Sequence[str]:
    lengths = (
        f"{samples.tokens:,.0f} tokens a sample, {samples.image:,.0f} of images, {samples.response:,.0f} of responses"
    )
    known = "measured on data.train" if measured else "assumed: no --data, or no tokenizer of the student"
    compared = note or "one common vocabulary"
    return (
        f"A first recipe: {teacher.name} teaches {student.name}. Each value has its reason; all else is the default.",
        f"Lengths: {lengths} ({known}).",
        f"Tokenizers: {compared if _has_tokenizer(teacher) and _has_tokenizer(student) else 'not compared, not here'}.",
    )
