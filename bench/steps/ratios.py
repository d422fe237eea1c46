"""Calls that bench.steps times: each step of the project and the plain work it is compared with, on one loaded batch.

The steps are the project's own, including private functions: a copy would measure the copy. All run in the project's
Engine, on one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.shards import ShardFolder
from pipeline.cache.view import CacheView
from pipeline.cache.writer import CacheFolder
from pipeline.loss.chunks import rows_per_chunk
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime.data.batches import ChatDataset, LoadedBatch, SampleIndex, derived_seed
from pipeline.runtime.data.loader import load
from pipeline.runtime.engine import Engine, dtype_of
from pipeline.runtime.folder import done
from pipeline.runtime.loop import Job, MicroStep, StepOutput
from pipeline.runtime.ranks import Ranks
from pipeline.signal import HiddenSignal, Signal, Unembedding
from pipeline.steps import interact, reinforce, verbalize
from pipeline.steps.cache import step as cache
from pipeline.steps.cache import writing
from pipeline.steps.cache.teacher_pass import TeacherPass
from pipeline.steps.verbalize import ROLES
from pipeline.vlm.assemble import encoders, load_untrained, student_with_verbalizers
from pipeline.vlm.backbone import run_backbone
from pipeline.vlm.cohost import CoHost

TimedCalls = dict[str, Callable[[], object]]
"""{name: call to be timed}."""


class PreparedRun:
    """A run with a complete stage 1, and its first micro-batch."""

    def __init__(self, recipe: Path, ranks: Ranks):
        self.job = Job(load_recipe(recipe).recipe, ranks)
        self.recipe = self.job.recipe
        self.data = ShardFolder(self.recipe.data.train)
        self.view = interact.open_cache_view(self.job, self.data)
        self.vocab = self.view.cache.identity.vocab

    def load(self, dataset: ChatDataset) -> LoadedBatch:
        """Load the first samples of the data as one micro-batch."""
        indices = [SampleIndex(index) for index in range(self.recipe.interact.micro_batch_size)]
        return next(load(dataset, [indices], 0, self.job.ranks.device))


def sizes(prepared: PreparedRun) -> dict[str, Any]:
    """The sizes that determine the ratios, for the results."""
    loaded = prepared.load(ChatDataset(prepared.data, encoders(prepared.recipe, ["student"])))
    verbalizers = done(prepared.recipe.run / "verbalize") or {}
    return {
        "tokens": loaded.batches["student"].inputs["input_ids"].numel(),
        "response_tokens": loaded.tokens(),
        "vocabulary": prepared.vocab,
        "layers": {role: [*verbalizers[role]["layers"], verbalizers[role]["depth"]] for role in ROLES},
    }


def student_steps(prepared: PreparedRun, live: bool = True) -> TimedCalls:
    """Stage 2's steps: "finetune", "interact" from the cache and, if `live`, "interact_live" with a live teacher.

    All use one engine and one optimizer, because they train the same weights.
    """
    recipe, view = prepared.recipe, prepared.view
    student = student_with_verbalizers(
        recipe, prepared.vocab, dtype_of(recipe), recipe.run / "verbalize" / "student.safetensors"
    )
    both = _Student(interact.Interaction(student, None), reinforce.Finetuned(student.backbone, prepared.vocab))
    engine = Engine(both, recipe, recipe.interact, prepared.job.ranks)
    engine.module.train()
    attach = partial(interact._attach, view)
    loaded = prepared.load(ChatDataset(prepared.data, encoders(recipe, ["student"]), attach))

    def interaction(teacher: CacheView | _LiveTeacher) -> Callable[[LoadedBatch, MicroStep], StepOutput]:
        part = _PartOfEngine(engine, "interaction")
        return interact._forward(part, recipe.interact, recipe.seed, teacher, student.layers)  # type: ignore[arg-type]

    finetune = reinforce._forward(_PartOfEngine(engine, "finetuned"), "cross_entropy")  # type: ignore[arg-type]
    runs: TimedCalls = {
        "finetune": partial(_update, engine, finetune, loaded),
        "interact": partial(_update, engine, interaction(view), loaded),
    }
    if live:
        teacher = _LiveTeacher(cache._load_teacher(prepared.job, prepared.vocab), view.layers)
        live_batch = replace(loaded, attached=[loaded.batches["student"]])
        runs["interact_live"] = partial(_update, engine, interaction(teacher), live_batch)
    return runs


def verbalize_steps(prepared: PreparedRun) -> TimedCalls:
    """Stage 1a's step ("verbalize"), and "forwards": the two frozen backbones alone, without heads."""
    recipe = prepared.recipe
    sides = {
        role: load_untrained(
            getattr(recipe, role), recipe, prepared.vocab, dtype_of(recipe), derived_seed(recipe.seed, role)
        )
        for role in ROLES
    }
    apart = [block for side in sides.values() for block in side.verb_ffns.values()]
    engine = Engine(CoHost(sides), recipe, recipe.verbalize, prepared.job.ranks, clipped_apart=apart)
    engine.module.train()
    loaded = prepared.load(ChatDataset(prepared.data, encoders(recipe, ROLES)))
    batches = {role: batch.to(engine.device, engine.dtype) for role, batch in loaded.batches.items()}

    @torch.no_grad()
    def forwards() -> None:
        for role, side in sides.items():
            run_backbone(side.backbone, batches[role].inputs, side.all_layers(), batches[role].positions)

    return {"forwards": forwards, "verbalize": partial(_update, engine, verbalize._forward(engine), loaded)}


