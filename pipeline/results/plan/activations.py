"""Bytes of activations of each part of a step on one rank, in a micro-step of the longest samples.

B samples of S tokens, T response tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.loss.chunks import (
    ACCELERATOR_CHUNK_ELEMENTS,
    CHUNK_ELEMENTS,
    ROW_BLOCK,
    TILE_ELEMENTS,
    rows_per_chunk,
)
from pipeline.results.plan.models import PlannedModel, Vision, vision_of
from pipeline.results.plan.traced import Footprint, footprint
from pipeline.vlm.parts import decoder_layers, final_norm, text_config
from pipeline.vlm.verbalizer import VerbFFN

WIDE = 4
"""Bytes of a float32 number."""


@dataclass(frozen=True)
class Shape:
    """A micro-batch of the longest samples."""

    samples: int
    tokens: int
    """Of each sample, padding included."""
    response: int
    """Response tokens of the whole micro-batch."""
    image: int
    """Image tokens of the whole micro-batch."""

    @property
    def all_tokens(self) -> int:
        """B S."""
        return self.samples * self.tokens


@dataclass(frozen=True)
class Peak:
    """Bytes of one part of a micro-step, or of several one after the other."""

    kept: int
    """What stays from the forward to the backward, when all of the forward is done."""
    working: int
    """The most that lives beside what is kept, while a part runs."""
    kept_then: int | None = None
    """What is kept at that moment; None: all."""

    @property
    def beside(self) -> int:
        """What is kept while the working bytes live."""
        return self.kept if self.kept_then is None else self.kept_then

    def __add__(self, later: Peak) -> Peak:
        """A part, and one that follows it.

        While a part runs, those that follow it have not begun, or are through with their backward: it has beside it
        only what it and the parts before it keep.
        """
        kept, then = self.kept + later.kept, self.kept + later.beside
        if then + later.working >= self.beside + self.working:
            return Peak(kept, later.working, then)
        return Peak(kept, self.working, self.beside)


def decoder_layer(model: PlannedModel, shape: Shape, grad: bool, dtype: torch.dtype) -> Footprint:
    """One decoder layer on [B, S, d]."""
    return _layer(model.module, shape.samples, shape.tokens, grad, dtype)


@lru_cache
def _layer(model: nn.Module, samples: int, tokens: int, grad: bool, dtype: torch.dtype) -> Footprint:
    config = text_config(model)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def run(layer: Callable[..., Any], make: Callable[..., Tensor]) -> Tensor:
        angles = tuple(make(samples, tokens, head_width).detach() for _ in range(2))
        made = layer(make(samples, tokens, config.hidden_size), attention_mask=None, position_embeddings=angles)
        return made[0] if isinstance(made, tuple) else made

    return footprint(decoder_layers(model)[0], run, grad, dtype)


def frozen_backbone(model: PlannedModel, shape: Shape, dtype: torch.dtype) -> Peak:
    """A forward without gradient: one layer at a time, and the states of the target layers and the last [T, d]."""
    one, vision = decoder_layer(model, shape, False, dtype), vision_of(model)
    states = (len(model.layers) + 1) * shape.response * model.width * dtype.itemsize
    inputs = shape.all_tokens * model.width * dtype.itemsize
    return Peak(states, max(inputs + one.forward, vision_working(vision, shape, dtype)))


def trained_backbone(
    model: PlannedModel, shape: Shape, dtype: torch.dtype, checkpointing: bool, train_vision: bool
) -> Peak:
    """Forward and backward of the student's decoder.

    checkpointing: only the layers' inputs are kept, and one layer at a time is run again.
    """
    one = decoder_layer(model, shape, True, dtype)
    inputs = shape.all_tokens * model.width * dtype.itemsize
    vision = vision_of(model)
    towers = vision_kept(vision, shape, dtype) if train_vision else 0
    # Beside what a layer keeps, its backward holds the gradient that it gives on.
    backward = one.backward - one.kept + inputs
    looking = vision_working(vision, shape, dtype)
    if checkpointing:
        return Peak(towers + inputs * (model.depth + 1), max(one.kept + backward, looking))
    return Peak(towers + inputs + one.kept * model.depth, max(backward, looking))


def vision_working(vision: Vision, shape: Shape, dtype: torch.dtype) -> int:
    """The image encoder without gradient: a block's input, its norm, and both sides of its MLP."""
    patches = shape.image * vision.patches_per_token
    return patches * (3 * vision.width + 2 * vision.inner) * dtype.itemsize


