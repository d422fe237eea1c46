"""One recipe, typed: every number of a run, what it means, and what must hold between them.

Nothing here imports torch: a recipe is checked before anything is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, each field's docstring is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(Section):
    """The instruction data, as `python -m data_prep shard` leaves it."""

    train: Path
    """Shard folder (with manifest.json) that every step trains on and the teacher cache is made for."""
    held_out: Path | None = None
    """Shard folder never trained on; `python -m pipeline evaluate` uses it when no --data is given."""
    max_length: Positive = 4096
    """Longest chat in tokens, image tokens included; longer ones are cut, never inside an image."""
    max_pixels: Positive | None = None
    """Largest image in pixels (width x height), for both models alike: a larger one is scaled down, keeping its shape.
    Left out: the processor's own limit. Qwen2-VL makes a token of 28 x 28 pixels, so 1003520 are 1280 tokens."""
    min_pixels: Positive | None = None
    """Smallest image in pixels, for both models alike: a smaller one is scaled up. Left out: the processor's own."""
    max_bad_share: Share = 0.01
    """The run stops when more than this share of the samples seen so far could not be used."""
    workers: Count = 2
    """Loader processes a rank; 0 loads in the training process. Changes speed, never the numbers."""


class Model(Section):
    """One of the two vision-language models."""

    path: Path
    """A Hugging Face folder: config.json, safetensors weights, tokenizer, processor, chat template."""
    layers: tuple[Positive, ...] | None = None
    """Target layers, counted from 1, increasing, below the last layer; left out: every 4th from 2, as in the paper."""


class Verbalizer(Section):
    """The small trained block between a target layer and the model's own language head."""

    form: Literal["residual", "paper"] = "residual"
    """residual: h + W_down(SiLU(W_gate n(h)) * (W_up n(h))), W_down from zero, so that it starts as the logit lens;
    paper: the literal W_down(SiLU(W_gate h) * (W_up h)), no residual and no norm."""


class Training(Section):
    """What every trained step needs."""

    steps: Count | None = None
    """Optimizer updates; give this or epochs. 0 leaves the step out."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over data.train; give this or steps."""
    batch_size: Positive
    """Samples an update, over all ranks and all accumulation: the global batch."""
    micro_batch_size: Positive = 1
    """Samples in one forward on one rank. Accumulation follows from it, batch_size and the number of ranks."""
    learning_rate: Rate = 1e-4
    """Peak of the cosine schedule (AdamW)."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Where the cosine ends, at the last update."""
    warmup_steps: Count = 0
    """Updates of linear warm-up before the cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    checkpoint_every: Positive = 500
    """Updates between two checkpoints."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints stay on disk."""


class StudentTraining(Training):
    """A step that trains the student."""

    lora_rank: Count = 0
    """Rank of LoRA adapters (peft) on the decoder's linear layers, which then are all that trains, merged in the end; 0
    trains everything but the vision tower. The paper's way is 64."""
    lora_alpha: Positive = 64
    """LoRA's alpha: the adapters' product is scaled by lora_alpha / lora_rank."""


class Codec(Section):
    """How a teacher's distribution becomes bytes (docs/cache_format.md)."""

    name: Literal["sampled", "hidden", "topk"] = "sampled"
    """sampled: systematic samples, unbiased; hidden: the exact normed verbalizer output, 2 d or 4 d bytes; topk: the k
    likeliest ids and one bucket for the rest, biased, for comparison."""
    points: Annotated[int, Field(ge=16, le=1024)] = 64
    """sampled only: how many points are drawn from each distribution."""
    k: Positive = 64
    """topk only: how many ids are kept for each token and layer."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """hidden only: what the hidden states are stored as."""


class Cache(Section):
    """The teacher cache: what each teacher target layer says about each response token."""

    codec: Codec = Codec()
    """The codec and its parameters."""
    batch_tokens: Positive = 16384
    """Tokens in one teacher forward on one rank, image tokens and padding included; a longer sample goes alone."""


class Interact(StudentTraining):
    """Stage 2a: each student target layer follows the teacher layer it is matched to."""

    matching: Literal["adaptive", "uniform", "random", "argmin", "ordered_argmin", "last_only"] = "adaptive"
    """Which teacher layer each student layer follows; adaptive is the paper's Algorithm 1."""
    cross_entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the responses' cross-entropy beside the interaction loss. The paper finds that it hurts: 0."""
    teacher_layers: tuple[Positive, ...] | None = None
    """Which of the cached teacher layers may be matched; left out: all."""
    points: Positive | None = None
    """Of the cached points of each distribution (cache.codec.points, a multiple), use this many, other ones in each
    epoch; left out: all of them, the same ones in every epoch."""
    token_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the response tokens that each epoch learns from, others in each."""
    train_verbalizers: bool = False
    """Whether the student's verb-FFNs train as well; in the paper they stay as stage 1 left them."""


class Recipe(Section):
    """A whole run: two models, the data, and the four steps."""

    run: Path
    """The run's folder; everything the run leaves behind lies in it."""
    seed: int = 0
    """Seeds data order, initialisation and the adaptive draws."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights and activations; optimizer states are float32 in both."""
    deepspeed: Path = Path("ds_configs/zero3.json")
    """DeepSpeed's config; "auto" stands wherever this recipe owns the number."""
    gradient_checkpointing: bool = False
    """Recompute the student's layers in the backward pass of stage 2: less memory, more time, the same numbers."""
    train_vision: bool = False
    """Whether stage 2 trains the student's vision tower as well; everything else trains."""
    train_projector: bool = True
    """Whether stage 2 trains what maps the vision tower's output into the decoder; false suits data without images."""
    data: Data
    """The instruction data that every step trains on."""
    teacher: Model
    """The large model, which is listened to and never trained."""
    student: Model
    """The small model, which is to become better."""
    verbalizer: Verbalizer = Verbalizer()
    """The form of the verb-FFN, the same in both models."""
    verbalize: Training
    """Stage 1a: both models' verbalizers learn."""
    cache: Cache = Cache()
    """Stage 1b: the teacher's words on disk."""
    interact: Interact
    """Stage 2a: the student follows what the cache says."""
    reinforce: StudentTraining
    """Stage 2b: the student is finetuned on the responses."""


STEPS = ("verbalize", "cache", "interact", "reinforce")
"""The steps in running order; also the recipe's sections and the run's folders."""


def leaves(section: BaseModel, prefix: str = "") -> dict[str, object]:
    """Flatten a recipe: {"interact.steps": 150, ...}; tuples and paths become lists and strings."""
    flat: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            flat |= leaves(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            flat[prefix + name] = list(value)
        else:
            flat[prefix + name] = str(value) if isinstance(value, Path) else value
    return flat
