"""Check a recipe against its files and the number of ranks. All problems are reported at once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.storage import is_file
from pipeline.errors import RecipeError
from pipeline.recipe.resolve import SHIPPED
from pipeline.recipe.schema import STEPS, Interact, Model, Recipe, Reinforce, StudentTraining, Training

# Each setting has one place. The recipe owns these, so a DeepSpeed config must say "auto" for them or leave them out.
OWNED_BY_RECIPE = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size / (micro_batch_size x ranks)",
    "gradient_clipping": "clip",
    "optimizer": "learning_rate, weight_decay",
    "scheduler": "learning_rate, final_learning_rate, warmup_steps",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
}


def check_recipe(recipe: Recipe, steps: Iterable[str], world: int = 1) -> None:
    """Raise RecipeError with all problems that would stop one of the given steps on `world` ranks."""
    asked = set(steps)
    needs_student = asked != {"cache"} or recipe.vocabulary == "mapped"  # the cache is for its tokenizer
    steps = [step for step in STEPS if step in asked and (step == "cache" or not _is_skipped(getattr(recipe, step)))]
    needs_teacher = {"verbalize", "cache"} & set(steps)
    problems = _data_problems(recipe, steps) + _other_run_problems(recipe, needs_teacher)
    problems += _held_out_problems(recipe, steps) + _logger_problems(recipe) if needs_student else []
    if recipe.cache_from is not None:
        steps = [step for step in steps if step != "cache"]
    problems += _model_problems(recipe.student, "student") if needs_student else []
    problems += _model_problems(recipe.teacher, "teacher") if needs_teacher else []
    problems += _vocabulary_problems(recipe)
    problems += _deepspeed_problems(recipe, steps)
    for step in steps:
        if step != "cache":
            problems += _training_problems(getattr(recipe, step), step, world)
    if "interact" in steps:
        problems += _view_problems(recipe) + _interact_problems(recipe.interact)
    problems += _train_problems(recipe, [step for step in steps if step in ("interact", "reinforce")])
    problems += _lora_problems(recipe, steps)
    if "reinforce" in steps:
        problems += _reinforce_problems(recipe.reinforce)
    asks_for_layers = "interact" in steps and recipe.interact.teacher_layers is not None
    both = needs_student and (needs_teacher or asks_for_layers)
    if not problems and both and not _is_skipped(recipe.interact):
        problems += _matching_problems(recipe)
    if problems:
        raise RecipeError(f"{len(problems)} problem(s) in the recipe:\n" + "\n".join(f"  {p}" for p in problems))


def number_of_layers(folder: Path) -> int:
    """Number of decoder layers of the language model in a Hugging Face folder, from its config.json.

    Raises RecipeError where the file is damaged or says no such number.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        layers = (config.get("text_config") or config)["num_hidden_layers"]
        if not isinstance(layers, int):
            raise TypeError(f"num_hidden_layers is {layers!r:.40}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecipeError(
            f"{path}: expected a Hugging Face config with num_hidden_layers, found {error!r}; copy the model again"
        ) from None
    return layers


def target_layers(model: Model) -> tuple[int, ...]:
    """Target layers of a model, counted from 1: the recipe's, or 2, 6, 10, ... below the last (paper, section 4)."""
    if model.layers is not None:
        return model.layers
    return tuple(range(2, number_of_layers(model.path), 4))


def load_deepspeed_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON config. Raises RecipeError if it is missing or not JSON."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"deepspeed: no file {path}; the shipped ones are in {SHIPPED / 'ds_configs'}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"deepspeed: {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"deepspeed: {path}: expected a JSON object, found {type(config).__name__}")
    return config


def accumulation(training: Training, world: int) -> int:
    """Micro-steps in an update without micro_batch_tokens: batch_size / (micro_batch_size x world).

    check_recipe checks that this is whole.
    """
    return training.batch_size // (training.micro_batch_size * world)


