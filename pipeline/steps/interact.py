"""Stage 2a: each student target layer follows the teacher layer it is matched to, from the cache, no teacher in memory.

S student target layers, J teacher target layers, T response tokens of the micro-batch, d width of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep.shards import ShardFolder
from pipeline.cache.hashes import check_sha256
from pipeline.cache.reader import CacheRecord
from pipeline.cache.view import CacheView
from pipeline.commands import train_command
from pipeline.errors import CacheError
from pipeline.loss.linear_ce import linear_cross_entropy
from pipeline.loss.matching import Matching, matching_rule
from pipeline.loss.sparse_kl import column_kl, kl_matrix, matched_kl
from pipeline.recipe.checks import number_of_steps
from pipeline.recipe.schema import Interact
from pipeline.runtime.data.batches import MB, ChatDataset, LoadedBatch, SampleIndex, derived_seed
from pipeline.runtime.engine import Engine, dtype_of, sharded_loading
from pipeline.runtime.finish import finish
from pipeline.runtime.folder import done, ids_of, mark_done, trained_verb_ffns
from pipeline.runtime.held_out import open_held_out
from pipeline.runtime.loop import Job, MicroStep, StepOutput, train
from pipeline.runtime.ranks import on_first_rank, sum_over_ranks, wait_for_all
from pipeline.runtime.shared_files import as_first_rank_sees, wait_for_files
from pipeline.signal import HiddenSignal, Signal, Unembedding
from pipeline.steps.teacher_cache import open_teacher_cache
from pipeline.vlm.assemble import encoders, student_with_verbalizers
from pipeline.vlm.backbone import run_backbone
from pipeline.vlm.parts import decoder_layers, image_parts, may_be_unused
from pipeline.vlm.probe import check_parts
from pipeline.vlm.processing import Batch, Encoded
from pipeline.vlm.response_scores import score_responses
from pipeline.vlm.verb_ffns import save_verb_ffns
from pipeline.vlm.verbalizer import StoredHead, VerbalizedVLM

NAME = "interact"
KL_EVERY = 50
"""Updates between two of which the KL of all candidates is logged: reading it waits for the device."""


@dataclass(frozen=True)
class Draw:
    """The parameters of one micro-batch's match and losses, the same on every rank."""

    matching: Matching
    generator: torch.Generator
    cross_entropy: bool = False
    """Whether the last layer's cross-entropy is needed."""
    deep_supervision: bool = False
    """Whether the target layers' cross-entropy is needed."""


class Interaction(nn.Module):
    """The student with its verbalizers, and the cached teacher head where the codec needs it."""

    def __init__(self, student: VerbalizedVLM, teacher_head: nn.Module | None):
        """teacher_head: the cached head that a `hidden` cache needs; None for sparse codecs."""
        super().__init__()
        self.student = student
        self.teacher_head = teacher_head

    def forward(
        self,
        batch: Batch,
        signal_of: Callable[[Unembedding | None], Signal] | None = None,
        draw: Draw | None = None,
    ) -> dict[str, Tensor]:
        """Losses summed over this rank's tokens, "kl" [S, J], "match" [S] and "entropy" [S] or [0].

        The losses are "matched" [S], "last" and, where the draw asks for them, "cross_entropy" and "deep_supervision"
        [S]. kl is the global micro-batch's mean in nat; match counts teacher targets from 0, -1 where there is none;
        entropy is that of each layer's draw, in nat. Of data that has no cache, without signal and draw: only "scores",
        what score_responses gives.
        """
        if signal_of is None or draw is None:
            return {"scores": score_responses(self.student.backbone, self.student.head, batch)}
        # The signal first, where it needs no head: its copies to the device would wait for the whole backbone.
        signal = signal_of(None) if self.teacher_head is None else None
        hidden = run_backbone(self.student.backbone, batch.inputs, self.student.all_layers(), batch.positions)
        verbalized = self.student.verbalize_states(hidden)
        if self.teacher_head is None:
            return self.student.head(self.losses, verbalized, signal, batch.labels, draw)
        # The hidden codec computes the teacher's logits anew, so both heads are gathered at once.
        return self.teacher_head(self._with_teacher_head, verbalized, signal_of, batch.labels, draw)

    def losses(
        self, verbalized: Tensor, unembedding: Unembedding, signal: Signal, labels: Tensor, draw: Draw
    ) -> dict[str, Tensor]:
        """The result of `forward`, from normed states [S + 1, T, d]. Called while the heads are gathered."""
        return interaction_losses(verbalized, unembedding, signal, labels, draw)

    def _with_teacher_head(self, verbalized: Tensor, teacher: Unembedding, signal_of, labels: Tensor, draw: Draw):
        return self.student.head(self.losses, verbalized, signal_of(teacher), labels, draw)


