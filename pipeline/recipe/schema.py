"""The recipe's fields: every setting of a run, its type, meaning, unit and default.

"Paper" is VLsI, arXiv 2412.01822. Nothing here imports torch: a recipe is checked before anything is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.recipe.location import Location

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Part = Literal["decoder", "projector", "vision", "head"]
"""A part of the student that may train."""


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors. Each field's docstring is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(Section):
    """The instruction data, made by `python -m data_prep shard`."""

    train: Location
    """Folder of shards (with manifest.json), or its URL (docs/storage.md). Every step trains on it that names
    no other, and the teacher cache is made for it."""
    held_out: Location | None = None
    """Folder of shards, or its URL, that no step trains on. `python -m pipeline evaluate` uses it when --data is not
    given, and evaluate_every of interact and reinforce measures on it."""
    max_length: Positive = 4096
    """Maximum length of a chat in tokens, image tokens included. Longer chats are cut, but never inside an image.
    Not stated in the paper."""
    max_pixels: Positive | None = None
    """Maximum size of an image in pixels (width x height), for both models. Larger images are scaled down with the same
    aspect ratio. Qwen2-VL makes one token of 28 x 28 pixels, so 1003520 pixels are 1280 tokens. Left out: the
    processor's own limit. Not stated in the paper."""
    min_pixels: Positive | None = None
    """Minimum size of an image in pixels (width x height), for both models. Smaller images are scaled up with the same
    aspect ratio. Left out: the processor's own limit. Not stated in the paper."""
    max_bad_share: Share = 0.01
    """Share of samples, from 0 to 1, that may be unusable. A step stops with an error when more of the samples that all
    ranks have read so far could not be used than chance explains: where data of just this share would have so many with
    a probability below 0.001. The cache, evaluate and answer also stop at their end, when the share of all samples is
    known to be larger. One bad sample is always allowed."""
    workers: Count | None = None
    """Data loader processes for each rank; 0: load in the training process. Left out: a rank's share of the cores at
    hand, without the one that it computes with itself; at most 8. This changes the speed, not the results."""
    memory_mb: Count = 0
    """Memory of each loader process for samples that are ready for the model, in MB, so that later epochs need not read
    and encode them again. The first samples that fit stay. It pays where the data is small and read many times. This
    changes the speed, not the results."""


class ModelParts(Section):
    """Names of a model's modules, as `model.named_modules()` has them, for a model whose parts are not recognised.

    Parts are found by structure and checked on a probe before anything is trained; an error there names the field.
    """

    decoder: str | None = None
    """The module that holds the list of the decoder layers, such as model.language_model. Left out: found."""
    norm: str | None = None
    """The norm between the last decoder layer and the language head. Left out: found beside the layers."""
    head: str | None = None
    """The language head, a linear layer. Left out: the model's own output embeddings."""
    vision: tuple[str, ...] | None = None
    """The modules that encode images: the part vision of train. Left out: found."""
    projector: tuple[str, ...] | None = None
    """The modules that map encoded images into the decoder: the part projector of train. They may lie inside a module
    of vision. Left out: found."""


class Model(Section):
    """One of the two vision-language models."""

    path: Path
    """Hugging Face model folder with config.json, safetensors weights, tokenizer, processor and chat template."""
    layers: tuple[Positive, ...] | None = None
    """Target layers: the decoder layers that get a verbalizer, counted from 1, in increasing order. The last layer
    cannot be one: it uses the model's own head. The teacher needs more target layers than the student. Left out: every
    4th layer from 2 on, as in the paper (2, 6, ..., 26 of 28 layers; 2, 6, ..., 78 of 80)."""
    parts: ModelParts = ModelParts()
    """Where the model's parts are, for a model whose structure does not tell. Left out: found by structure."""


class Verbalizer(Section):
    """The small trained block between a target layer and the model's own language head."""

    form: Literal["residual", "paper"] = "residual"
    """Form of the verb-FFN. Its three matrices are square, as wide as the model.
    residual: h + W_down(SiLU(W_gate n(h)) * (W_up n(h))), where n is a norm. W_down starts at zero, so training starts
    from the logit lens.
    paper: W_down(SiLU(W_gate h) * (W_up h)) as printed in the paper, without residual and norm."""


