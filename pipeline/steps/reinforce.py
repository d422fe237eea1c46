"""Stage 2b: the student is finetuned on the responses themselves; verbalizers are gone (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from data_prep.shards import ShardFolder
from pipeline.loss.linear_ce import linear_cross_entropy
from pipeline.loss.robust_ce import generalised_cross_entropy, smoothed_cross_entropy
from pipeline.recipe.checks import number_of_steps
from pipeline.recipe.schema import Reinforce
from pipeline.runtime.data.batches import MB, ChatDataset, LoadedBatch
from pipeline.runtime.engine import Engine, dtype_of, sharded_loading
from pipeline.runtime.finish import finish
from pipeline.runtime.folder import mark_done
from pipeline.runtime.held_out import open_held_out
from pipeline.runtime.loop import Job, MicroStep, StepOutput, train
from pipeline.runtime.model_card.card import write_card
from pipeline.runtime.ranks import on_first_rank
from pipeline.runtime.shared_files import wait_for_files
from pipeline.vlm.assemble import encoders, vocabulary_rows
from pipeline.vlm.backbone import load_student, run_backbone
from pipeline.vlm.export import copy_student
from pipeline.vlm.lora import adapter_beside
from pipeline.vlm.parts import final_norm, image_parts, may_be_unused
from pipeline.vlm.probe import check_parts
from pipeline.vlm.processing import Batch
from pipeline.vlm.response_scores import score_responses
from pipeline.vlm.verbalizer import LanguageHead

NAME = "reinforce"


class Finetuned(nn.Module):
    """The student and its own head; the parts that the recipe names train."""

    def __init__(self, backbone: nn.Module, vocab: int, loss: Callable[..., Tensor] = linear_cross_entropy):
        """loss: as linear_cross_entropy, but perhaps more tolerant of wrong labels."""
        super().__init__()
        self.backbone = backbone
        self.loss = loss
        self.depth = int(backbone.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr,operator]
        self.head = LanguageHead(backbone, vocab)

    def forward(self, batch: Batch, score: bool = False) -> Tensor:
        """The loss, which is cross-entropy in nat unless another was given, summed over response tokens: [1].

        score: instead, without gradient, what score_responses gives.
        """
        if score:
            return score_responses(self.backbone, self.head, batch)
        (last,) = run_backbone(self.backbone, batch.inputs, [self.depth], batch.positions)
        return self.head(self.loss, final_norm(self.backbone)(last)[None], labels=batch.labels)


def run(job: Job) -> None:
    """Finetune the student that interaction left, or the untouched one where it has zero updates; then export."""
    recipe, folder = job.recipe, job.recipe.run / NAME
    if job.has_done(NAME):
        job.say(f"{NAME}: already done; the student is in {recipe.run / 'student'}")
        return
    begun_from = recipe.student.path if recipe.interact.steps == 0 else recipe.run / "interact" / "student"
    if recipe.reinforce.steps == 0:

        def copy() -> None:
            copy_student(begun_from, recipe.run / "student")
            if (adapter := adapter_beside(begun_from)).is_dir() and recipe.export.adapter:
                copy_student(adapter, adapter_beside(recipe.run / "student"))
            write_card(recipe.run, recipe.run / "student")
            mark_done(folder, {"updates": 0})

        on_first_rank(job.ranks, f"{NAME}: copying {begun_from}", copy)
        return
    wait_for_files(job.ranks, [begun_from])  # rank 0 may have written it just now
    chat_encoders = encoders(recipe, ["student"])
    with sharded_loading(recipe, recipe.reinforce):
        backbone = load_student(begun_from, dtype_of(recipe), recipe, recipe.reinforce)
    name, loss = loss_of(recipe.reinforce)
    engine = Engine(Finetuned(backbone, vocabulary_rows(begun_from), loss), recipe, recipe.reinforce, job.ranks)
    check_parts(backbone, chat_encoders["student"], (), engine.device, engine.dtype)
    data = ShardFolder(recipe.samples_of(NAME))
    dataset = ChatDataset(data, chat_encoders, memory=recipe.data.memory_mb * MB)
    total = number_of_steps(recipe.reinforce, len(dataset))
    forward, unused, images = _forward(engine, name), may_be_unused(backbone), image_parts(backbone)
    score = partial(engine, score=True)
    held_out = open_held_out(NAME, recipe.reinforce, recipe.data.held_out, chat_encoders["student"], score)
    averages = train(job, NAME, recipe.reinforce, total, engine, dataset, forward, unused, images, held_out)
    folders = begun_from, recipe.run / "student"
    finish(job, NAME, engine, backbone, folders, {"updates": total, "losses": averages})


def loss_of(reinforce: Reinforce) -> tuple[str, Callable[..., Tensor]]:
    """(its name in the metrics, the loss that a recipe asks for)."""
    if reinforce.label_smoothing:
        return "smoothed_cross_entropy", partial(smoothed_cross_entropy, smoothing=reinforce.label_smoothing)
    if reinforce.loss_power:
        return "generalised_cross_entropy", partial(generalised_cross_entropy, power=reinforce.loss_power)
    return "cross_entropy", linear_cross_entropy


def _forward(engine: Engine, name: str):
    def forward(loaded: LoadedBatch, _micro_step: MicroStep) -> StepOutput:
        loss = engine(loaded.batches["student"].to(engine.device, engine.dtype))[0]
        return StepOutput(loss, {name: loss})

    return forward