def interaction_losses(
    verbalized: Tensor, unembedding: Unembedding, signal: Signal, labels: Tensor, draw: Draw
) -> dict[str, Tensor]:
    """Algorithm 1 on one global micro-batch (paper, section 3), then the last layers' KL; verbalized is [S + 1, T, d].

    The signal's last column is the teacher's last layer. Verbalizers stay as stage 1 left them, so the head takes no
    gradient from the matched layers, only from the last.
    """
    targets, last = verbalized[:-1], verbalized[-1]
    students, teachers = len(targets), _columns(signal) - 1
    window = draw.matching.window(students, teachers)
    matrix = kl_matrix(targets, unembedding, signal, window)
    mean = _mean_over_ranks(matrix.values[:, :teachers], len(labels))
    # Where it is not a number neither is the loss: the update will be skipped, and any match serves.
    mean = torch.where(mean.isnan().any(), 0.0, mean)
    # Both read the matrix, which waits for the device: before the device gets the losses to compute.
    match = draw.matching.match(mean, draw.generator)
    entropies = draw.matching.entropies(mean, match)
    losses = {
        "matched": matched_kl(targets, unembedding, signal, match, matrix),
        "last": column_kl(last, unembedding, signal, teachers),
        "kl": mean,
        "match": torch.tensor([-1 if m is None else m for m in match]),
        "entropy": torch.tensor(entropies or []),
    }
    if draw.cross_entropy:
        losses["cross_entropy"] = linear_cross_entropy(last[None], unembedding, labels)[0]
    if draw.deep_supervision:
        losses["deep_supervision"] = linear_cross_entropy(targets, unembedding.detached(), labels)
    return losses


def run(job: Job, module: Callable[[VerbalizedVLM, nn.Module | None], Interaction] = Interaction) -> None:
    """Train against the cache, then leave the student in interact/student for the next step.

    module: makes what is trained. Another one has other losses, or parameters of its own that end with the step.
    """
    recipe, folder = job.recipe, job.recipe.run / NAME
    if job.has_done(NAME):
        job.say(f"{NAME}: already done, in {folder}")
        return
    if recipe.interact.steps == 0:
        if job.ranks.first:
            mark_done(folder, {"updates": 0})
        wait_for_all()
        return
    data = ShardFolder(recipe.data.train)
    view, chat_encoders = open_cache_view(job, data), encoders(recipe, ["student"])
    verb_ffns = recipe.student_stage_1 / "verbalize" / "student.safetensors"
    wait_for_files(job.ranks, [verb_ffns])
    sources = {"teacher cache": view.cache.identity.digest, "student's verbalizers": _check(job, verb_ffns)}
    ids = view.cache.identity.student_ids if view.ids is None else view.ids
    with sharded_loading(recipe, recipe.interact) as add_to:
        student = student_with_verbalizers(recipe, ids, dtype_of(recipe), verb_ffns, add_to)
    head = StoredHead(view.cache.unembedding()) if view.cache.codec.needs_head else None
    engine = Engine(module(student, head), recipe, recipe.interact, job.ranks)
    check_parts(student.backbone, chat_encoders["student"], student.layers, engine.device, engine.dtype)
    dataset = ChatDataset(data, chat_encoders, partial(_attach, view), recipe.data.memory_mb * MB)
    total = number_of_steps(recipe.interact, len(dataset))
    forward = _forward(engine, recipe.interact, recipe.seed, view, student.layers)
    unused = (*may_be_unused(student.backbone), *_unreached(student, recipe.interact))
    images = image_parts(student.backbone)
    held_out = open_held_out(
        NAME,
        recipe.interact,
        recipe.data.held_out,
        chat_encoders["student"],
        lambda batch: engine(batch)["scores"],
        ids,
    )
    averages = train(job, NAME, recipe.interact, total, engine, dataset, forward, unused, images, held_out, sources)
    if recipe.interact.train_verbalizers:
        _save_verb_ffns(job, engine, student)  # before done.json, which says that all of the step's files are there
    folders = recipe.student.path, folder / "student"
    finish(job, NAME, engine, student.backbone, folders, {"updates": total, "losses": averages})


def _check(job: Job, verb_ffns: Path) -> str:
    """SHA-256 of stage 1's verbalizers of the student. Raises CacheError, on all ranks, where they are no longer as it
    left them."""
    recipe = verb_ffns.parents[1] / "recipe.yaml"
    repair = f"Bring it back, or make it again: rm -r {verb_ffns.parent} && {train_command(1, recipe)}"

    def check() -> str:
        summary = done(verb_ffns.parent) or {}
        return check_sha256(verb_ffns, summary.get("sha256", {}).get("student"), repair)

    return as_first_rank_sees(job.ranks, f"{NAME}: checking {verb_ffns}", check)


def _save_verb_ffns(job: Job, engine: Engine, student: VerbalizedVLM) -> None:
    """Write the student's verb-FFNs as this step leaves them, in the form of stage 1's. All ranks must call."""
    weights, path = engine.gathered(student.verb_ffns), trained_verb_ffns(job.recipe.run)
    on_first_rank(job.ranks, f"{NAME}: writing {path}", lambda: save_verb_ffns(weights, path))


