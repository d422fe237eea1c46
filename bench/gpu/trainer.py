"""transformers' Trainer on the student and the micro-batch of a prepared pair, in a process without DeepSpeed.

    python -m bench.gpu.trainer --recipe FILE --updates 20 --device cuda --output FILE

It trains what reinforcement trains, in the recipe's precision, with a fused AdamW. Its weights are bfloat16 without a
float32 copy: less work than ours. Writes {"seconds": median of an update, "loss": the first update's}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.gpu.device import Device
from data_prep.shards import ShardFolder
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.runtime.data.batches import ChatDataset, SampleIndex
from pipeline.runtime.data.loader import load
from pipeline.vlm.assemble import encoders
from pipeline.vlm.backbone import load_student
from pipeline.vlm.processing import Batch

WARM_UP = 3
"""Updates that are not counted."""


class Clock(TrainerCallback):
    """Wall seconds of each update, from its forward to the optimizer's end."""

    def __init__(self, device: Device):
        self.device, self.seconds, self.begun = device, list[float](), 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock when the device is idle."""
        self.device.wait()
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it when the device is idle again."""
        self.device.wait()
        self.seconds.append(time.perf_counter() - self.begun)


def full_labels(batch: Batch) -> Tensor:
    """[B, S]: each response token where it stands, -100 elsewhere, as transformers' models take them."""
    ids = batch.inputs["input_ids"]
    labels = torch.full((ids.numel(),), -100)
    labels[batch.positions + 1] = batch.labels  # a position is where the token is predicted, one before it
    return labels.view(ids.shape)


def micro_batch(recipe: Recipe, dtype: torch.dtype) -> dict[str, Tensor]:
    """The first micro-batch of the data, as bench.steps takes it, with labels."""
    chats = ChatDataset(ShardFolder(recipe.data.train), encoders(recipe, ["student"]))
    first = [SampleIndex(index) for index in range(recipe.interact.micro_batch_size)]
    batch = next(load(chats, [first], 0, "cpu")).batches["student"]
    return {**batch.to("cpu", dtype).inputs, "labels": full_labels(batch)}


def measure(recipe: Recipe, updates: int, device: Device) -> dict[str, float]:
    """Train so many updates after the warm-up."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    student: Any = load_student(recipe.student.path, dtype, recipe, recipe.reinforce)
    inputs, clock = micro_batch(recipe, dtype), Clock(device)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=WARM_UP + updates,
            per_device_train_batch_size=1,  # an item is a whole micro-batch
            learning_rate=1e-6,
            max_grad_norm=recipe.reinforce.clip,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=not device.is_cuda,
            disable_tqdm=True,
        )
        items: Any = [0] * arguments.max_steps
        trainer = Trainer(student, arguments, lambda _: dict(inputs), items, callbacks=[clock])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": statistics.median(clock.seconds[WARM_UP:]), "loss": losses[0]}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = measure(load_recipe(arguments.recipe).recipe, arguments.updates, Device(arguments.device))
    arguments.output.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
