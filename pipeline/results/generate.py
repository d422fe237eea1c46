"""Load a Hugging Face VLM on the available devices, and generate greedily.

B prompts, S tokens of the longest prompt, T new tokens of the longest answer, V rows of the language head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline.errors import RecipeError, SampleError
from pipeline.recipe.schema import Data, ModelParts
from pipeline.vlm.assemble import chat_encoder
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.chat_template import Message
from pipeline.vlm.config import read_config
from pipeline.vlm.parts import text_config
from pipeline.vlm.placement import Devices, device_map
from pipeline.vlm.probe import check_parts
from pipeline.vlm.processing import TOKEN_KEYS, ChatEncoder, Encoded, collate


@dataclass(frozen=True)
class Vlm:
    """A loaded model and the encoder that turns chats into its inputs."""

    model: Any
    encoder: ChatEncoder
    device: torch.device
    """Where inputs go; of a model on several devices, that of its embedding."""
    dtype: torch.dtype

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.encoder.processor.tokenizer

    @property
    def pad_id(self) -> int:
        """Id that fills up short rows: the padding token, or the end-of-text token if there is no padding token."""
        tokenizer = self.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: those of generation_config.json, the tokenizer's own, and the chat template's."""
        configured = self.model.generation_config.eos_token_id
        ids = set(configured if isinstance(configured, list) else [configured])
        return sorted((ids | {self.tokenizer.eos_token_id, self._end_of_turn}) - {None})

    @cached_property
    def _end_of_turn(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.encoder.template.end_of_turn())

    def placeholder_ids(self) -> list[int]:
        """Placeholder ids of images and videos. They must not be generated: the model could not read its own answer."""
        names = ("image_token_id", "video_token_id")
        return [token for name in names if (token := getattr(self.encoder.processor, name, None)) is not None]

    def encode_question(self, messages: Sequence[Message], images: Sequence[bytes]) -> dict[str, Tensor]:
        """Model inputs that end where the answer begins. Raises SampleError if max_length leaves it no room."""
        prompt = self.encoder.prompt(messages, images)
        length, longest = prompt["input_ids"].shape[1], self.encoder.max_length
        if length >= longest:
            raise SampleError(f"the question takes {length} tokens, and max_length is {longest}")
        return prompt


def load(
    folder: Path,
    data: Data,
    devices: Devices = (),
    attention: str = "sdpa",
    parts: ModelParts | None = None,
) -> Vlm:
    """Load a Hugging Face folder for inference onto devices, under a recipe's limits on data and with its attention.

    Without devices onto the CPU. parts: those that the recipe names. Raises RecipeError if the folder has no model, the
    devices have no room for it, its attention cannot be had here, or a part of it is not what it was taken for.
    """
    require_model(folder)
    encoder = chat_encoder(folder, data)
    encoder.check()
    dtype = run_dtype(folder) if devices else torch.float32
    model: Any = load_vlm(folder, dtype, attention, placement(folder, dtype, devices, parts), parts).eval()
    device = model.get_input_embeddings().weight.device
    check_parts(model, encoder, (), device, dtype)
    return Vlm(model, encoder, device, dtype)


def require_model(folder: Path) -> None:
    """Raise RecipeError if there is no model in the folder. Nothing is ever downloaded by name."""
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"no model in {folder}: expected a Hugging Face folder with config.json, weights and a processor"
        )


def run_dtype(folder: Path) -> torch.dtype:
    """Dtype to run in: float32 on a CPU; on a GPU the dtype of config.json, else bfloat16."""
    if not torch.cuda.is_available():
        return torch.float32
    return read_config(folder).dtype or torch.bfloat16


def placement(
    folder: Path, dtype: torch.dtype, devices: Devices, parts: ModelParts | None = None
) -> dict[str, int] | None:
    """Device map of a model on these devices; None on the CPU. parts: those that the recipe names.

    Raises RecipeError where they have no room for it.
    """
    if not devices:
        return None
    torch.cuda.set_device(devices[0])
    if len(devices) == 1:
        return {"": devices[0]}
    return device_map(folder, dtype, {device: torch.cuda.mem_get_info(device)[0] for device in devices}, parts)


