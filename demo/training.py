"""How a demo model is trained: first its vision tower under a linear probe, then the whole model on answers."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from demo.batches import BatchSource, QuestionBatch
from demo.sizes import Size, model_config
from demo.trainable import TrainableModel

WARM_UP = 100
"""Steps over which the learning rate rises."""
REPORT_EVERY = 100
"""Steps between two lines of progress."""
EVAL_QUESTIONS = 256
"""Held-out questions in a line of progress."""


@dataclass(frozen=True)
class TrainingPlan:
    """Steps and learning rates of one model."""

    tower_steps: int
    """Steps of the first part, the tower alone."""
    steps: int
    """Steps of the second part, the whole model."""
    rate: float
    """Peak learning rate of the decoder in the second part."""
    tower_rate: float
    """Peak learning rate of the tower in the second part."""
    probe_rate: float = 1e-3
    """Peak learning rate of the tower in the first part."""
    batch: int = 64


def train(
    size: Size, batches: BatchSource, tokenizer: PreTrainedTokenizerFast, plan: TrainingPlan, device: str, seed: int
) -> Qwen2VLForConditionalGeneration:
    """Train a model from random weights, printing progress; returns it on the CPU, in float32."""
    torch.manual_seed(seed)
    trainable = TrainableModel(Qwen2VLForConditionalGeneration(model_config(size, tokenizer)), tokenizer, batches).to(
        device
    )
    rng = random.Random(seed)
    held_out = _to(batches.held_out(EVAL_QUESTIONS), device)

    def tower_loss(batch: QuestionBatch) -> Tensor:
        return trainable.probe_loss(trainable.encode_images(batch.pictures), batch.attributes)

    def draw() -> QuestionBatch:
        return _to(batches.draw(rng, plan.batch), device)

    tower = [*trainable.model.model.visual.parameters(), *trainable.probe.parameters()]
    _optimise("tower", [(tower, plan.probe_rate)], lambda: tower_loss(draw()), plan.tower_steps, lambda: "")
    decoder = [*trainable.model.model.language_model.parameters()]
    _optimise(
        "answers",
        [(decoder, plan.rate), (tower, plan.tower_rate)],
        lambda: trainable.loss(draw()),
        plan.steps,
        lambda: f"held-out exact match {trainable.exact_match(held_out):.3f}",
    )
    return trainable.model.cpu().eval()


def _optimise(
    name: str,
    groups: list[tuple[list[nn.Parameter], float]],
    loss_of_batch: Callable[[], Tensor],
    steps: int,
    report: Callable[[], str],
) -> None:
    """Run AdamW with warm-up and a cosine down to a fiftieth of the peak."""
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for parameters, rate in groups], betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_at(step, steps))
    begin, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(_all(groups), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % REPORT_EVERY == 0 or step == steps:
            mean, total = total / ((step - 1) % REPORT_EVERY + 1), 0.0
            print(f"{name} {step}/{steps}  loss {mean:.4f}  {time.monotonic() - begin:.0f} s  {report()}", flush=True)


def _all(groups: Iterable[tuple[list[nn.Parameter], float]]) -> list[nn.Parameter]:
    return [parameter for parameters, _ in groups for parameter in parameters]


def _rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate."""
    return min((step + 1) / WARM_UP, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1))))


def _to(batch: QuestionBatch, device: str) -> QuestionBatch:
    return QuestionBatch(batch.pictures.to(device), batch.questions, batch.answers, batch.attributes.to(device))
