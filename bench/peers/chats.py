"""What a user of transformers' Trainer writes to train on chats with pictures: the data, and a collator.

Counted among the lines of both peers. The shards are read by Hugging Face's datasets, as anyone's WebDataset would be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset

IGNORED = -100


def read(shards: Path) -> Dataset:
    """The samples of a folder of tar files, pictures decoded."""
    return load_dataset("webdataset", data_files=str(shards / "*.tar"), split="train", cache_dir=str(shards / "hf"))


class Collator:
    """Chats of one picture and one answer -> padded inputs; labels are the answer's tokens and its end of turn."""

    def __init__(self, processor: Any):
        self.processor = processor
        processor.tokenizer.padding_side = "right"

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """B samples as one batch: input_ids and labels [B, S]."""
        chats = [sample["json"]["messages"] for sample in samples]
        images = [sample["0.png"].convert("RGB") for sample in samples]
        template = self.processor.apply_chat_template
        texts = [template(chat, tokenize=False).rstrip("\n") for chat in chats]
        prompts = [template(chat[:-1], tokenize=False, add_generation_prompt=True) for chat in chats]
        batch = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        for row, prompt, image in zip(labels, prompts, images, strict=True):
            row[: self.processor(images=[image], text=[prompt], return_tensors="pt")["input_ids"].shape[1]] = IGNORED
        return {**batch, "labels": labels}