def _attach(view: CacheView, index: SampleIndex, encoded: Encoded) -> tuple[Encoded, CacheRecord]:
    """A sample with its record in the cache; only tokens that both keep carry loss. Runs in loader workers."""
    record, kept = view.record(index.sample, index.epoch, encoded.response_ids.numpy())
    return encoded.only(torch.from_numpy(kept)), record


def open_cache_view(job: Job, data: ShardFolder) -> CacheView:
    """Open the cache that the run uses: the one that rank 0 chooses. All ranks must call.

    Raises CacheError, on all of them, if anything that it was made from has changed.
    """
    recipe, interact = job.recipe, job.recipe.interact
    cache, layers = open_teacher_cache(job, NAME, data, interact.teacher_layers)
    stage_1 = recipe.student_stage_1
    summary = as_first_rank_sees(job.ranks, f"{NAME}: reading {stage_1}", lambda: done(stage_1 / "verbalize"))
    if summary is None:
        raise CacheError(f"no verbalizers in {stage_1 / 'verbalize'}; run: {train_command(1, stage_1 / 'recipe.yaml')}")
    ids = ids_of(summary, "student")
    fewer = ids if ids < cache.identity.student_ids else None
    return CacheView(cache, layers, interact.points, interact.token_share, recipe.seed, fewer)


def _forward(engine: Engine, interact: Interact, seed: int, view: CacheView, layers: tuple[int, ...]):
    rule = matching_rule(interact.matching, interact.temperature)

    def forward(loaded: LoadedBatch, micro_step: MicroStep) -> StepOutput:
        generator = torch.Generator().manual_seed(derived_seed(seed, "match", micro_step.update, micro_step.micro))
        draw = Draw(rule, generator, interact.cross_entropy_weight > 0, interact.deep_supervision_weight > 0)
        batch = loaded.batches["student"].to(engine.device, engine.dtype)
        signal_of = partial(view.signal, loaded.attached, engine.device)
        losses = engine(batch, signal_of, draw)
        matched, last = losses["matched"], losses["last"]
        loss = matched.sum() + interact.last_weight * last
        sums = {f"layer/{layer}": value for layer, value in zip(layers, matched, strict=True)} | {"last": last}
        if interact.cross_entropy_weight:
            loss = loss + interact.cross_entropy_weight * losses["cross_entropy"]
            sums["cross_entropy"] = losses["cross_entropy"]
        if interact.deep_supervision_weight:
            supervised = losses["deep_supervision"]
            loss = loss + interact.deep_supervision_weight * supervised.sum()
            sums |= {f"supervised/{layer}": value for layer, value in zip(layers, supervised, strict=True)}
        values = _drawn(losses, view.layers)
        if micro_step.update % KL_EVERY == 0 and "kl" in losses:  # another module's losses may have none
            values["kl"] = _candidates(losses["kl"], layers, view.layers)
        return StepOutput(loss, sums, values)

    return forward


def _unreached(student: VerbalizedVLM, interact: Interact) -> list[str]:
    """Parameters that get no gradient where the last layer's output has no part in the loss."""
    if interact.last_weight or interact.cross_entropy_weight:
        return []
    deeper = [p for layer in decoder_layers(student.backbone)[student.layers[-1] :] for p in layer.parameters()]
    above = {id(p) for p in (*deeper, *student.head.parameters())}
    return [name for name, p in student.backbone.named_parameters() if id(p) in above]


def _drawn(losses: dict[str, Tensor], layers: tuple[int, ...]) -> dict[str, list]:
    """The match as teacher layers, and the entropy of each draw where there was one."""
    entropy = [round(value, 4) for value in losses["entropy"].tolist()]
    return {"match": _teacher_layers(losses["match"], layers), **({"draw_entropy": entropy} if entropy else {})}


def _candidates(kl: Tensor, student: tuple[int, ...], teacher: tuple[int, ...]) -> list[tuple[int, int, float]]:
    """(student layer, teacher layer, KL in nat a token) of each pair in the search range. Waits for the device."""
    return [
        (student[row], teacher[column], round(value, 4))
        for row, values in enumerate(kl.tolist())
        for column, value in enumerate(values)
        if isfinite(value)
    ]


def _teacher_layers(match: Tensor, layers: tuple[int, ...]) -> list[int | None]:
    return [None if column < 0 else layers[column] for column in match.tolist()]


def _columns(signal: Signal) -> int:
    return (signal.hidden if isinstance(signal, HiddenSignal) else signal.ids).shape[1]


def _mean_over_ranks(sums: Tensor, tokens: int) -> Tensor:
    """KL summed over this rank's tokens [S, J] to its mean over the global micro-batch: one all-reduce."""
    count = torch.full_like(sums[:1, :1], float(tokens)).reshape(1)
    packed = sum_over_ranks(torch.cat([sums.flatten(), count]))
    return (packed[:-1] / packed[-1].clamp(min=1)).view_as(sums)
