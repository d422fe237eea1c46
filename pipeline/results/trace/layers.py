"""What each target layer says, through its verbalizer, about one question (paper, Figure 3).

L target layers and the last one, T tokens of an answer, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from pipeline.results.generate import Vlm, decode_text, greedy, move
from pipeline.signal import Unembedding
from pipeline.vlm.backbone import run_backbone
from pipeline.vlm.families import decoder_layers, final_norm
from pipeline.vlm.processing import TOKEN_KEYS
from pipeline.vlm.verbalizer import VerbalizedVLM


@dataclass(frozen=True)
class TokenPrediction:
    """The likeliest next token of a verbalized distribution."""

    token: int
    text: str
    probability: float
    ends: bool
    """Whether it ends the turn."""


@dataclass(frozen=True)
class LayerTrace:
    """What one layer says."""

    layer: int
    """Counted from 1; the deepest is the model's last, which speaks through the model's own head."""
    along: tuple[TokenPrediction, ...]
    """[T] its next token at each position of the model's own final answer, that answer given."""
    free: tuple[TokenPrediction, ...]
    """Its own greedy answer, its own tokens given, up to its end of turn."""
    text: str
    """That answer's words."""


@dataclass(frozen=True)
class ModelTrace:
    """All target layers of one model, the last layer last."""

    name: str
    layers: tuple[LayerTrace, ...]

    @property
    def answer(self) -> tuple[TokenPrediction, ...]:
        """The model's own final answer, end-of-turn token included."""
        return self.layers[-1].free


def trace(name: str, vlm: Vlm, side: VerbalizedVLM, prompt: Mapping[str, Tensor], max_new_tokens: int) -> ModelTrace:
    """Let every layer answer a prompt by itself, then read all layers along the last one's answer.

    One generation for each layer, over the model's own key-value cache; one more forward to read along.
    """
    free = {layer: generate_from_layer(vlm, side, prompt, layer, max_new_tokens) for layer in side.all_layers()}
    answer = [prediction.token for prediction in free[side.depth]]
    along = predict_along(vlm, side, prompt, answer)
    return ModelTrace(
        name,
        tuple(
            LayerTrace(layer, predictions, free[layer], decode_text(vlm, [one.token for one in free[layer]]))
            for layer, predictions in zip(side.all_layers(), along, strict=True)
        ),
    )


@torch.inference_mode()
def predict_along(
    vlm: Vlm, side: VerbalizedVLM, prompt: Mapping[str, Tensor], answer: Sequence[int]
) -> list[tuple[TokenPrediction, ...]]:
    """Each layer's likeliest token where each of the answer's T tokens is predicted, the answer itself given."""
    inputs = move(_append_answer(prompt, answer), vlm.device, vlm.dtype)
    begin = prompt["input_ids"].shape[1] - 1
    positions = torch.arange(begin, begin + len(answer), device=vlm.device)
    hidden = run_backbone(vlm.model, inputs, side.all_layers(), positions)
    tokens, probabilities = side.head(_top1, side.verbalize_states(hidden))
    return [
        tuple(_prediction(vlm, token, p) for token, p in zip(*row, strict=True))
        for row in zip(tokens.tolist(), probabilities.tolist(), strict=True)
    ]


def generate_from_layer(
    vlm: Vlm, side: VerbalizedVLM, prompt: Mapping[str, Tensor], layer: int, max_new_tokens: int
) -> tuple[TokenPrediction, ...]:
    """One layer's greedy answer: in generation, its verbalized logits stand in for the model's own."""
    processor = _LayerGeneration(side, layer, vlm.placeholder_ids())
    try:
        (ids,) = greedy(vlm, prompt, max_new_tokens, LogitsProcessorList([processor]))
    finally:
        processor.close()
    return tuple(_prediction(vlm, token, p) for token, p in zip(ids, processor.probabilities, strict=True))


class _LayerGeneration(LogitsProcessor):
    """Hears a decoder layer while the model generates, and speaks in its place."""

    def __init__(self, side: VerbalizedVLM, layer: int, banned_ids: list[int]):
        self.side, self.layer, self.banned_ids = side, layer, banned_ids
        self.probabilities: list[float] = []
        self._hook = decoder_layers(side.backbone)[layer - 1].register_forward_hook(self._store_hidden)

    def _store_hidden(self, _module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._hidden = hidden[:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        side, hidden = self.side, self._hidden
        verbalized = hidden if self.layer == side.depth else side.verb_ffns[str(self.layer)](hidden)
        logits = side.head(_logits, final_norm(side.backbone)(verbalized))
        probabilities = logits.softmax(-1)
        logits[:, self.banned_ids] = float("-inf")
        self.probabilities.append(float(probabilities[0, logits[0].argmax()]))
        padding_rows = scores.shape[-1] - logits.shape[-1]  # rows that only pad the vocabulary are never said
        return torch.nn.functional.pad(logits, (0, padding_rows), value=float("-inf"))

    def close(self) -> None:
        self._hook.remove()


def _logits(verbalized: Tensor, unembedding: Unembedding) -> Tensor:
    return unembedding.logits(verbalized)


def _top1(verbalized: Tensor, unembedding: Unembedding) -> tuple[Tensor, Tensor]:
    """[L + 1, T, d] -> tokens and probabilities, each [L + 1, T]; logits of one layer at a time."""
    best = [unembedding.logits(layer).softmax(-1).max(-1) for layer in verbalized]
    return torch.stack([b.indices for b in best]), torch.stack([b.values for b in best])


def _append_answer(prompt: Mapping[str, Tensor], answer: Sequence[int]) -> dict[str, Tensor]:
    """The prompt with an answer's tokens after it."""
    ids = torch.tensor([list(answer)])
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        name: torch.cat([value, more.get(name, torch.zeros_like(ids))], 1) if name in TOKEN_KEYS else value
        for name, value in prompt.items()
    }


def _prediction(vlm: Vlm, token: int, probability: float) -> TokenPrediction:
    return TokenPrediction(token, vlm.tokenizer.decode([token]), probability, token in vlm.stop_ids())
