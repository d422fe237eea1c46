"""Memory of each step on one GPU, split into its causes, at the moment when most is in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.recipe.schema import Recipe, StudentTraining, Training
from pipeline.results.plan import activations as acts
from pipeline.results.plan.activations import Peak, Shape
from pipeline.results.plan.micro_batches import samples_at_most
from pipeline.results.plan.models import Parameter, PlannedModel, modules_in_order, vision_of
from pipeline.results.plan.samples import Samples
from pipeline.results.plan.sharding import (
    Zero,
    bucket_bytes,
    copied_bytes,
    gathered_elements,
    gradient_bytes,
    joined_bytes,
    optimizer_bytes,
    update_bytes,
    weight_bytes,
)
from pipeline.results.plan.signals import distribution_bytes, points, stored_head

ID_BYTES = 3 * 8
"""Bytes of a token's id, mask and kind in a batch."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one GPU."""

    weights: int
    """Shards of the weights, or whole weights, and the small ones that each GPU keeps whole."""
    gathered: int
    """Weights that ZeRO-3 has gathered for use, and gathers ahead."""
    gradients: int
    """Accumulated gradients."""
    optimizer: int
    """Master weights and the two moments."""
    buckets: int
    """Gradients on their way to their owners."""
    kept: int
    """Activations that the backward needs."""
    working: int
    """The most that one layer, or the head's loss, needs beside them, and the reduction of its gradients."""
    batch: int
    """The micro-batch itself: ids and pixels."""
    update: int
    """Gradients once more, while the optimizer moves; activations are gone by then."""

    @property
    def total(self) -> int:
        """The larger of two moments: in a backward, and in the optimizer's update."""
        always = self.weights + self.gradients + self.optimizer + self.buckets
        return always + max(self.gathered + self.kept + self.working + self.batch, self.update)


