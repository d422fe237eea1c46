"""Stage 1a: teacher and student, both frozen, sit in one engine; each target layer of each learns a verbalizer.

With cache_from the student sits there alone: another run has the teacher's verbalizers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from data_prep.shards import ShardFolder
from pipeline.cache.hashes import HashStore
from pipeline.recipe.checks import number_of_steps
from pipeline.runtime.checkpoint.checkpoints import remove_checkpoints
from pipeline.runtime.data.batches import MB, Align, ChatDataset, LoadedBatch, derived_seed, map_unique
from pipeline.runtime.engine import Engine, dtype_of, sharded_loading
from pipeline.runtime.folder import mark_done
from pipeline.runtime.loop import Job, MicroStep, StepOutput, train
from pipeline.runtime.ranks import on_first_rank
from pipeline.steps.teacher_cache import check_for_another_student
from pipeline.vlm.assemble import encoders, load_untrained, mapped_vocabulary, shared_vocabulary
from pipeline.vlm.cohost import CoHost
from pipeline.vlm.mapped_pair import MappedPair, align_both, align_student
from pipeline.vlm.probe import check_parts
from pipeline.vlm.processing import ChatEncoder
from pipeline.vlm.verb_ffns import save_verb_ffns
from pipeline.vlm.verbalizer import VerbalizedVLM

NAME = "verbalize"
ROLES = ("teacher", "student")


def run(job: Job) -> Engine | None:
    """Train the verbalizers; returns the engine that holds the models, or None if the step was already done."""
    recipe, folder = job.recipe, job.recipe.run / NAME
    if job.has_done(NAME):
        job.say(f"{NAME}: already done, in {folder}")
        return None
    data, both = ShardFolder(recipe.data.train), encoders(recipe, ROLES)
    ids, align = _vocabulary(job, data, both)
    chat_encoders = {role: both[role] for role in ROLES if role == "student" or recipe.cache_from is None}
    with sharded_loading(recipe, recipe.verbalize) as add_to:
        sides = {
            role: load_untrained(
                getattr(recipe, role), recipe, ids[role], dtype_of(recipe), derived_seed(recipe.seed, role), add_to
            )
            for role in chat_encoders
        }
    # No verb-FFN has a part in another's loss: one norm for all would let the worst hold up the rest.
    apart = [block for side in sides.values() for block in side.verb_ffns.values()]
    engine = Engine(CoHost(sides), recipe, recipe.verbalize, job.ranks, clipped_apart=apart)
    for role, side in sides.items():
        check_parts(side.backbone, chat_encoders[role], side.layers, engine.device, engine.dtype)
    heads = {role: ids[role] for role in chat_encoders}
    samples = ShardFolder(recipe.samples_of(NAME))
    dataset = ChatDataset(samples, chat_encoders, memory=recipe.data.memory_mb * MB, align=align, ids=heads)
    total = number_of_steps(recipe.verbalize, len(dataset))
    forward = _forward(engine)
    averages = train(job, NAME, recipe.verbalize, total, engine, dataset, forward)
    vocab = ids if align is not None else ids["student"]
    _save(job, engine, folder, {"updates": total, "vocab": vocab, "losses": averages, **_describe(sides)})
    return engine


def _vocabulary(job: Job, data: ShardFolder, made: dict[str, ChatEncoder]) -> tuple[dict[str, int], Align | None]:
    """(each model's number of ids; how their tokens are aligned, None where they are the same), and say what is not
    shared. With cache_from the other run's cache must fit. All ranks must call."""
    recipe, borrowed = job.recipe, job.recipe.cache_from is not None
    if recipe.vocabulary == "shared":
        common = shared_vocabulary(recipe, made)
        _say(job, common.describe())
        size = check_for_another_student(job, NAME, data, common.size) if borrowed else common.size
        return dict.fromkeys(ROLES, size), None
    pair = MappedPair(made["teacher"], made["student"])
    mapped = mapped_vocabulary(recipe, pair)
    _say(job, mapped.describe())
    if borrowed:
        check_for_another_student(job, NAME, data, mapped.bucket, mapped)
    ids = {"teacher": len(mapped.class_of), "student": mapped.bucket}
    return ids, partial(align_student if borrowed else align_both, pair)


def _say(job: Job, note: str | None) -> None:
    if note is not None:
        job.say(f"{NAME}: {note}")


def _forward(engine: Engine):
    def forward(loaded: LoadedBatch, _micro_step: MicroStep) -> StepOutput:
        batches = map_unique(lambda batch: batch.to(engine.device, engine.dtype), loaded.batches)
        losses = engine(batches)
        sums: dict[str, Tensor] = {}
        for role, side in engine.module.sides.items():
            layers = side.all_layers()
            sums |= {f"{role}/{layer}": value for layer, value in zip(layers, losses[role], strict=True)}
        # Without the last entry: that is the model's own loss, for comparison, and nothing of it trains.
        return StepOutput(sum(loss[:-1].sum() for loss in losses.values()), sums)

    return forward


def _save(job: Job, engine: Engine, folder: Path, summary: dict[str, object]) -> None:
    weights = {role: engine.gathered(side.verb_ffns) for role, side in engine.module.sides.items()}

    def write() -> None:
        files = {role: folder / f"{role}.safetensors" for role in weights}
        for role in weights:
            save_verb_ffns(weights[role], files[role])
        hashes = HashStore(job.recipe.run).digests(list(files.values()))  # for the cache's identity too
        mark_done(folder, {**summary, "sha256": {role: hashes[file] for role, file in files.items()}})
        remove_checkpoints(folder)

    on_first_rank(job.ranks, f"{NAME}: writing the verbalizers to {folder}", write)


def _describe(sides: dict[str, VerbalizedVLM]) -> dict[str, object]:
    return {role: {"layers": list(side.layers), "depth": side.depth} for role, side in sides.items()}