class Training(Section):
    """Settings of every training step."""

    steps: Count | None = None
    """Number of optimizer updates. Set either steps or epochs. 0: skip this step."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Number of passes over the step's samples; it may be a fraction. Set either epochs or steps. Not stated in the
    paper."""
    batch_size: Positive
    """Global batch size: samples in one optimizer update, over all ranks and all accumulated micro-batches. It must be
    a multiple of micro_batch_size x ranks, unless micro_batch_tokens is set. Paper: 512 for its 2B and 7B students,
    256 for its 72B teacher."""
    micro_batch_size: Positive = 1
    """Samples in one forward pass on one rank. A larger value is faster and needs more memory. Gradient accumulation is
    batch_size / (micro_batch_size x ranks) micro-batches. interact draws one match for each of them, over all ranks.
    Each global batch is sorted by length before it is cut, so that samples of like lengths go together.
    Paper: 4 for its 2B and 7B students, 2 for its 72B teacher, with accumulation 16 on 8 GPUs."""
    micro_batch_tokens: Positive | None = None
    """Maximum number of tokens in one forward pass on one rank, image tokens and padding included, by each sample's
    estimated length. Micro-batches then have as many samples as fit instead of micro_batch_size, and their number
    differs between updates; a longer sample gets a micro-batch of its own. Accumulated this way the results are the
    same, but interact draws a match for each micro-batch over all ranks. Not in the paper."""
    learning_rate: Rate = 1e-4
    """Highest learning rate of AdamW: the start of the cosine schedule, after warm-up. Paper: 1e-4."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the last update: the end of the cosine schedule. Paper: 1e-6."""
    warmup_steps: Count = 0
    """Number of updates of linear warm-up before the cosine schedule. Not stated in the paper."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW. Not stated in the paper."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Maximum norm of an update's gradient; a larger one is scaled down. In verbalize it is that of each verb-FFN's
    gradient by itself. 0: no clipping. Not stated in the paper."""
    max_skipped_in_a_row: Positive = 10
    """Number of skipped updates in a row at which the step stops with an error. An update whose loss or gradient is not
    finite is skipped on all ranks: weights and optimizer stay as they are, and the samples are written to
    RUN/non_finite.jsonl."""
    checkpoint_every: Positive = 500
    """Number of updates between two checkpoints. A checkpoint is 12 bytes for each trained parameter. It is copied to
    the host's memory, where there is room, and written while training goes on."""
    checkpoint_minutes: Rate | None = None
    """Minutes after which a checkpoint is written at the next update's end, also where checkpoint_every is not
    reached: no more than this is lost when a job dies. Left out: only checkpoint_every counts."""
    keep_checkpoints: Positive = 2
    """Number of checkpoints kept on disk; older ones are deleted, each once a newer one is complete. So the disk needs
    room for one more. If the newest is damaged, a run goes on from the one before it."""
    deepspeed: Path | None = None
    """DeepSpeed config file (JSON) of this step. Left out: the recipe's own deepspeed."""


class Verbalize(Training):
    """Stage 1a: the verbalizers of both models are trained."""

    train: Location | None = None
    """Folder of shards, or its URL, to train the verbalizers on. Left out: data.train, as in the paper. What the
    teacher's layers then say, and so what interaction learns from them, depends on it (docs/evidence.md)."""


class StudentTraining(Training):
    """Settings of a step that trains the student."""

    evaluate_every: Count = 0
    """Number of updates between two measurements on all of data.held_out, by forwards alone; the step's end has one
    too. metrics.jsonl then has held_out_loss (cross-entropy, nat a response token) and held_out_exact_match (share of
    whole last answers that the student would give token for token). It changes nothing of the training. 0: none."""
    lora_rank: Count = 0
    """Rank of LoRA adapters (peft) on the decoder's linear layers. Only the adapters are trained then, and they are
    merged into the weights at the end; no DoRA, which reads weights that ZeRO-3 has not gathered. 0: no LoRA; the
    student's own weights are trained (see train). Paper: 64."""
    lora_alpha: Positive = 64
    """Alpha of LoRA: the adapters' product is multiplied by lora_alpha / lora_rank. Paper: 64."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are set to zero while it trains, others each time. With it, another number of
    ranks gives other numbers, though a resumed run gives the same. Not stated in the paper."""
    lora_targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the decoder's linear layers with an adapter, as in [q_proj, v_proj]. Left out: all. Paper: not said."""


