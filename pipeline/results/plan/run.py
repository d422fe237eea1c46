"""From a recipe, its data and machines to a plan: every step's memory, traffic, operations and hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.recipe.schema import STEPS, Recipe
from pipeline.results.plan import memory, operations, schedule
from pipeline.results.plan.cache_size import CacheSize, cache_size
from pipeline.results.plan.disk import DiskUse, disk_use
from pipeline.results.plan.host import HostMemory, host_memory
from pipeline.results.plan.machine import Machine
from pipeline.results.plan.memory import StepMemory, Workload
from pipeline.results.plan.micro_batches import deepspeed_of
from pipeline.results.plan.models import (
    Parameter,
    PlannedModel,
    planned_model,
    planned_student,
    vocabulary_size,
)
from pipeline.results.plan.samples import Samples
from pipeline.results.plan.schedule import StepTime
from pipeline.results.plan.sharding import Zero, read_zero
from pipeline.results.plan.signals import stored_head
from pipeline.results.plan.traffic import Traffic, traffic


@dataclass(frozen=True)
class StepPlan:
    """One step on one machine."""

    name: str
    memory: StepMemory
    host: HostMemory
    disk: DiskUse
    time: StepTime
    problem: str
    """Why the step cannot run whatever the memory is; empty where it can."""


class Planned:
    """A recipe with its models built on the meta device; plans for any machine come from it."""

    def __init__(
        self,
        recipe: Recipe,
        samples: Samples,
        bytes_per_token_layer: float | None = None,
        own: Mapping[str, Samples] | None = None,
    ):
        """own: of the steps that train on others than data.train. Raises RecipeError where a config.json is missing."""
        self.recipe, self.samples, self.own = recipe, samples, own or {}
        self._bytes_per_token_layer = bytes_per_token_layer
        self.teacher = planned_model("teacher", recipe.teacher)
        self.student = planned_model("student", recipe.student)
        self.vocab = vocabulary_size(recipe, self.teacher, self.student)

    def with_recipe(self, recipe: Recipe) -> Planned:
        """The same data under another recipe, which may cut it shorter."""
        limit = recipe.data.max_length
        own = {step: samples.cut(limit) for step, samples in self.own.items()}
        return Planned(recipe, self.samples.cut(limit), self._bytes_per_token_layer, own)

    def samples_of(self, step: str) -> Samples:
        """What a step trains on."""
        return self.own.get(step, self.samples)

    @property
    def steps(self) -> list[str]:
        """The steps that the recipe runs: without interaction no stage 1, as in launch.submit."""
        skipped = {step for step in STEPS if step != "cache" and getattr(self.recipe, step).steps == 0}
        if "interact" in skipped:
            skipped |= {"verbalize", "cache"}
        skipped |= self.recipe.left_to_another_run().keys()
        return [step for step in STEPS if step not in skipped]

    @property
    def verbalized(self) -> list[PlannedModel]:
        """The models whose verbalizers this run trains."""
        return [self.student] if self.recipe.cache_from is not None else [self.teacher, self.student]

    @property
    def cached_layers(self) -> int:
        """J, the target layers of the teacher that stage 2 reads, without the last one."""
        return len(self.recipe.interact.teacher_layers or self.teacher.layers)

    def cache(self) -> CacheSize:
        """The complete cache on disk."""
        layers = len(self.teacher.layers) + 1
        return cache_size(
            self.recipe.cache.codec,
            self.samples,
            layers,
            self.teacher.width,
            self.vocab,
            self._bytes_per_token_layer,
        )

    def plan(self, step: str, machine: Machine) -> StepPlan:
        """One step's plan."""
        samples = self.samples_of(step)
        work = Workload(self.recipe, self.zero(step), machine.gpus, samples, self.vocab)
        frozen, passed = self.parameters(step)
        per_node = min(machine.gpus, machine.gpus_per_node)
        return StepPlan(
            name=step,
            memory=self.memory(step, work),
            host=host_memory(self.recipe, step, [*frozen, *passed], work.zero, machine.gpus, per_node, samples),
            disk=disk_use(self.recipe, step, passed, self.saved(step), round(self.cache().bytes)),
            time=self._time(step, machine, traffic(frozen, passed, work.zero, machine.gpus, work.dtype.itemsize)),
            problem=self._problem(step, machine.gpus),
        )

    def zero(self, step: str) -> Zero:
        """The DeepSpeed config of a step."""
        return read_zero(deepspeed_of(self.recipe, step)[1])

    def memory(self, step: str, work: Workload) -> StepMemory:
        """One GPU's memory in a step."""
        if step == "verbalize":
            return memory.verbalize_memory(work, self.verbalized)
        if step == "cache":
            return memory.cache_memory(work, self.teacher)
        if step == "interact":
            return memory.interact_memory(work, self._trained[step], self.teacher, self.cached_layers + 1)
        return memory.reinforce_memory(work, self._trained[step])

    def parameters(self, step: str) -> tuple[Sequence[Parameter], Sequence[Parameter]]:
        """(those that only a forward uses, those that a backward uses too)."""
        form = self.recipe.verbalizer.form
        if step == "verbalize":
            return (
                [p for side in self.verbalized for p in side.parameters()],
                [p for side in self.verbalized for p in side.verb_ffns(form, trained=True)],
            )
        if step == "cache":
            return [*self.teacher.parameters(), *self.teacher.verb_ffns(form, trained=False)], []
        student = self._trained[step]
        if step != "interact":
            return [], student.parameters()
        head = stored_head(self.recipe, self.teacher, student, self.vocab)
        return [], [*student.parameters(), *head, *student.verb_ffns(form, self.recipe.interact.train_verbalizers)]

    def saved(self, step: str) -> Sequence[Parameter]:
        """Those that a step writes at its end: trained verbalizers, and the student with what did not train of it."""
        if step != "interact":
            return self.parameters(step)[1]
        student, form = self._trained[step], self.recipe.verbalizer.form
        return [
            *student.parameters(),
            *(student.verb_ffns(form, True) if self.recipe.interact.train_verbalizers else []),
        ]

    def operations(self, step: str) -> float:
        """Floating-point operations of the mean sample."""
        sample = operations.mean_sample(self.samples_of(step))
        if step == "verbalize":
            return operations.verbalize_operations(self.verbalized, self.vocab, sample)
        if step == "cache":
            return operations.cache_operations(self.teacher, self.recipe, self.vocab, sample)
        if step == "interact":
            return operations.interact_operations(
                self._trained[step], self.teacher, self.cached_layers, self.recipe, self.vocab, sample
            )
        return operations.reinforce_operations(self._trained[step], self.recipe, sample)

    @cached_property
    def _trained(self) -> dict[str, PlannedModel]:
        recipe = self.recipe
        return {step: planned_student(recipe.student, getattr(recipe, step), recipe.train) for step in STEPS[2:]}

    def _time(self, step: str, machine: Machine, moved: Traffic) -> StepTime:
        each = self.operations(step)
        if step == "cache":
            return schedule.cache_time(self.recipe, self.samples, machine, each, moved)
        return schedule.train_time(self.recipe, step, self.samples_of(step), machine, each, moved)

    def _problem(self, step: str, ranks: int) -> str:
        if step == "cache":
            idle = ranks - self.samples.shards
            return f"{idle} of {ranks} GPUs get no shard: make smaller data shards" if idle > 0 else ""
        training = getattr(self.recipe, step)
        together = training.micro_batch_size * ranks
        if training.micro_batch_tokens is not None or training.batch_size % together == 0:
            return ""
        return (
            f"{step}.batch_size: {training.batch_size} is no multiple of {step}.micro_batch_size x GPUs = "
            f"{training.micro_batch_size} x {ranks} = {together}"
        )
