"""Pairs of models that bench.steps measures (the demo's, and random weights of larger shapes), with their data.

Random weights cost the same as trained ones, with one exception: their distributions would be nearly flat, and a flat
distribution takes more bytes. So the gain of the final norm is set for an entropy of about 3 nat, as of a language
model.
"""

from __future__ import annotations

import io
import json
import math
import random
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2VLConfig

from data_prep.shards import FORMAT, shard_name, write_manifest, write_shard
from demo.vocabulary import IMAGE_SETTINGS, MERGE, WORDS, build_tokenizer, write_processor
from pipeline.recipe.resolve import load_recipe
from pipeline.vlm.parts import final_norm

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"fp32": ROOT / "ds_configs" / "zero0.json", "bf16": ROOT / "ds_configs" / "zero2.json"}
"""DeepSpeed configs. One rank has nothing to shard, so each is the simplest one that trains its precision.

ZeRO-3 would add hooks to both sides of a ratio.
"""

LOGIT_SPREAD = 4.2
"""Standard deviation of the logits. V normal logits with spread s have an entropy of about ln V - s^2 / 2."""
WEIGHT_SPREAD = 0.02
"""Standard deviation of transformers' initial weights."""


@dataclass(frozen=True)
class Size:
    """Size of a Qwen2-VL model."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    rows: int = 151_936
    """Rows of the language head, including the vocabulary's padding."""
    tied: bool = True


@dataclass(frozen=True)
class Tower:
    """Size of the image encoder of both models."""

    blocks: int
    width: int
    heads: int
    patch: int
    """Pixels along a patch's side."""


@dataclass(frozen=True)
class Pair:
    """A teacher, a student, and the shape of their data."""

    teacher: Size
    student: Size
    tower: Tower
    teacher_layers: tuple[int, ...]
    student_layers: tuple[int, ...]
    precision: str
    image_side: int
    """Image tokens along one side; an image has the square of this number."""
    words: tuple[int, int]
    """Minimum and maximum number of response tokens, without the end-of-turn token."""
    micro_batch: int
    samples: int
    cache_tokens: int
    """Tokens of one forward of the cache job, including padding."""


QWEN_HALF = Size(layers=24, width=896, inner=4864, heads=14, kv_heads=2)
QWEN_2B = Size(layers=28, width=1536, inner=8960, heads=12, kv_heads=2)
QWEN_7B = Size(layers=28, width=3584, inner=18944, heads=28, kv_heads=4, rows=152_064, tied=False)


def _real(teacher: Size, student: Size) -> Pair:
    """Images of 1,225 tokens, answers of 100 to 200. The teacher must have more target layers than the student."""
    return Pair(
        teacher=teacher,
        student=student,
        tower=Tower(blocks=32, width=1280, heads=16, patch=14),
        teacher_layers=tuple(range(2, teacher.layers, 2)),
        student_layers=tuple(range(2, student.layers, 4)),
        precision="bf16",
        image_side=35,
        words=(100, 200),
        micro_batch=4,
        samples=64,
        cache_tokens=16384,
    )


RANDOM_PAIRS = {
    "small": Pair(
        teacher=Size(layers=10, width=768, inner=3072, heads=12, kv_heads=2),
        student=Size(layers=6, width=512, inner=2048, heads=8, kv_heads=2),
        tower=Tower(blocks=2, width=128, heads=2, patch=8),
        teacher_layers=(2, 4, 6, 8),
        student_layers=(2, 4),
        precision="fp32",
        image_side=16,
        words=(24, 36),
        micro_batch=2,
        samples=4,
        cache_tokens=640,
    ),
    "real-0.5b": _real(teacher=QWEN_2B, student=QWEN_HALF),
    "real-2b": _real(teacher=QWEN_7B, student=QWEN_2B),
}
RANDOM_PAIRS["real-0.5b-cpu"] = replace(
    RANDOM_PAIRS["real-0.5b"],
    tower=Tower(blocks=8, width=1280, heads=16, patch=14),
    image_side=32,
    micro_batch=1,
    samples=1,
)
"""One sample of 1,024 image tokens: what a CPU can measure in minutes.

Its image encoder has a quarter of a real one's blocks, which reduces both sides of each ratio and makes the goals
harder.
"""
RANDOM_PAIRS["tiny"] = replace(
    RANDOM_PAIRS["small"],
    teacher=Size(layers=4, width=64, inner=128, heads=4, kv_heads=2, rows=1024),
    student=Size(layers=3, width=48, inner=96, heads=3, kv_heads=3, rows=1024),
    tower=Tower(blocks=1, width=32, heads=2, patch=14),
    teacher_layers=(1, 2, 3),
    student_layers=(1, 2),
    precision="bf16",
    image_side=4,
    words=(4, 8),
    micro_batch=4,
    samples=8,
)
"""For the code's sake: its figures mean nothing."""
DEMO_SAMPLES, DEMO_BATCH = 192, 16


