"""A model's parts are what they were taken for: checked by running it on a chat with an image and on one without.

B rows of the probe, S tokens of a row, T positions that are compared, d width, V rows of the head.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import RecipeError, SampleError
from pipeline.signal import Unembedding
from pipeline.vlm.backbone import run_backbone
from pipeline.vlm.chat_template import Message
from pipeline.vlm.parts import (
    LogitRule,
    decoder_layers,
    final_norm,
    image_parts,
    lm_head,
    parts_of,
    set_logit_rule,
    text_config,
)
from pipeline.vlm.processing import Batch, ChatEncoder, Encoded, collate
from pipeline.vlm.structure import not_recognised

ANSWER = "A cat."
"""The response of the probe's chats."""
SCALES = re.compile(r"(logits?|lm_head|output)_?(scale|scaling|multiplier)$")
"""Fields of a text config that scale the logits in some family: by themselves or by their inverse."""
CAPS = re.compile(r"(final_)?logits?_soft_?cap(ping)?$")
"""Fields that bound them."""


@dataclass(frozen=True)
class _Seen:
    """What one pass of the whole model showed at the probe's positions."""

    normed: Tensor
    """[T, d] the head's input."""
    logits: Tensor
    """[T, V] the model's own."""
    hidden: tuple[Tensor, ...] | None
    """hidden_states, each [B, S, d]; None where the model gives none."""
    unreached: tuple[str, ...]
    """Image parts that took no part in it."""


def check_parts(model: nn.Module, encoder: ChatEncoder, layers: Sequence[int], device: Any, dtype: torch.dtype) -> None:
    """Check a loaded model's parts on a probe, and keep what it does to its logits.

    layers: its target layers. Under ZeRO-3 the engine must have the model already, and all ranks must call: all run
    the same modules on the same probe. Two forwards of three short chats. Raises RecipeError naming the first part
    that is not what it was taken for.
    """
    check_on(model, probe(encoder).to(device, dtype), layers)


@torch.no_grad()
def check_on(model: nn.Module, batch: Batch, layers: Sequence[int]) -> None:
    """As check_parts, on a probe that probe_batch has made, moved to the model's device."""
    was = model.training
    model.eval()
    try:
        seen = _whole(model, batch)
        *targets, last = run_backbone(model, batch.inputs, [*layers, len(decoder_layers(model))], batch.positions)
        _check_images(model, seen)
        _check_norm(model, last, seen)
        set_logit_rule(model, _find_rule(model, seen))
        _check_layers(model, dict(zip(layers, targets, strict=True)), seen, batch)
        _check_causal(model, [*targets, last], batch)
    finally:
        model.train(was)


def probe(encoder: ChatEncoder) -> Batch:
    """The probe of a model's own processor.

    Raises RecipeError where the processor refuses it, or its response tokens are not the response.
    """
    long = copy.copy(encoder)
    long.max_length = 2**31  # the probe must not be cut where a recipe's chats are
    question = [{"type": "text", "text": "What is in it?"}]
    try:
        image = long("probe", _chat([{"type": "image"}, *question]), [_png()])
        text = long("probe", _chat(question), [])
    except SampleError as error:
        raise RecipeError(
            f"this model's processor must take chats with an image and chats without, and it does not: {error}"
        ) from error
    for sample in (image, text):
        said = encoder.processor.tokenizer.decode(sample.response_ids)
        if not said.strip().startswith(ANSWER):
            raise RecipeError(
                f"the tokens of the response {ANSWER!r} read {said!r}: this model's processor changes the text of a "
                "chat after its template, so the response cannot be found in it"
            )
    return probe_batch(image, text)


def probe_batch(image: Encoded, text: Encoded) -> Batch:
    """Three rows: a chat with an image, the same with another last response token, a chat of text.

    The first two have the same tokens up to the last that is predicted: their states must be equal there.
    """
    return collate([image, _with_another_end(image), text], image, pad_id=0)


def _chat(question: list[dict[str, str]]) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]


def _png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(out, "PNG")
    return out.getvalue()


def _with_another_end(sample: Encoded) -> Encoded:
    """The sample with its last response token replaced by its first: what precedes it must not see that."""
    ids = sample.inputs["input_ids"].clone()
    places = torch.nonzero(sample.response)[:, 0]
    ids[0, places[-1]] = ids[0, places[0]]
    return replace(sample, inputs={**sample.inputs, "input_ids": ids})


def _whole(model: Any, batch: Batch) -> _Seen:
    """Run the model as a user would, but its head at the probe's positions alone."""
    inputs: list[Tensor] = []

    def at_positions(_head, args):
        inputs.append(args[0].flatten(0, 1)[batch.positions.to(args[0].device)][None])
        return inputs[-1], *args[1:]

    handle = lm_head(model).register_forward_pre_hook(at_positions)
    try:
        with _reached(model, image_parts(model)) as reached:
            out = model(**batch.inputs, use_cache=False, output_hidden_states=True)
    except (AttributeError, NameError, TypeError) as error:  # a fault of its code, whatever the data
        raise RecipeError(
            f"transformers {transformers.__version__} cannot run model_type '{model.config.model_type}': its own "
            f"forward ends with {type(error).__name__}: {error}. Install another version of transformers"
        ) from error
    finally:
        handle.remove()
    if not inputs:
        raise not_recognised(model, "head", f"{parts_of(model).head} does not make the model's logits")
    unreached = tuple(name for name in image_parts(model) if name not in reached)
    return _Seen(inputs[0][0], out.logits[0], getattr(out, "hidden_states", None), unreached)


