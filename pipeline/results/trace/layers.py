"""Predictions of each target layer, through its verbalizer, for one question (paper, Figure 3).

L target layers and the last layer, T tokens of an answer, d width. A model may lie on several devices: a verb-FFN then
lies on its layer's, and its output goes to the language head's.
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
    """The most likely next token of a verbalized distribution."""

    token: int
    text: str
    probability: float
    ends: bool
    """Whether the token ends the turn."""


@dataclass(frozen=True)
class LayerTrace:
    """Predictions of one layer."""

    layer: int
    """Layer number, from 1. The deepest is the model's last layer, which uses the model's own head, no verbalizer."""
    along: tuple[TokenPrediction, ...]
    """[T] predictions at each position of the model's final answer, with that answer as input."""
    free: tuple[TokenPrediction, ...]
    """The layer's own greedy answer: its own tokens are fed back, until its end of turn."""
    text: str
    """Text of the layer's own answer."""


@dataclass(frozen=True)
class ModelTrace:
    """Traces of all target layers of one model; the last layer is last."""

    name: str
    layers: tuple[LayerTrace, ...]

    @property
    def answer(self) -> tuple[TokenPrediction, ...]:
        """The model's final answer, including its end-of-turn token."""
        return self.layers[-1].free


def trace(name: str, vlm: Vlm, side: VerbalizedVLM, prompt: Mapping[str, Tensor], max_new_tokens: int) -> ModelTrace:
    """Generate every layer's own answer to a prompt, then predict with all layers along the last layer's answer.

    Costs one generation per layer, with the model's key-value cache, and one more forward for the predictions along.
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
    """Each layer's most likely token at the T positions that predict the answer, with the answer itself as input."""
    inputs = move(_append_answer(prompt, answer), vlm.device, vlm.dtype)
    begin = prompt["input_ids"].shape[1] - 1
    positions = torch.arange(begin, begin + len(answer), device=vlm.device)
    hidden = run_backbone(vlm.model, inputs, side.all_layers(), positions)
    verbalized = side.verbalize_states(hidden).to(side.head.weight.device)
    tokens, probabilities = side.head(_top1, verbalized)
    return [
        tuple(_prediction(vlm, token, p) for token, p in zip(*row, strict=True))
        for row in zip(tokens.tolist(), probabilities.tolist(), strict=True)
    ]


def generate_from_layer(
    vlm: Vlm, side: VerbalizedVLM, prompt: Mapping[str, Tensor], layer: int, max_new_tokens: int
) -> tuple[TokenPrediction, ...]:
    """One layer's greedy answer: its verbalized logits replace the model's own in generation."""
    processor = _LayerGeneration(side, layer, vlm.placeholder_ids())
    try:
        (ids,) = greedy(vlm, prompt, max_new_tokens, LogitsProcessorList([processor]))
    finally:
        processor.close()
    return tuple(_prediction(vlm, token, p) for token, p in zip(ids, processor.probabilities, strict=True))


class _LayerGeneration(LogitsProcessor):
    """Logits processor that replaces the model's logits by those of one decoder layer's verbalizer.

    A forward hook stores the layer's hidden state at the last position.
    """

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
        logits = side.head(_logits, final_norm(side.backbone)(verbalized).to(side.head.weight.device))
        probabilities = logits.softmax(-1)
        logits[:, self.banned_ids] = float("-inf")
        self.probabilities.append(float(probabilities[0, logits[0].argmax()]))
        # Rows of the head that only pad the vocabulary are never generated.
        padding_rows = scores.shape[-1] - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, padding_rows), value=float("-inf")).to(scores.device)

    def close(self) -> None:
        self._hook.remove()


def _logits(verbalized: Tensor, unembedding: Unembedding) -> Tensor:
    return unembedding.logits(verbalized)


def _top1(verbalized: Tensor, unembedding: Unembedding) -> tuple[Tensor, Tensor]:
    """[L + 1, T, d] -> ids and probabilities, each [L + 1, T]; logits exist for one layer at a time."""
    best = [unembedding.logits(layer).softmax(-1).max(-1) for layer in verbalized]
    return torch.stack([b.indices for b in best]), torch.stack([b.values for b in best])


def _append_answer(prompt: Mapping[str, Tensor], answer: Sequence[int]) -> dict[str, Tensor]:
    """The prompt's inputs with the answer's ids appended."""
    ids = torch.tensor([list(answer)])
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        name: torch.cat([value, more.get(name, torch.zeros_like(ids))], 1) if name in TOKEN_KEYS else value
        for name, value in prompt.items()
    }


def _prediction(vlm: Vlm, token: int, probability: float) -> TokenPrediction:
    return TokenPrediction(token, vlm.tokenizer.decode([token]), probability, token in vlm.stop_ids())