@dataclass(frozen=True)
class Workload:
    """All that a step's memory depends on, besides its parameters."""

    recipe: Recipe
    zero: Zero
    ranks: int
    samples: Samples
    vocab: int
    on_cpu: bool = False
    """Chunks of logits are smaller on a CPU."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16 if self.recipe.precision == "bf16" else torch.float32

    def longest(self, training: Training) -> Shape:
        """A micro-batch of the longest samples."""
        samples, count = self.samples, samples_at_most(training, self.samples.longest)
        image = int(count * samples.longest * samples.image / samples.tokens)
        return Shape(count, samples.longest, count * samples.longest_response, image)


def verbalize_memory(work: Workload, sides: Sequence[PlannedModel]) -> StepMemory:
    """Both models frozen, their verb-FFNs trained. One backward for both, so both keep their activations."""
    recipe, dtype, shape = work.recipe, work.dtype, work.longest(work.recipe.verbalize)
    form, total = recipe.verbalizer.form, Peak(0, 0)
    for side in sides:
        verbalized = acts.verbalized(side, shape, form, trained=True, grad=False, dtype=dtype)
        verbalized = verbalized + Peak(0, joined_bytes(side.verb_ffns(form, trained=True), work.zero))
        head = acts.head_chunk(work.vocab, shape.response, dtype, work.on_cpu)
        states = len(side.layers) * shape.response * side.width * dtype.itemsize
        # The head's loss keeps the gradient at its input, and the backward scales it into another one.
        total = total + acts.frozen_backbone(side, shape, dtype) + verbalized + Peak(states, head + states)
    frozen = [p for side in sides for p in side.parameters()]
    trained = [p for side in sides for p in side.verb_ffns(form, trained=True)]
    return _memory(work, frozen, trained, total, shape, sides)


def cache_memory(work: Workload, teacher: PlannedModel) -> StepMemory:
    """The teacher's forward on one batch of cache.batch_tokens, and the coding of its distributions."""
    recipe, dtype, samples = work.recipe, work.dtype, work.samples
    tokens = max(recipe.cache.batch_tokens, samples.longest)
    whole = int(tokens // samples.tokens)  # samples are not cut between batches
    image = int(max(whole * samples.image, samples.longest * samples.image / samples.tokens))
    response = int(max(whole * samples.response, samples.longest_response))
    count = tokens // samples.longest
    shape = Shape(count, tokens // count, response, image)
    rows, codec = shape.response * (len(teacher.layers) + 1), recipe.cache.codec
    coding = acts.coding_chunk(work.vocab, rows, dtype)
    if codec.name == "sampled":
        coding += acts.drawing(work.vocab, codec.points, rows, work.on_cpu) + rows * codec.points * 4
    form = recipe.verbalizer.form
    peak = acts.frozen_backbone(teacher, shape, dtype)
    peak = peak + acts.verbalized(teacher, shape, form, trained=False, grad=False, dtype=dtype) + Peak(0, coding)
    frozen = [*teacher.parameters(), *teacher.verb_ffns(form, trained=False)]
    return _memory(work, frozen, [], peak, shape, [teacher])


def interact_memory(work: Workload, student: PlannedModel, teacher: PlannedModel, cached_layers: int) -> StepMemory:
    """The student's forward and backward, its frozen verbalizers, and the search over the cached layers.

    teacher: of its distributions only what the cache has, but with `hidden` its head too.
    """
    recipe, training, dtype = work.recipe, work.recipe.interact, work.dtype
    shape = work.longest(training)
    signal = Peak(shape.response * cached_layers * distribution_bytes(recipe, work.vocab, teacher.width), 0)
    form, trains = recipe.verbalizer.form, training.train_verbalizers
    verbalized = acts.verbalized(student, shape, form, trained=trains, grad=True, dtype=dtype)
    tensor = shape.response * student.width * dtype.itemsize
    gradients = (len(student.layers) + 1) * tensor
    head = _head(work, student, shape, recipe.trains(training, "head"))
    if recipe.cache.codec.name == "hidden":
        one_chunk = recipe.trains(training, "head") and shape.response <= student.width
        exact = acts.exact_chunks(
            work.vocab, shape.response, len(student.layers), dtype, work.on_cpu, at_once=one_chunk
        )
        losses = head + Peak(gradients, exact + gradients)
    else:
        searched = max(1, cached_layers - len(student.layers))
        # For each target layer: log q at all candidates' points, and the state that its second pass needs.
        candidates = len(student.layers) * (shape.response * searched * points(recipe, work.vocab) * 4 + tensor)
        losses = head + Peak(gradients, candidates + gradients)
    peak = signal + _student(work, student, training, shape) + verbalized + losses
    passed = [*student.parameters(), *stored_head(recipe, teacher, student, work.vocab)]
    return _memory(work, [], [*passed, *student.verb_ffns(form, trains)], peak, shape, [student])


def reinforce_memory(work: Workload, student: PlannedModel) -> StepMemory:
    """The student's forward and backward, and its head's loss."""
    training = work.recipe.reinforce
    shape = work.longest(training)
    head = _head(work, student, shape, work.recipe.trains(training, "head"))
    peak = _student(work, student, training, shape) + head
    return _memory(work, [], student.parameters(), peak, shape, [student])


def _student(work: Workload, student: PlannedModel, training: StudentTraining, shape: Shape) -> Peak:
    vision = work.recipe.trains(training, "vision")
    peak = acts.trained_backbone(student, shape, work.dtype, work.recipe.gradient_checkpointing, vision)
    return Peak(peak.kept, peak.working + joined_bytes(student.parameters(), work.zero))


def _head(work: Workload, student: PlannedModel, shape: Shape, trained: bool) -> Peak:
    """The last layer's loss. A trained head's gradient is made in the forward, and scaled in the backward."""
    width, size = student.width, work.dtype.itemsize
    chunk = acts.head_chunk(work.vocab, shape.response, work.dtype, work.on_cpu)
    if not trained:
        return Peak(0, chunk)
    kept = acts.head_gradient(work.vocab, student.rows, width, shape.response, work.dtype)
    gradient = student.rows * width
    return Peak(kept, max(chunk, gradient * size + copied_bytes(gradient, work.zero, size)))


def _memory(
    work: Workload,
    frozen: Sequence[Parameter],
    passed: Sequence[Parameter],
    peak: Peak,
    shape: Shape,
    models: Sequence[PlannedModel],
) -> StepMemory:
    """frozen: only a forward uses them. passed: a backward too."""
    zero, ranks, width = work.zero, work.ranks, work.dtype.itemsize
    every = [*frozen, *passed]
    on_gpu = zero.offload_optimizer == "gpu"
    patches = max(vision_of(model).patches_per_token * vision_of(model).patch_numbers for model in models)
    return StepMemory(
        weights=weight_bytes(every, zero, ranks, width),
        gathered=width * _gathered(frozen, passed, zero) if zero.stage == 3 else 0,
        gradients=gradient_bytes(every, zero, ranks) if on_gpu else 0,
        optimizer=optimizer_bytes(every, zero, ranks, width) if on_gpu else 0,
        buckets=bucket_bytes(every, zero),
        kept=peak.beside,
        working=peak.working,
        batch=shape.all_tokens * ID_BYTES + shape.image * patches * width,
        update=update_bytes(every, zero, ranks),
    )


def _gathered(frozen: Sequence[Parameter], passed: Sequence[Parameter], zero: Zero) -> int:
    def large(parameters: Sequence[Parameter]) -> list[int]:
        return list(modules_in_order([p for p in parameters if p.elements >= zero.persistent]))

    forward = list(enumerate(large(frozen)))
    both = list(enumerate(large(passed), len(forward)))
    return gathered_elements([*forward, *both, *reversed(both)], zero)
