"""What DeepSpeed is told: a step's config file, filled with the recipe's numbers."""

from __future__ import annotations

from typing import Any

from pipeline.recipe.checks import load_deepspeed_config
from pipeline.recipe.schema import Cache, Recipe, Training


def step_config(recipe: Recipe, section: Training | Cache, clip: float) -> dict[str, Any]:
    """The config of a step's engine: the recipe's numbers where the file says "auto" or nothing.

    section: the step's section; recipe.cache makes one for forwards alone. Gradients are summed over micro-steps and
    ranks in float32 unless the file itself says otherwise: DeepSpeed's own default is the weights' format, and in
    bfloat16 that loses half a percent of the gradient in 16 micro-steps (docs/numerics.md).
    """
    config = load_deepspeed_config(recipe.deepspeed_of(section))
    filled = {
        **config,
        "train_micro_batch_size_per_gpu": section.micro_batch_size if isinstance(section, Training) else 1,
        "gradient_accumulation_steps": 1,  # their number may differ by update: see Engine.backward
        "gradient_clipping": clip,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "steps_per_print": 10**9,
    }
    if isinstance(section, Training):
        filled["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
        filled["communication_data_type"] = config.get("communication_data_type", "fp32")
    elif zero_stage(config) != 3:
        # Stages 1 and 2 shard gradients and optimizer states, which forwards do not have.
        filled["zero_optimization"] = {"stage": 0}
    return filled


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage that a config asks for."""
    return int(config.get("zero_optimization", {}).get("stage", 0))
