"""A Hugging Face VLM on the best device at hand, and what it says when it always takes the likeliest token.

B prompts, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, LogitsProcessorList

from pipeline.errors import RecipeError
from pipeline.recipe.schema import Data
from pipeline.vlm.assemble import chat_encoder
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.processing import TOKEN_KEYS, ChatEncoder, Encoded, collate


@dataclass(frozen=True)
class Vlm:
    """A model that can be asked, and what turns chats into its inputs."""

    model: Any
    encoder: ChatEncoder
    device: torch.device
    dtype: torch.dtype

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.encoder.processor.tokenizer

    @property
    def pad_id(self) -> int:
        """What fills rows up: the padding token, or the end-of-text token where there is none."""
        tokenizer = self.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: those of generation_config.json and the tokenizer's own."""
        configured = self.model.generation_config.eos_token_id
        ids = set(configured if isinstance(configured, list) else [configured]) | {self.tokenizer.eos_token_id}
        return sorted(ids - {None})

    def placeholder_ids(self) -> list[int]:
        """Tokens that stand for images and videos: a model that said one could not read its own answer."""
        names = ("image_token_id", "video_token_id")
        return [token for name in names if (token := getattr(self.encoder.processor, name, None)) is not None]


def load(folder: Path, data: Data) -> Vlm:
    """Load a Hugging Face folder for reading, under a recipe's limits on data. Raises RecipeError if it is none."""
    require_model(folder)
    device, dtype = placement(folder)
    model = load_vlm(folder, dtype).to(device).eval()
    encoder = chat_encoder(folder, data)
    encoder.check()
    return Vlm(model, encoder, device, dtype)


def require_model(folder: Path) -> None:
    """Raise RecipeError if there is no model in the folder; nothing is ever fetched by name."""
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"no model in {folder}: expected a Hugging Face folder with config.json, weights and a processor"
        )


def placement(folder: Path) -> tuple[torch.device, torch.dtype]:
    """Where and in which number format to run: float32 on a CPU; on a GPU what config.json says, else bfloat16."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    return torch.device("cuda"), AutoConfig.from_pretrained(folder).dtype or torch.bfloat16


def move(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Model inputs on a device, floating point ones in the model's number format."""
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def pad_left(prompts: Sequence[Mapping[str, Tensor]], filler: Encoded, pad_id: int) -> dict[str, Tensor]:
    """Prompts side by side as [B, S], padded on the left, so that all of them end where an answer begins."""
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    without_response = [
        Encoded("", dict(prompt), torch.zeros(length, dtype=torch.bool))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    padded = collate(without_response, filler, pad_id).inputs
    width = padded["input_ids"].shape[1]
    inputs = {name: value for name, value in padded.items() if any(name in prompt for prompt in prompts)}
    for name in set(inputs) & set(TOKEN_KEYS):  # padding moves from the end to the front; a filler row goes
        rows = zip(padded[name], lengths, strict=False)
        inputs[name] = torch.stack([row.roll(width - length) for row, length in rows])
    return inputs


@torch.inference_mode()
def greedy(
    vlm: Vlm, inputs: Mapping[str, Tensor], max_new_tokens: int, processors: LogitsProcessorList | None = None
) -> list[list[int]]:
    """Continue left-padded prompts; each row's new tokens up to its end-of-turn token, that included.

    processors may put other logits in place of the model's own.
    """
    stops, original = vlm.stop_ids(), vlm.model.generation_config
    greedy_config = GenerationConfig(
        eos_token_id=stops, pad_token_id=vlm.pad_id, do_sample=False, max_new_tokens=max_new_tokens
    )
    # A folder's own generation settings (a repetition penalty, sampling) would otherwise fill what is left unset.
    vlm.model.generation_config = greedy_config
    try:
        output = vlm.model.generate(**move(inputs, vlm.device, vlm.dtype), logits_processor=processors)
    finally:
        vlm.model.generation_config = original
    return [_truncate_at_stop(row, stops) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def decode_text(vlm: Vlm, ids: Sequence[int]) -> str:
    """Tokens as text, control tokens left out."""
    return vlm.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _truncate_at_stop(row: list[int], stops: list[int]) -> list[int]:
    stop_indices = [index for index, token in enumerate(row) if token in stops]
    return row[: stop_indices[0] + 1] if stop_indices else row