def number_of_steps(training: Training, samples: int) -> int:
    """Number of updates of a step: the recipe's steps, or the whole global batches in its epochs (at least 1)."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, int(training.epochs * samples) // training.batch_size)


def _is_skipped(training: Training) -> bool:
    return training.steps == 0


def _other_run_problems(recipe: Recipe, asked: set[str]) -> list[str]:
    """asked: the steps of stage 1 that are to run here."""
    if asked and recipe.stage_1 is not None:
        return [
            f"stage_1: {recipe.stage_1} has this run's verbalizers and cache, so {' and '.join(sorted(asked))} "
            "cannot run here: run stage 2 alone, or leave stage_1 out"
        ]
    if asked == {"cache"} and recipe.cache_from is not None:
        return [
            f"cache_from: {recipe.cache_from} has this run's cache, so there is none to make here: run the cache job "
            f"of {recipe.cache_from / 'recipe.yaml'}, or leave cache_from out"
        ]
    if recipe.cache.folder is not None and (other := recipe.left_to_another_run().get("cache")) is not None:
        return [
            f"cache.folder: {recipe.cache.folder} would never be used: this run's cache is that of {other[0]}, "
            f"{other[1]}, and read where that run's recipe says; leave cache.folder out"
        ]
    return []


def _data_problems(recipe: Recipe, steps: Iterable[str]) -> list[str]:
    data = recipe.data
    own = {f"{step}.train": folder for step, folder in recipe.own_folders().items() if step in steps}
    problems = [
        f"{field}: no {folder}/manifest.json; expected a shard folder: python -m data_prep shard --help says how to "
        "make one, python -m pipeline answer makes one of the teacher's answers"
        for field, folder in {"data.train": data.train, **own}.items()
        if not is_file(folder / "manifest.json")
    ]
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        problems.append(f"data.min_pixels: {data.min_pixels} is above data.max_pixels: {data.max_pixels}")
    return problems


def _logger_problems(recipe: Recipe) -> list[str]:
    """The loggers that the recipe names and that are not installed. The cache step uses none of the extras."""
    return [
        f"log_to: {name} is not installed: pip install -e '.[{name}]' in the checkout, or leave it out"
        for name in recipe.log_to
        if not _is_installed(name)
    ]


def _model_problems(model: Model, role: str) -> list[str]:
    if not (model.path / "config.json").is_file():
        return [f"{role}.path: no {model.path}/config.json; expected a Hugging Face folder"]
    depth, layers = number_of_layers(model.path), target_layers(model)
    if not layers:
        return [
            f"{role}.layers: no target layers; every 4th from 2 gives none in a model of {depth} layers, so name them"
        ]
    if list(layers) != sorted(set(layers)) or layers[-1] >= depth:
        return [
            f"{role}.layers: expected increasing layers from 1 to {depth - 1} (layer {depth} is the last: it uses "
            f"the model's own head and needs no verbalizer), found {list(layers)}"
        ]
    return []


def _matching_problems(recipe: Recipe) -> list[str]:
    student = target_layers(recipe.student)
    chosen = recipe.interact.teacher_layers
    if chosen is not None:
        return [] if len(chosen) > len(student) else [f"interact.teacher_layers: {_too_few(len(chosen), len(student))}"]
    teacher = target_layers(recipe.teacher)
    if len(teacher) > len(student):
        return []
    depth, wanted = number_of_layers(recipe.teacher.path), len(student) + 1
    spaced = sorted({max(1, round(i * (depth - 1) / wanted)) for i in range(1, wanted + 1)})
    advice = (
        f"for example teacher.layers: {spaced}"
        if len(spaced) == wanted
        else f"a teacher of {depth} layers has too few: name fewer student.layers"
    )
    return [f"teacher.layers: {_too_few(len(teacher), len(student))}; {advice}"]


def _too_few(teacher: int, student: int) -> str:
    return (
        f"{teacher} teacher targets for {student} student targets; there must be more, or each search range is a "
        "single layer and matching has no effect"
    )


def _view_problems(recipe: Recipe) -> list[str]:
    """Settings of stage 2 that no cache of this recipe can meet."""
    problems, codec, points = [], recipe.cache.codec, recipe.interact.points
    if points is not None and (codec.name != "sampled" or codec.points % points):
        has = f"cache.codec.points: {codec.points}" if codec.name == "sampled" else f"cache.codec.name: {codec.name}"
        problems.append(
            f"interact.points: {points} needs a sampled cache with a multiple of {points} points, found {has}"
        )
    chosen = recipe.interact.teacher_layers
    if chosen is not None and list(chosen) != sorted(set(chosen)):
        problems.append(f"interact.teacher_layers: expected increasing layers, found {list(chosen)}")
    return problems


def _vocabulary_problems(recipe: Recipe) -> list[str]:
    if recipe.vocabulary == "shared" or recipe.cache.codec.name != "hidden":
        return []
    return [
        "vocabulary: mapped needs cache.codec.name: sampled or topk, found hidden: it stores states that only the "
        "teacher's own head can read, over the teacher's ids"
    ]


def _train_problems(recipe: Recipe, steps: list[str]) -> list[str]:
    """Settings of what trains that contradict each other, or have no effect in any step of stage 2."""
    lora = [step for step in steps if getattr(recipe, step).lora_rank]
    problems = []
    if lora and "decoder" not in recipe.train:
        problems.append(
            f"train: {list(recipe.train)} leaves out the decoder, but {lora[0]}.lora_rank puts adapters on it; name "
            f"decoder too, or set {lora[0]}.lora_rank: 0"
        )
    for step in steps:
        if not getattr(recipe, step).lora_rank and (unused := _lora_settings(getattr(recipe, step))):
            problems.append(f"{step}.{unused[0]} is set, but {step}.lora_rank is 0: set it, or leave {unused[0]} out")
    if steps == ["interact", "reinforce"] and recipe.export.adapter and not lora:
        problems.append("export.adapter: no step has adapters; set interact.lora_rank or reinforce.lora_rank")
    return problems


def _lora_settings(training: StudentTraining) -> list[str]:
    """The fields of LoRA that are not at their defaults, where rank 0 gives them no meaning."""
    fields = ("lora_dropout", "lora_targets")
    return [name for name in fields if getattr(training, name) != type(training).model_fields[name].default]


def _interact_problems(interact: Interact) -> list[str]:
    problems = []
    if interact.temperature is not None and interact.matching != "adaptive":
        problems.append(
            f"interact.temperature: {interact.temperature} is that of the draw of matching: adaptive; "
            f"{interact.matching} has none"
        )
    weights = (interact.last_weight, interact.cross_entropy_weight, interact.deep_supervision_weight)
    if interact.matching == "last_only" and not any(weights):
        problems.append(
            "interact: nothing to train: matching is last_only, and last_weight, cross_entropy_weight and "
            "deep_supervision_weight are 0"
        )
    return problems


def _reinforce_problems(reinforce: Reinforce) -> list[str]:
    problems = []
    if reinforce.label_smoothing and reinforce.loss_power:
        problems.append("reinforce: expected one of label_smoothing and loss_power, found both")
    return problems


def _training_problems(training: Training, step: str, world: int) -> list[str]:
    problems = []
    if (training.steps is None) == (training.epochs is None):
        found = "neither" if training.steps is None else f"steps: {training.steps} and epochs: {training.epochs}"
        problems.append(f"{step}: expected one of steps and epochs, found {found}")
    if training.micro_batch_tokens is None and training.batch_size % (training.micro_batch_size * world):
        problems.append(
            f"{step}.batch_size: {training.batch_size} is no multiple of {step}.micro_batch_size x ranks = "
            f"{training.micro_batch_size} x {world} = {training.micro_batch_size * world}"
        )
    if training.final_learning_rate > training.learning_rate:
        problems.append(
            f"{step}.final_learning_rate: {training.final_learning_rate} is above "
            f"{step}.learning_rate: {training.learning_rate}"
        )
    if training.steps and training.warmup_steps >= training.steps:
        problems.append(f"{step}.warmup_steps: {training.warmup_steps} must be below {step}.steps: {training.steps}")
    return problems


def _held_out_problems(recipe: Recipe, steps: Iterable[str]) -> list[str]:
    """A folder that is missing would else be missed when all is trained."""
    folder, made = recipe.data.held_out, "as `python -m data_prep shard --held-out SHARE` makes"
    if folder is not None and not is_file(folder / "manifest.json"):
        return [
            f"data.held_out: no {folder}/manifest.json; expected a shard folder that no step trains on, {made}; "
            "or leave the field out: then nothing is evaluated"
        ]
    return [
        f"{step}.evaluate_every: {every} needs data.held_out: a shard folder that no step trains on, {made}"
        for step in steps
        if folder is None and (every := getattr(getattr(recipe, step), "evaluate_every", 0))
    ]


def _lora_problems(recipe: Recipe, steps: Iterable[str]) -> list[str]:
    """The steps that need peft, where it is not installed: else that would be found behind the whole of stage 1."""
    ranks = {
        step: getattr(getattr(recipe, step), "lora_rank", 0) for step in ("interact", "reinforce") if step in steps
    }
    if not any(ranks.values()) or _is_installed("peft"):
        return []
    return [
        f"{step}.lora_rank: {rank} needs the package peft: pip install -e '.[lora]' in the checkout; "
        "0 trains all weights"
        for step, rank in ranks.items()
        if rank
    ]


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)  # not find_spec: a folder of its name would do for a module
    except metadata.PackageNotFoundError:
        return False
    return True


def _deepspeed_problems(recipe: Recipe, steps: Iterable[str]) -> list[str]:
    """The problems of the files that the steps use: once a file, though several steps may use it."""
    uses: dict[Path, list[str]] = {}
    for step in steps:
        uses.setdefault(recipe.deepspeed_of(getattr(recipe, step)), []).append(step)
    problems = []
    for path, users in uses.items():
        try:
            config = load_deepspeed_config(path)
        except RecipeError as error:
            problems.append(str(error))
        else:
            problems += _owned_twice(config, path) + _lost_in_bfloat16(config, path, recipe.precision, users)
            problems += _offloaded_below_stage_3(config, path)
    return problems


def _offloaded_below_stage_3(config: dict[str, Any], path: Path) -> list[str]:
    """There some gradients lie on the CPU and others on the GPU, and clipping adds their norms."""
    settings = config.get("zero_optimization", {})
    if settings.get("stage", 0) == 3 or (settings.get("offload_optimizer") or {}).get("device", "none") == "none":
        return []
    return [
        f"{path} has offload_optimizer under ZeRO stage {settings.get('stage', 0)}; expected it under stage 3: use "
        "ds_configs/zero3_offload_optimizer.json"
    ]


def _lost_in_bfloat16(config: dict[str, Any], path: Path, precision: str, users: list[str]) -> list[str]:
    """DeepSpeed's plain data parallelism sums bfloat16 gradients in bfloat16, and refuses to do it in float32."""
    training = [step for step in users if step != "cache"]
    stage = config.get("zero_optimization", {}).get("stage", 0)
    as_chosen = config.get("data_types", {}).get("grad_accum_dtype") == "bf16"
    if precision != "bf16" or stage or as_chosen or not training:
        return []
    return [
        f"{path} (for {', '.join(training)}) has ZeRO stage 0, under which DeepSpeed cannot sum the gradients of "
        "precision: bf16 in float32; use ds_configs/zero1.json, which does, or precision: fp32"
    ]


def _owned_twice(config: dict[str, Any], path: Path) -> list[str]:
    problems = []
    for key, owner in OWNED_BY_RECIPE.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, "auto"):
            problems.append(
                f"{key} is {value!r} in {path}, but the recipe owns it ({owner}): "
                f'write "auto" in {path} and set it in the recipe'
            )
    return problems
