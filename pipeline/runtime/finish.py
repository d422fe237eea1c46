"""The end of a step that trained the student: its model and card on disk, then done.json, then no more checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pipeline.recipe.schema import StudentTraining
from pipeline.runtime.checkpoint.checkpoints import remove_checkpoints
from pipeline.runtime.engine import Engine
from pipeline.runtime.folder import mark_done
from pipeline.runtime.loop import Job
from pipeline.runtime.model_card.card import write_card
from pipeline.runtime.ranks import on_first_rank
from pipeline.vlm.export import save_student
from pipeline.vlm.lora import adapter_beside, merge_lora, save_adapter


def finish(
    job: Job, name: str, engine: Engine, backbone: nn.Module, folders: tuple[Path, Path], summary: dict[str, Any]
) -> None:
    """Save the student as a Hugging Face folder, mark the step complete and close its engine. All ranks must call.

    folders: of the model that the step began with, and of the one that it leaves.
    """
    begun_from, model_folder = folders
    gathered = engine.gathered(backbone)
    training: StudentTraining = getattr(job.recipe, name)

    def export() -> None:
        if training.lora_rank and job.recipe.export.adapter:
            save_adapter(gathered, training, begun_from, adapter_beside(model_folder))
        weights = merge_lora(gathered, training.lora_rank, training.lora_alpha) if training.lora_rank else gathered
        save_student(backbone, weights, job.recipe.student.path, model_folder)
        if model_folder == job.recipe.run / "student":  # not the one between two steps, interact/student
            write_card(job.recipe.run, model_folder)
        mark_done(job.recipe.run / name, summary)
        remove_checkpoints(job.recipe.run / name)

    on_first_rank(job.ranks, f"{name}: writing {model_folder}", export)
    engine.close()