@contextmanager
def _reached(model: nn.Module, names: Sequence[str]) -> Iterator[set[str]]:
    """Collect those of the named parts of which any module runs."""
    reached: set[str] = set()
    handles = [
        module.register_forward_hook(lambda _module, _args, _output, name=name: reached.add(name))
        for name in names
        for module in model.get_submodule(name).modules()
    ]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


def _check_images(model: nn.Module, seen: _Seen) -> None:
    for name in seen.unreached:
        field = "vision" if name in parts_of(model).vision else "projector"
        raise not_recognised(model, field, f"an image does not go through {name}")


def _check_norm(model: nn.Module, last: Tensor, seen: _Seen) -> None:
    """The last layer's state through the norm is the head's input."""
    norm = final_norm(model)
    if last.dim() != 2 or last.shape != seen.normed.shape:
        found = f"layer {len(decoder_layers(model))} gives {list(last.shape)}, the head takes {list(seen.normed.shape)}"
        raise not_recognised(model, "decoder", found)
    error = _error(norm(last).to(seen.normed.device), seen.normed)
    if not error <= 1:
        name = parts_of(model).norm
        found = f"the last layer's state through {name} is not the head's input, {_times(error)}"
        raise not_recognised(model, "norm", found)


def _find_rule(model: nn.Module, seen: _Seen) -> LogitRule:
    """What turns the head's products into the model's logits: the rule, of those that its config names, that fits."""
    products = lm_head(model)(seen.normed).float()
    logits = seen.logits.float()

    def error(rule: LogitRule) -> float:
        head = Unembedding(logits, logits.shape[-1], None, rule.scale, rule.softcap)
        return _error(head.scale_and_cap_(products.clone()), logits, seen.normed)

    errors = {rule: error(rule) for rule in _rules(model)}
    best = min(errors, key=errors.__getitem__)  # the plainest, where several fit
    if not errors[best] <= 1:
        raise RecipeError(
            f"model_type '{model.config.model_type}' does something to its logits that is not known here: the head's "  # type: ignore[union-attr]
            f"products are not its logits, {_times(errors[best])}, and neither is any of {sorted(map(str, errors))}"
        )
    return best


def _rules(model: nn.Module) -> list[LogitRule]:
    """No rule first, then those that fields of the model's config give."""
    values: dict[str, Any] = {**model.config.to_dict(), **text_config(model).to_dict()}  # type: ignore[union-attr,operator]
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float)) and value}
    scales = [scale for name, value in numbers.items() if SCALES.search(name) for scale in (value, 1 / value)]
    caps = [value for name, value in numbers.items() if CAPS.match(name)]
    return [LogitRule(scale, cap) for scale, cap in itertools.product([1.0, *scales], [None, *caps])]


def _check_layers(model: nn.Module, captured: dict[int, Tensor], seen: _Seen, batch: Batch) -> None:
    """Each target layer's captured state is what output_hidden_states gives, where the model gives it."""
    depth = len(decoder_layers(model))
    hidden = seen.hidden
    if hidden is None or len(hidden) != depth + 1:
        found = "no hidden_states" if hidden is None else f"{len(hidden)} hidden_states for {depth} layers"
        raise not_recognised(model, "decoder", f"the model gives {found}, expected {depth + 1}")
    for layer, state in captured.items():
        theirs = hidden[layer].flatten(0, 1)[batch.positions.to(hidden[layer].device)]
        error = _error(state.to(theirs.device), theirs) if state.shape == theirs.shape else math.inf
        if not error <= 1:
            found = f"layer {layer} of {parts_of(model).layers} is not its hidden_states, {_times(error)}"
            raise not_recognised(model, "decoder", found)


def _check_causal(model: nn.Module, states: Sequence[Tensor], batch: Batch) -> None:
    """No position sees the token that it predicts, and no chat another: two rows differ in their last token alone."""
    first, second = batch.counts[:2]
    for state in states:
        error = _error(state[first : first + second], state[:first])
        if not error <= 1:
            raise RecipeError(
                f"model_type '{model.config.model_type}' computes two chats differently before the token in which they "  # type: ignore[union-attr]
                f"differ, {_times(error)}: it sees the response that it is to predict, which its processor must mark "
                "(token_type_ids), or one chat of a batch changes another"
            )


def _error(ours: Tensor, theirs: Tensor, inputs: Tensor | None = None) -> float:
    """Largest difference, in units of what rounding explains: 1 is all that is allowed.

    Two orders of the same sum of d products differ by a few sqrt(d) float32 roundings, and a result is rounded to its
    dtype, as was what it was computed from: 4 roundings of the largest. inputs: what the products were of.
    """
    kind = (theirs if inputs is None else inputs).dtype
    relative = 4 * torch.finfo(kind).eps + math.sqrt(theirs.shape[-1] if inputs is None else inputs.shape[-1]) * 2**-22
    allowed = relative * float(theirs.float().abs().max())
    difference = float((ours.float() - theirs.float()).abs().max())
    if not math.isfinite(difference):
        return math.inf
    return difference / allowed if allowed else (math.inf if difference else 0.0)


def _times(error: float) -> str:
    finite = math.isfinite(error)
    return f"by {error:,.0f} times what rounding explains" if finite else "and there are values that are not finite"