def cache_passes(prepared: PreparedRun, scratch: Path) -> TimedCalls:
    """One pass over the data: "forward" of the teacher alone, "forward_and_heads", or "cache", written to `scratch`."""
    identity, codec = prepared.view.cache.identity, prepared.view.cache.codec
    engine = cache._load_teacher(prepared.job, prepared.vocab)
    teacher = engine.module.sides["teacher"]
    dataset = ChatDataset(prepared.data, encoders(prepared.recipe, ["teacher"]))
    teacher_pass = TeacherPass(prepared.job, engine, dataset, identity.layers, identity.vocab)
    shards = [shard.name for shard in prepared.data.shards]
    windows = writing.plan(prepared.data, shards, 0, 1)
    shard_batches = list(writing.shard_batches(windows, teacher_pass.batches([window.indices for window in windows])))
    batches = [part.loaded.batches["teacher"].to(engine.device, engine.dtype) for part in shard_batches]
    scratch.mkdir()
    folder = CacheFolder(scratch, identity, prepared.data)
    folder.save_order(codec.order)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            run_backbone(teacher.backbone, batch.inputs, teacher.all_layers(), batch.positions)

    def forward_and_heads() -> None:
        for batch in batches:
            engine({"teacher": batch}, encode=_logits)

    def write() -> None:
        with writing.WriterThread(folder) as thread:
            for part in shard_batches:
                thread.put(part, teacher_pass.encode_response(part.loaded, codec))
            thread.rest()

    return {"forward": forward, "forward_and_heads": forward_and_heads, "cache": write}


class _Student(nn.Module):
    """One student, which interacts or is finetuned."""

    def __init__(self, interaction: interact.Interaction, finetuned: reinforce.Finetuned):
        super().__init__()
        self.interaction, self.finetuned = interaction, finetuned

    def forward(self, part: str, *args: Any) -> Any:
        return getattr(self, part)(*args)


@dataclass(frozen=True)
class _PartOfEngine:
    """One part of an engine's module, called as if it were the whole module."""

    engine: Engine
    name: str

    def __call__(self, *args: Any) -> Any:
        return self.engine(self.name, *args)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype


@dataclass(frozen=True)
class _LiveTeacher:
    """A teacher in memory with the interface of `CacheView`; the data attached to a batch is the batch itself."""

    engine: Engine
    layers: tuple[int, ...]

    def signal(self, attached: list[Any], device: torch.device, head: Unembedding | None) -> Signal:
        (batch,) = attached
        return self.engine({"teacher": batch.to(device, self.engine.dtype)}, encode=HiddenSignal)


def _update(engine: Engine, forward: Callable[[LoadedBatch, MicroStep], StepOutput], loaded: LoadedBatch) -> None:
    engine.backward(forward(loaded, MicroStep(0, 0)).loss, loaded.tokens())
    engine.step(1e-6)


def _logits(hidden: Tensor, unembedding: Unembedding) -> None:
    """Compute the logits of every distribution once, as any method that uses them must."""
    for rows in hidden.flatten(0, 1).split(rows_per_chunk(unembedding.vocab)):
        unembedding.logits(rows)
