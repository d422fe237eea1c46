"""The end of a step that trained the student: its model on disk, then done.json, then no more checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pipeline.recipe.schema import StudentTraining
from pipeline.runtime.checkpoint import Checkpoints
from pipeline.runtime.engine import Engine
from pipeline.runtime.folder import mark_done
from pipeline.runtime.loop import Job
from pipeline.runtime.ranks import wait_for_all
from pipeline.vlm.export import save_student
from pipeline.vlm.lora import merge_lora


def finish(
    job: Job, name: str, engine: Engine, backbone: nn.Module, model_folder: Path, summary: dict[str, Any]
) -> None:
    """Save the student as a Hugging Face folder and mark the step complete. All ranks must call."""
    weights = engine.gathered(backbone)
    if job.ranks.first:
        training: StudentTraining = getattr(job.recipe, name)
        if training.lora_rank:
            weights = merge_lora(weights, training.lora_rank, training.lora_alpha)
        save_student(backbone, weights, job.recipe.student.path, model_folder)
        mark_done(job.recipe.run / name, summary)
        Checkpoints(job.recipe.run / name, 1).drop()
    wait_for_all()
