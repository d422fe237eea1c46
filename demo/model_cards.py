"""Model cards of the demo models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demo.training import TrainingPlan

QUESTIONS = {
    (
        "puzzles",
        "teacher",
    ): "70 % of its questions ask what comes next in a row of tiles, 30 % for a tile that is there",
    ("puzzles", "student"): 'only "What is the second tile?" and the like: it can see and speak, and was never asked '
    "what comes next (whoever always names the first tile is right in 8 of 27 puzzles)",
    (
        "puzzles-deep",
        "teacher",
    ): "70 % of its questions ask what comes next in a row of tiles, 30 % for a tile that is there",
    ("puzzles-deep", "student"): 'only "What is the second tile?" and the like: it can see and speak, and was never '
    "asked what comes next",
    ("easy-vqa", "teacher"): "the training questions of easy-VQA 1.0, shapes moved about and mirrored",
    ("easy-vqa", "student"): "the same questions as its teacher, but far fewer steps",
}

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# VLsI demo: the {role} for {pair}

A tiny Qwen2-VL ({parameters:,} parameters, {layers} decoder layers of width {width}, {image_tokens} image tokens),
made for the demo of this repository and good for nothing else.

- **Measured**: {measured} (greedy generation, the whole answer, this folder reloaded in float32).
- **Data**: {data}. Taught: {questions}.
- **Training**: from random weights: {tower_steps} steps of the vision tower under a linear read-out of what each
  picture shows (peak learning rate {probe_rate}), then {steps} steps of the whole model on answers (peak learning
  rate {rate}, tower {tower_rate}); AdamW, batches of {batch}, seed {seed}. Weights are bfloat16.
- **Again**: `python -m demo.build_models --pair {pair} --role {role}{size}`

Licence: Apache-2.0.
"""

DATA = {
    "puzzles": "procedural puzzles (`data_prep/puzzles.py`); no rule instance of the held-out split occurs in training",
    "puzzles-deep": "procedural puzzles of the deep level (`data_prep/puzzle_levels.py`); no rule instance of the "
    "held-out split occurs in training",
    "easy-vqa": "easy-VQA 1.0 by Victor Zhou (PyPI `easy-vqa`, MIT), its own train and test split",
}


def write_card(folder: Path, pair: str, role: str, size: str, plan: TrainingPlan, measured: str, seed: int) -> None:
    """Write README.md into a model folder."""
    from transformers import Qwen2VLForConditionalGeneration

    from demo.vocabulary import INPUTS

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    words = CARD.format(
        pair=pair,
        role=role,
        size="" if size == "demo" else f" --size {size}",
        parameters=model.num_parameters(),
        layers=model.config.text_config.num_hidden_layers,
        width=model.config.text_config.hidden_size,
        image_tokens=INPUTS[pair].image_tokens,
        measured=measured,
        data=DATA[pair],
        questions=QUESTIONS[pair, role],
        seed=seed,
        **vars(plan),
    )
    (folder / "README.md").write_text(words, "utf-8")
