"""Measure a finished folder the way a user meets it: loaded from disk, through its processor, greedy generation."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from data_prep.puzzles import puzzle
from demo.plans import PUZZLE_LEVELS
from pipeline.vlm.processing import load_processor

Question = tuple[Image.Image, str, str]
"""A picture, what is asked of it, the right answer."""

SAMPLES = {"puzzles": 600, "puzzles-deep": 600, "easy-vqa": 2000}
"""Held-out questions that a model card's number rests on; easy-VQA: the first of its test split."""


def measure(folder: Path, pair: str) -> float:
    """Exact match on the pair's held-out questions."""
    return exact_match(folder, islice(held_out(pair), SAMPLES[pair]))


def held_out(pair: str) -> Iterator[Question]:
    """Go through the held-out questions of a pair. Puzzles never end."""
    return _easy_vqa() if pair == "easy-vqa" else _puzzles(PUZZLE_LEVELS[pair])


@torch.inference_mode()
def exact_match(folder: Path, questions: Iterator[Question], batch: int = 64) -> float:
    """Share of questions whose whole generated answer is the right one, in float32."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = load_processor(folder)
    processor.tokenizer.padding_side = "left"
    right = total = 0
    while chunk := list(islice(questions, batch)):
        pictures, asked, answers = zip(*chunk, strict=True)
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in asked]
        texts = [processor.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        inputs = processor(text=texts, images=[[p] for p in pictures], padding=True, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        given = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        right += sum(g == a for g, a in zip(given, answers, strict=True))
        total += len(chunk)
    return right / total


def _puzzles(level: str) -> Iterator[Question]:
    index = 0
    while True:
        made = puzzle(0, index, "held_out", level=level)
        yield Image.open(io.BytesIO(made.image)), made.question, made.answer
        index += 1


def _easy_vqa() -> Iterator[Question]:
    import easy_vqa  # an extra: needed for this pair only

    paths = easy_vqa.get_test_image_paths()
    for question, answer, image in zip(*easy_vqa.get_test_questions(), strict=True):
        with Image.open(paths[image]) as picture:
            yield picture.convert("RGB"), question, answer