def vision_kept(vision: Vision, shape: Shape, dtype: torch.dtype) -> int:
    """What all blocks keep where the tower trains: inputs of two norms and four products, and the attention's."""
    patches = shape.image * vision.patches_per_token
    return vision.blocks * patches * (10 * vision.width + 2 * vision.inner) * dtype.itemsize


def verbalized(model: PlannedModel, shape: Shape, form: str, trained: bool, grad: bool, dtype: torch.dtype) -> Peak:
    """Verb-FFNs and final norm on the states of all target layers and the last: [J + 1, T, d].

    trained: the verb-FFNs. grad: whether the states themselves carry a gradient.
    """
    tensor = shape.response * model.width * dtype.itemsize
    states = (len(model.layers) + 1) * tensor
    if not trained and not grad:
        return Peak(2 * states, states)  # verbalized, normed and stacked; the first go
    block = _verbalizer(model.width, form, trained, shape.response, dtype, final_norm(model.module))
    # Each layer's normed output goes when all are stacked. The last layer's norm keeps two states, one in float32.
    each, last = block.kept - tensor, tensor + shape.response * model.width * WIDE if grad else 0
    return Peak(len(model.layers) * each + last + states, block.backward - block.kept + states)


@lru_cache
def _verbalizer(width: int, form: str, trained: bool, tokens: int, dtype: torch.dtype, norm: nn.Module) -> Footprint:
    with torch.device("meta"):
        block = VerbFFN(width, form).requires_grad_(trained)
    both = nn.Sequential(block, norm)
    return footprint(both, lambda call, make: call(make(tokens, width)), True, dtype)


def head_chunk(vocab: int, rows: int, dtype: torch.dtype, on_cpu: bool) -> int:
    """A chunk of logits [c, V] and, below float32, a tile of it in float32 (loss/chunks.py)."""
    accelerated = max(1, ACCELERATOR_CHUNK_ELEMENTS // vocab // ROW_BLOCK) * ROW_BLOCK
    chunk = min(rows, rows_per_chunk(vocab) if on_cpu else accelerated)
    tile = min(chunk, max(1, (TILE_ELEMENTS if on_cpu else CHUNK_ELEMENTS) // vocab))
    return vocab * (chunk * dtype.itemsize + (tile * WIDE if dtype.itemsize < WIDE else 0))


def exact_chunks(vocab: int, rows: int, students: int, dtype: torch.dtype, on_cpu: bool, at_once: bool) -> int:
    """Logits of the losses against whole distributions (loss/sparse_kl.py), the larger of two moments.

    The first pass: log q of all target layers, the logits and log p of a teacher layer, and log p and p of the one
    before. The second: products and logits of a pair, their logarithms, p and q. at_once: all rows are one chunk there.
    """
    accelerated = max(1, ACCELERATOR_CHUNK_ELEMENTS // vocab // ROW_BLOCK) * ROW_BLOCK
    first = min(rows, max(1, rows_per_chunk(vocab) // (students + 1)))
    second = rows if at_once else min(rows, rows_per_chunk(vocab) if on_cpu else accelerated)
    narrow = dtype.itemsize if dtype.itemsize < WIDE else 0
    return vocab * max(first * (students + 4) * WIDE, second * 2 * (narrow + 3 * WIDE))


def head_gradient(vocab: int, rows: int, width: int, tokens: int, dtype: torch.dtype) -> int:
    """What a trained head's loss keeps for the backward: its gradient in float32, or its two factors if smaller.

    rows: of the head. tokens: response tokens of the micro-batch (loss/chunks.py).
    """
    if tokens <= width:
        return tokens * (vocab + width) * dtype.itemsize
    return rows * width * WIDE


def coding_chunk(vocab: int, rows: int, dtype: torch.dtype) -> int:
    """The products of the head that a codec works on at a time: the same on every device."""
    return vocab * min(rows, rows_per_chunk(vocab)) * dtype.itemsize


def drawing(vocab: int, points: int, rows: int, on_cpu: bool) -> int:
    """The workspace of the sampled codec (codec/systematic.py): three float32 tiles, and each point's block twice."""
    elements = 2**20 if on_cpu else 2**26
    at_once = min(rows, max(1, elements // max(vocab, points * 128)))
    return at_once * (3 * vocab * WIDE + points * 128 * (WIDE + 8 + 8))