class Codec(Section):
    """How the cache stores the teacher's distributions (docs/cache_format.md)."""

    name: Literal["sampled", "hidden", "topk"] = "sampled"
    """sampled: a systematic sample of each distribution; small, and the loss is unbiased.
    hidden: the normed verbalizer output of width d; exact, but 2 d or 4 d bytes for each token and layer.
    topk: the k most likely ids and one bucket for all others; biased, for comparison."""
    points: Annotated[int, Field(ge=16, le=1024)] = 64
    """Only for sampled: number of points drawn from each distribution, 16 to 1024. More points give a smaller error and
    a larger cache."""
    k: Positive = 64
    """Only for topk: number of ids kept for each token and layer."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Only for hidden: number format of the stored hidden states. bfloat16 is exact for a teacher that runs in bf16."""


class Cache(Section):
    """The teacher cache: the distributions of the teacher's target layers and last layer at each response token."""

    codec: Codec = Codec()
    """The codec that stores the distributions, and its parameters."""
    folder: Location | None = None
    """Folder, or URL such as s3://bucket/NAME-cache, in which this run's caches are made and read, where the disk of
    `run` has no room for them. Each has a folder of its own in it. Left out: RUN/cache."""
    batch_tokens: Positive = 16384
    """Maximum number of tokens in one forward pass of the teacher on one rank, image tokens and padding included. A
    longer sample gets a pass of its own. A larger value is faster and needs more memory."""
    max_bucket_share: Share = 0.1
    """Only for vocabulary: mapped: share of the teacher's probability, from 0 to 1, that may lie on tokens which are no
    single token of the student, as the mean over the supervised tokens, for each cached layer: of it the student
    learns the sum alone. A cache job stops with an error above it, measured on 64 samples before the cache is made, and
    on all at the end; the manifest has it."""
    deepspeed: Path | None = None
    """DeepSpeed config file (JSON) of cache jobs; in one job with verbalize its own is used. Left out: the recipe's."""