def move(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Move model inputs to a device; floating-point inputs also get the model's dtype."""
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def pad_left(prompts: Sequence[Mapping[str, Tensor]], filler: Encoded, pad_id: int) -> dict[str, Tensor]:
    """Batch prompts as [B, S], padded on the left, so that all end where the answer begins."""
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    without_response = [
        Encoded("", dict(prompt), torch.zeros(length, dtype=torch.bool))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    padded = collate(without_response, filler, pad_id).inputs
    width = padded["input_ids"].shape[1]
    inputs = {name: value for name, value in padded.items() if any(name in prompt for prompt in prompts)}
    for name in set(inputs) & set(TOKEN_KEYS):  # move the padding to the front; drop the filler row
        rows = zip(padded[name], lengths, strict=False)
        inputs[name] = torch.stack([row.roll(width - length) for row, length in rows])
    return inputs


@torch.inference_mode()
def greedy(
    vlm: Vlm, inputs: Mapping[str, Tensor], max_new_tokens: int, processors: LogitsProcessorList | None = None
) -> list[list[int]]:
    """Continue left-padded prompts greedily; the new ids of each row, up to and including its end-of-turn token.

    `processors` may replace the model's logits.
    """
    stops, original = vlm.stop_ids(), vlm.model.generation_config
    greedy_config = GenerationConfig(
        eos_token_id=stops, pad_token_id=vlm.pad_id, do_sample=False, max_new_tokens=max_new_tokens
    )
    # generate() fills unset values from the model's own settings (a repetition penalty, sampling): replace them all.
    vlm.model.generation_config = greedy_config
    try:
        output = vlm.model.generate(**move(inputs, vlm.device, vlm.dtype), logits_processor=processors)
    finally:
        vlm.model.generation_config = original
    return [_truncate_at_stop(row, stops) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


@dataclass(frozen=True)
class Generated:
    """A greedy answer and the model's probability of it."""

    ids: list[int]
    """[T] up to and including the end-of-turn token, if it was reached."""
    log_prob: float
    """Natural log of the probability of all ids: the sum over tokens of log_softmax(logits)[id], in float32."""
    ended: bool
    """Whether the last id ends the turn."""


def greedy_with_log_probs(
    vlm: Vlm, inputs: Mapping[str, Tensor], max_new_tokens: int, banned_ids: Sequence[int] = ()
) -> list[Generated]:
    """As `greedy`, with each answer's log-probability. Ids that are banned are not generated.

    Probabilities are those of the model itself, of which banned ids have their share.
    """
    scorer, stops = _GreedyScores(banned_ids), vlm.stop_ids()
    rows = greedy(vlm, inputs, max_new_tokens, LogitsProcessorList([scorer]))
    log_probs_BT = torch.stack(scorer.log_probs, 1).double().cpu()
    return [
        Generated(ids, float(log_probs[: len(ids)].sum()), ids[-1] in stops)
        for ids, log_probs in zip(rows, log_probs_BT, strict=True)
    ]


class _GreedyScores(LogitsProcessor):
    """Logits processor that bans ids and keeps the log-probability of the ids that greedy decoding takes."""

    def __init__(self, banned_ids: Sequence[int]):
        self.banned_ids = list(banned_ids)
        self.log_probs: list[Tensor] = []
        """[B] for each of the T tokens; also of rows that have ended already."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores.float()
        allowed_BV = logits_BV.clone()
        allowed_BV[:, self.banned_ids] = float("-inf")
        self.log_probs.append(allowed_BV.amax(-1) - logits_BV.logsumexp(-1))
        return allowed_BV


def unwritable_ids(vlm: Vlm) -> list[int]:
    """Ids that no answer may hold: the placeholders, and rows of the language head that are no token."""
    tokens = set(vlm.tokenizer.get_vocab().values()) - set(vlm.placeholder_ids())
    return [row for row in range(int(text_config(vlm.model).vocab_size)) if row not in tokens]


def decode_text(vlm: Vlm, ids: Sequence[int]) -> str:
    """Decode ids to an answer's text, without special tokens and a thinking block of the chat template's."""
    return vlm.encoder.template.answer_in(vlm.tokenizer.decode(list(ids), skip_special_tokens=True).strip())


def _truncate_at_stop(row: list[int], stops: list[int]) -> list[int]:
    stop_indices = [index for index, token in enumerate(row) if token in stops]
    return row[: stop_indices[0] + 1] if stop_indices else row
