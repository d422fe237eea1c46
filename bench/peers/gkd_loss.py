"""Distillation of the last layer: TRL's GKD loss in transformers' Trainer, as a user would write it.

    python -m bench.peers.gkd_loss --teacher DIR --student DIR --data SHARDS --output DIR --updates 300

TRL's GKDTrainer gives its models input_ids and attention_mask alone, so pictures do not reach them; its loss is taken
instead. beta = 0 is KL(teacher || student); it has no factor T^2, and divides by the response tokens of the update.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Trainer
from trl.experimental.gkd import GKDTrainer

from bench.peers.chats import Collator, read
from bench.peers.settings import arguments, frozen_tower, train, training_arguments
from pipeline.vlm.processing import load_processor


class Distillation(Trainer):
    """The student follows a teacher that is in memory beside it."""

    def __init__(self, teacher: Any, *settings: Any):
        super().__init__(*settings)
        self.teacher = teacher.eval().requires_grad_(False)
        self.model_accepts_loss_kwargs = True  # so that the number of tokens of the update comes with each micro-batch

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Forward KL per response token."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits
        shared = min(outputs.logits.shape[-1], teacher.shape[-1])
        loss = GKDTrainer.generalized_jsd_loss(
            outputs.logits[:, :-1, :shared], teacher[:, :-1, :shared], labels[:, 1:], beta=0.0,
            num_items_in_batch=num_items_in_batch,
        )  # fmt: skip
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    """Distil."""
    options = arguments()
    processor = load_processor(options.student)
    precision = "bfloat16" if options.bf16 else "float32"
    teacher = AutoModelForImageTextToText.from_pretrained(options.teacher, dtype=precision)
    trainer = Distillation(
        teacher, frozen_tower(options.student), training_arguments(options), Collator(processor), read(options.data)
    )
    train(trainer, processor, options.output)


if __name__ == "__main__":
    main()
