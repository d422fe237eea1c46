"""Stage 1a: teacher and student, both frozen, sit in one engine; each target layer of each learns a verbalizer."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from data_prep.shards import ShardFolder
from pipeline.recipe.checks import number_of_steps
from pipeline.runtime.checkpoint import Checkpoints
from pipeline.runtime.data.batches import MB, ChatDataset, LoadedBatch, derived_seed, map_unique
from pipeline.runtime.engine import Engine, dtype_of, sharded_loading
from pipeline.runtime.folder import mark_done
from pipeline.runtime.loop import Job, MicroStep, StepOutput, train
from pipeline.runtime.ranks import on_first_rank
from pipeline.vlm.assemble import encoders, load_untrained, shared_vocabulary
from pipeline.vlm.cohost import CoHost
from pipeline.vlm.verb_ffns import save_verb_ffns
from pipeline.vlm.verbalizer import VerbalizedVLM

NAME = "verbalize"
ROLES = ("teacher", "student")


def run(job: Job) -> Engine | None:
    """Train both models' verbalizers; returns the engine that holds them, or None if the step was already done."""
    recipe, folder = job.recipe, job.recipe.run / NAME
    if job.has_done(NAME):
        job.say(f"{NAME}: already done, in {folder}")
        return None
    chat_encoders = encoders(recipe, ROLES)
    vocab = shared_vocabulary(recipe, chat_encoders)
    with sharded_loading(recipe, recipe.verbalize) as add_to:
        sides = {
            role: load_untrained(
                getattr(recipe, role), recipe, vocab, dtype_of(recipe), derived_seed(recipe.seed, role), add_to
            )
            for role in ROLES
        }
    # No verb-FFN has a part in another's loss: one norm for all would let the worst hold up the rest.
    apart = [block for side in sides.values() for block in side.verb_ffns.values()]
    engine = Engine(CoHost(sides), recipe, recipe.verbalize, job.ranks, clipped_apart=apart)
    dataset = ChatDataset(ShardFolder(recipe.data.train), chat_encoders, memory=recipe.data.memory_mb * MB)
    total = number_of_steps(recipe.verbalize, len(dataset))
    forward = _forward(engine)
    averages = train(job, NAME, recipe.verbalize, total, engine, dataset, forward)
    _save(job, engine, folder, {"updates": total, "vocab": vocab, "losses": averages, **_describe(sides)})
    return engine


def _forward(engine: Engine):
    def forward(loaded: LoadedBatch, _micro_step: MicroStep) -> StepOutput:
        batches = map_unique(lambda batch: batch.to(engine.device, engine.dtype), loaded.batches)
        losses = engine(batches)
        sums: dict[str, Tensor] = {}
        for role in ROLES:
            layers = engine.module.sides[role].all_layers()
            sums |= {f"{role}/{layer}": value for layer, value in zip(layers, losses[role], strict=True)}
        # Without the last entry: that is the model's own loss, for comparison, and nothing of it trains.
        return StepOutput(sum(losses[role][:-1].sum() for role in ROLES), sums)

    return forward


def _save(job: Job, engine: Engine, folder: Path, summary: dict[str, object]) -> None:
    weights = {role: engine.gathered(engine.module.sides[role].verb_ffns) for role in ROLES}

    def write() -> None:
        for role in ROLES:
            save_verb_ffns(weights[role], folder / f"{role}.safetensors")
        mark_done(folder, summary)
        Checkpoints(folder, 1).drop()

    on_first_rank(job.ranks, f"{NAME}: writing the verbalizers to {folder}", write)


def _describe(sides: dict[str, VerbalizedVLM]) -> dict[str, object]:
    return {role: {"layers": list(side.layers), "depth": side.depth} for role, side in sides.items()}
