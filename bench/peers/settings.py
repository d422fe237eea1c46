"""What both peers' programs need: their command line, the Trainer's settings, the student, and the end.

Counted among the lines of both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments


def arguments() -> argparse.Namespace:
    """The command line of both peers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="autocast; the weights stay in float32")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """The recipe in the Trainer's words: the batch at once, cosine to a hundredth."""
    return TrainingArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.updates,
        per_device_train_batch_size=options.batch_size,
        bf16=options.bf16,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": options.learning_rate / 100},
        max_grad_norm=1.0,
        seed=options.seed,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def frozen_tower(folder: Path) -> Any:
    """The student without gradients for its vision tower; its projector trains, as in ours."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    tower = getattr(model.model, "visual", None) or model.model.vision_tower  # Qwen2-VL's name, LLaVA's
    tower.requires_grad_(False)
    if hasattr(tower, "merger"):  # Qwen2-VL's projector lies in the tower
        tower.merger.requires_grad_(True)
    return model


def train(trainer: Trainer, processor: Any, output: Path) -> None:
    """Train, save the student with its processor, and print the metrics."""
    metrics = trainer.train().metrics
    trainer.save_model(str(output / "student"))
    processor.save_pretrained(output / "student")
    print(json.dumps(metrics))