def prepare(name: str, folder: Path, device: str) -> dict[str, Any]:
    """Write models, data and folder/recipe.yaml; returns a description of the pair for the results."""
    if name == "demo":
        return _prepare_demo(folder)
    pair = RANDOM_PAIRS[name]
    for role, size in (("teacher", pair.teacher), ("student", pair.student)):
        _write_model(folder / role, size, pair, device)
    _write_data(folder / "data", pair)
    training = {"steps": 2, "batch_size": pair.micro_batch, "micro_batch_size": pair.micro_batch, "learning_rate": 1e-4}
    models = {
        role: {"path": str(folder / role), "layers": list(layers)}
        for role, layers in (("teacher", pair.teacher_layers), ("student", pair.student_layers))
    }
    recipe = {
        "run": str(folder / "run"),
        "precision": pair.precision,
        "report": False,
        "deepspeed": str(CONFIGS[pair.precision]),
        "data": {"train": str(folder / "data"), "workers": 0},
        "cache": {"batch_tokens": pair.cache_tokens},
        **models,
        **{step: dict(training) for step in ("verbalize", "interact", "reinforce")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return asdict(pair)


def _prepare_demo(folder: Path) -> dict[str, Any]:
    """The shipped puzzle models as in the demo's recipe, but on one rank, with one micro-batch per update."""
    shard = ["shard", "--source", "puzzles", "--count", str(DEMO_SAMPLES), "--held-out-count", "16"]
    command = [sys.executable, "-m", "data_prep", *shard, "--samples-per-shard", "64", "--output", str(folder / "data")]
    subprocess.run(command, check=True, capture_output=True)
    changes = {
        "run": folder / "run",
        "deepspeed": CONFIGS["fp32"],
        "data.train": folder / "data" / "train",
        "verbalize.steps": 2,
    }
    changes |= {f"{step}.batch_size": DEMO_BATCH for step in ("verbalize", "interact", "reinforce")}
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", [f"{key}={value}" for key, value in changes.items()])
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
    return {"recipe": "recipes/demo.yaml", "samples": DEMO_SAMPLES, "micro_batch": DEMO_BATCH, "precision": "fp32"}


def _write_model(folder: Path, size: Size, pair: Pair, device: str) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if pair.precision == "bf16" else torch.float32
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(_config(size, pair.tower), dtype=dtype)
    torch.nn.init.constant_(final_norm(model).weight, LOGIT_SPREAD / (WEIGHT_SPREAD * math.sqrt(size.width)))
    model.save_pretrained(folder)
    write_processor(folder)
    pixels = (pair.image_side * MERGE * pair.tower.patch) ** 2
    images = {"patch_size": pair.tower.patch, "size": {"shortest_edge": 16 * 16, "longest_edge": pixels}}
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_SETTINGS | images), "utf-8")


def _config(size: Size, tower: Tower) -> Qwen2VLConfig:
    tokenizer = build_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    pairs = size.width // size.heads // 2
    rows = (pairs - pairs // 4) // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [pairs // 4, rows, pairs - pairs // 4 - rows]}
    text = {
        "vocab_size": size.rows,
        "hidden_size": size.width,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "initializer_range": WEIGHT_SPREAD,
        "tie_word_embeddings": size.tied,
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "rope_parameters": rope,
    }
    vision = {
        "depth": tower.blocks,
        "embed_dim": tower.width,
        "hidden_size": size.width,
        "num_heads": tower.heads,
        "patch_size": tower.patch,
        "spatial_merge_size": MERGE,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=size.tied,
    )


def _write_data(folder: Path, pair: Pair) -> None:
    """Write one shard of chats: a noise image, a question, and random words as the answer."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    pixels = pair.image_side * MERGE * pair.tower.patch
    samples = []
    for index in range(pair.samples):
        answer = " ".join(draw.choices(WORDS, k=draw.randint(*pair.words)))
        question = [{"type": "image"}, {"type": "text", "text": "what is the color of the shape"}]
        record = {
            "id": f"sample {index}",
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            "provenance": {"source": "bench", "index": index},
        }
        picture = io.BytesIO()
        Image.effect_noise((pixels, pixels), 60).convert("RGB").save(picture, "JPEG")
        samples.append((f"s{index:05d}", {"json": json.dumps(record).encode(), "0.jpg": picture.getvalue()}))
    entries = [write_shard(folder / shard_name(0), samples)]
    write_manifest(folder, entries, format=FORMAT, version=1, split="train")
