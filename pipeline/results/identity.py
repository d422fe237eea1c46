"""What a model's answers on some data depend on, as flat {name: fingerprint or setting}."""

from __future__ import annotations

from pathlib import Path

from data_prep.shards import ShardFolder, data_fingerprint
from pipeline.cache.fingerprint import json_fingerprint, sample_fingerprints, teacher_fingerprints
from pipeline.recipe.schema import Data
from pipeline.results.generate import run_dtype
from pipeline.vlm.chat_template import ChatTemplate
from pipeline.vlm.processing import load_processor


def model_identity(folder: Path) -> dict[str, str]:
    """What a model answers with: weights, config, tokenizer, processor, chat template, end of turn and dtype.

    Where the template thinks, also that the thinking is left out of answers: earlier versions kept it. Weights are
    hashed, and their hashes remembered. Raises CacheError where the folder has no safetensors weights or no
    tokenizer.
    """
    generation, processor = folder / "generation_config.json", load_processor(folder)
    template = ChatTemplate(processor)
    return {
        **teacher_fingerprints(folder, str(processor.chat_template)),
        **template.fingerprint_of_bos(),
        **({"thinking": "left out"} if template.thinks() else {}),
        "end_of_turn": json_fingerprint([generation] if generation.is_file() else []),
        "dtype": str(run_dtype(folder)).removeprefix("torch."),
    }


def question_identity(data: ShardFolder, limits: Data, max_new_tokens: int) -> dict[str, str]:
    """What is asked, and how long an answer may be. Not the batch size: it changes rounding errors only."""
    return {
        **sample_fingerprints(limits.max_length, limits.min_pixels, limits.max_pixels),
        "data": data_fingerprint(data.manifest),
        "max_new_tokens": str(max_new_tokens),
    }