class Interact(StudentTraining):
    """Stage 2a: each student target layer learns from the teacher layer that it is matched to."""

    matching: Literal[
        "adaptive", "uniform", "random", "argmin", "ordered_argmin", "earliest", "latest", "last_only"
    ] = "adaptive"
    """Rule that matches each student target layer to a teacher target layer, drawn or chosen for each micro-batch.
    adaptive: the paper's Algorithm 1; drawn by KL, in increasing order, inside a search range.
    uniform: a fixed match, spread evenly over the teacher's layers.
    random: as adaptive, but all candidates are equally likely.
    argmin: the layer of least KL, without order or search range.
    ordered_argmin: the match of least total KL that keeps the order.
    earliest, latest: a fixed match; the shallowest or the deepest layers that the search ranges allow.
    last_only: no matching; only the last layers' KL is trained."""
    temperature: Rate | None = None
    """Temperature T of the draw, in nats, only for adaptive: a candidate's probability is proportional to exp(-KL / T).
    Left out: the paper's rule, T = 2 / (max KL - min KL) over the candidates, which is nearly uniform where they differ
    by less than one nat. metrics.jsonl has the entropy of each draw (draw_entropy)."""
    last_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the last layers' KL in the interaction loss. Paper: 1. With 0, only the matched layers are trained."""
    cross_entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy on the responses, added to the interaction loss. Paper: 0, because it hurts."""
    deep_supervision_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy of each target layer's verbalized distribution on the responses, summed over the
    layers and added to the interaction loss. With matching: last_only and last_weight: 0, the teacher has no part in
    the training: the control that shows what the layers give without it. Paper: 0."""
    teacher_layers: tuple[Positive, ...] | None = None
    """Teacher target layers that may be matched, counted from 1, in increasing order; they must be in the cache. Left
    out: all cached target layers."""
    points: Positive | None = None
    """Number of points of each distribution to use in an epoch; it must divide cache.codec.points. Each epoch uses
    other points. Left out: all cached points, in every epoch. Only for the codec sampled."""
    token_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the response tokens, above 0 and up to 1, that an epoch trains on. Each epoch draws other tokens."""
    train_verbalizers: bool = False
    """Whether the student's verb-FFNs are trained too. They are saved as interact/student_verbalizers.safetensors, and
    `python -m pipeline trace` uses them for the distilled student. Paper (section 4.4): they stay as stage 1 trained
    them."""


class Reinforce(StudentTraining):
    """Stage 2b: the student is finetuned on the responses."""

    train: Location | None = None
    """Folder of shards, or its URL, to finetune on, such as the teacher's answers (python -m pipeline answer). Left
    out: data.train, as in the paper."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target's probability that is spread evenly over the vocabulary (Szegedy et al., 2016). Paper: 0."""
    loss_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Exponent q of the generalised cross-entropy (1 - p^q) / q (Zhang and Sabuncu, 2018): a token that the student
    finds unlikely weighs less, so wrong answers do. 0: cross-entropy, as in the paper. 1: 1 - p."""


class Export(Section):
    """What is kept beside a trained student."""

    adapter: bool = False
    """Whether a step with LoRA also keeps its adapters, in a folder `adapter` beside its merged student: interact's in
    RUN/interact/adapter, reinforce's in RUN/adapter. peft loads them onto the model that the step began with, which
    adapter_config.json names."""


class Recipe(Section):
    """A whole run: two models, the data and the four steps."""

    run: Path
    """Folder of the run. All its results are written there: checkpoints, cache, logs and the trained student."""
    stage_1: Path | None = None
    """Folder of another run whose verbalizers and teacher cache stage 2 uses: several students of one stage 1, to
    compare ways of training. Its models, data, seed and codec must be this recipe's. Left out: the run's own."""
    cache_from: Path | None = None
    """Folder of another run whose teacher verbalizers and teacher cache this run reads where they lie: one cache for
    several students (docs/one_cache.md). Stage 1 then trains the student's verbalizers alone and loads no teacher; of
    the teacher's folder it needs all but the weights. The teacher, its target layers, the data, its limits, the seed
    and the codec must be this recipe's; with vocabulary: mapped also the student's tokenizer and chat template. Left
    out: the run's own."""
    seed: int = 0
    """Seed of the run's random numbers: data order, initialisation, the cache's samples and the drawn matches."""
    preset: Literal["paper", "wrong_answers", "clean_answers", "few_updates"] = "paper"
    """How stage 2 trains: values for what nothing else sets (docs/evidence.md). After stage 1 another may be chosen.
    paper: the paper's order: interaction, then finetuning on the responses.
    wrong_answers: a part of the responses is wrong, as in scraped data: interaction to the end, no finetuning.
    clean_answers: the responses are right: interaction to the end with cross-entropy on the responses beside it.
    few_updates: too few to follow layers: the KL of the last layer alone, to the end."""
    vocabulary: Literal["shared", "mapped"] = "shared"
    """How the teacher's token ids become the student's.
    shared: they are the same. Tokenizers that give an id two meanings are an error. As in the paper.
    mapped: for two tokenizers. Only those response tokens are supervised that begin after the same text in both. A
    teacher's id becomes the student's id of the same text, or role; all others are one bucket, and the KL is taken over
    the mapped ids and the bucket. The cache is then for this student's tokenizer, with the codec sampled or topk. Not
    in the paper."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights and activations. The optimizer states are float32 in both cases."""
    deepspeed: Path = Path("ds_configs/zero3.json")
    """DeepSpeed config file (JSON) of the steps that name none. Values that the recipe sets, such as batch_size, must
    be "auto" there or absent. docs/choosing_for_gpus.md says which file is for what."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """How both models compute their attention, in all steps, in evaluate --run and in trace. This changes speed and
    memory, and the results only by rounding. Where it cannot be had, that is an error before anything is loaded.
    sdpa: torch's own kernels, on any device.
    flash_attention_2: the package flash-attn, on a GPU and in bf16.
    eager: plain matrix products, which hold a layer's whole attention matrix."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of the losses between a head's matrix products. The environment variable VLSI_KERNELS goes before it.
    auto: on a GPU the fused Triton kernel, after it has agreed with plain torch there; plain torch where it does not,
    or where Triton is not installed. All ranks use the same.
    torch: plain torch; slower on a GPU.
    triton: the Triton kernel, and an error where it cannot be used."""
    gradient_checkpointing: bool = False
    """Whether stage 2 recomputes the student's layers in the backward pass: less memory, more time. Paper: true."""
    log_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where else the lines of RUN/metrics.jsonl are shown while a step trains; [] for nowhere. Nothing leaves the
    machine unless a variable of the environment says so.
    tensorboard: RUN/tensorboard, with maps of the KL between layers and histograms of the matches.
    wandb: RUN/wandb, offline unless WANDB_MODE is set; the extra wandb.
    trackio: RUN/trackio, unless TRACKIO_DIR or TRACKIO_SPACE_ID is set; the extra trackio."""
    hang_minutes: Rate = 8.0
    """Minutes without progress, such as a micro-step, after which a rank counts as hanging: all ranks then end with an
    error that names it and where it stands. What takes long (hashing, loading, checkpoints) may take 10 times as long.
    Half a minute more than the longest micro-step is enough. No collective ends by itself before that."""
    report: bool = True
    """Whether RUN/report.html is written after each step, and when a step is stopped: a few seconds on rank 0. What
    goes wrong there is a warning. At any time: python -m pipeline report RUN."""
    train: Annotated[tuple[Part, ...], Field(min_length=1)] = ("decoder", "projector", "head")
    """Parts of the student that stage 2 trains. A step with LoRA trains its adapters on the decoder instead, and no
    part's own weights. Paper (section 3): the whole language model; of the vision tower it says nothing.
    decoder: the decoder layers, their final norm, and the embeddings of text.
    projector: what maps the vision tower's output into the decoder. Leave it out for data without images.
    vision: the vision tower.
    head: the language head. One that is tied to the embeddings trains where both decoder and head are named."""
    data: Data
    """The instruction data of all steps."""
    teacher: Model
    """The large model. It is never trained, and only stage 1 needs its folder."""
    student: Model
    """The small model, which stage 2 trains."""
    verbalizer: Verbalizer = Verbalizer()
    """The form of the verb-FFN, for both models."""
    verbalize: Verbalize
    """Stage 1a: trains the verbalizers of both models."""
    cache: Cache = Cache()
    """Stage 1b: writes the teacher's distributions to disk."""
    interact: Interact
    """Stage 2a: trains the student to follow the cached distributions."""
    reinforce: Reinforce
    """Stage 2b: finetunes the student on the responses."""
    export: Export = Export()
    """What is kept beside the trained student."""

    def trains(self, training: StudentTraining, part: Part) -> bool:
        """Whether a step trains a part's own weights: adapters take the place of all of them."""
        return not training.lora_rank and part in self.train

    def samples_of(self, step: str) -> Path:
        """The folder of shards, or its URL, that a step trains on or, for cache, is made for."""
        return getattr(getattr(self, step), "train", None) or self.data.train

    def own_folders(self) -> dict[str, Path]:
        """{step: its samples} of the steps that train on others than data.train."""
        return {step: self.samples_of(step) for step in STEPS if self.samples_of(step) != self.data.train}

    def deepspeed_of(self, section: Training | Cache) -> Path:
        """The DeepSpeed config file of a step, given its section."""
        return section.deepspeed or self.deepspeed

    @property
    def student_stage_1(self) -> Path:
        """The run whose stage 1 trained the student's verbalizers."""
        return self.stage_1 or self.run

    @property
    def teacher_stage_1(self) -> Path:
        """The run whose folder has the teacher's verbalizers and the cache."""
        return self.cache_from or self.stage_1 or self.run

    def left_to_another_run(self) -> dict[str, tuple[str, Path]]:
        """{step of stage 1 that another run has done: (the field that names that run, its folder)}."""
        found = dict.fromkeys(("verbalize", "cache"), ("stage_1", self.stage_1)) if self.stage_1 is not None else {}
        return found | ({"cache": ("cache_from", self.cache_from)} if self.cache_from is not None else {})


STEPS = ("verbalize", "cache", "interact", "reinforce")
"""The steps in running order. These names are also sections of the recipe and folders of the run."""
