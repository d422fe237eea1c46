"""From a chat and its images to model inputs with an exact response mask.

B samples, S tokens of the longest, T response tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from data_prep import images
from data_prep.schema import BadSample
from pipeline.errors import RecipeError, SampleError, as_sample_error
from pipeline.vlm.chat_template import ChatTemplate, Message
from pipeline.vlm.image_only import load_image_only
from pipeline.vlm.image_size import NO_LIMITS, PixelLimits

TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class Encoded:
    """One chat as model inputs."""

    key: str
    inputs: dict[str, Tensor]
    """What the model's forward takes, with a leading dimension of one sample (or of its images)."""
    response: Tensor
    """[S] bool: the tokens that carry loss, the assistant's words and each end-of-turn token."""
    turns: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    """[S] int32: the number of the message that a response token is of; 0 elsewhere, for no chat begins with one. It
    stays as it is where fewer tokens carry loss."""
    answer: int = 0
    """The number of the message of the chat's last response; 0 where max_length has cut from it."""

    @property
    def response_ids(self) -> Tensor:
        """[T] the response tokens."""
        return self.inputs["input_ids"][0, self.response]

    def only(self, rows: Tensor) -> Encoded:
        """The same chat, where of the response tokens only `rows` (a mask, or indices) carry loss."""
        response = torch.zeros_like(self.response)
        response[torch.nonzero(self.response)[:, 0][rows]] = True
        return replace(self, response=response)

    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        return sum(tensor.nbytes for tensor in (*self.inputs.values(), self.response, self.turns))


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded on the right."""

    inputs: dict[str, Tensor]
    """Model inputs, [B, S] for tokens; a batch without images has one more row, see ChatEncoder.filler."""
    positions: Tensor
    """[T] indices into the flattened [B * S] hidden states: where each response token is predicted."""
    labels: Tensor
    """[T] the response tokens themselves, sample after sample."""
    keys: tuple[str, ...]
    """The samples' keys."""
    counts: tuple[int, ...]
    """Response tokens of each sample; they sum to T."""
    answers: tuple[int, ...] = ()
    """How many of them, the last ones, are the chat's last response; 0 where max_length has cut from it."""
    images: int = 0
    """How many of the samples have an image."""
    tokens: int = 0
    """Tokens of the samples, without padding and the filler row."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """Move to a device. Floating point inputs get the model's dtype. Copies from pinned memory are asynchronous."""
        return self._each(lambda t: t.to(device, dtype if t.is_floating_point() else None, non_blocking=True))

    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        return sum(tensor.nbytes for tensor in (*self.inputs.values(), self.positions, self.labels))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory. Without it a copy to a GPU waits until the GPU is idle."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed = {name: change(tensor) for name, tensor in self.inputs.items()}
        return replace(self, inputs=changed, positions=change(self.positions), labels=change(self.labels))


def load_processor(folder: Path | str) -> Any:
    """The folder's processor, or its image-only form where transformers cannot build it (no torchvision).

    Raises RecipeError if neither can be built, with transformers' own reason.
    """
    folder = Path(folder)
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of damaged files, transformers and tokenizers raise whatever they met
        try:
            processor = load_image_only(folder)
        except Exception as another:
            raise RecipeError(f"no processor could be built from {folder}: {another!r}") from another
        if processor is None:
            reason = " ".join(str(error).split())  # transformers' runs over several lines
            if "torchvision" in reason.lower():
                reason += " Install the one that belongs to this torch: pip install torchvision"
            raise RecipeError(f"no processor could be built from {folder}: {type(error).__name__}: {reason}") from error
        return processor


class ChatEncoder:
    """Turns chats into model inputs with one processor. Picklable: loader workers hold a copy."""

    def __init__(
        self,
        processor: Any,
        max_length: int,
        pixels: PixelLimits = NO_LIMITS,
        dtype: torch.dtype = torch.float32,
    ):
        """max_length: in tokens. pixels: of each image; set on the processor where it scales by area itself.

        dtype: of floating point inputs, such as pixels. The device would round them to the model's own just so, but in
        float32 twice the bytes of bfloat16 go through shared and page-locked memory.
        """
        self.processor, self.dtype = processor, dtype
        self.max_length = max_length
        self.template = ChatTemplate(processor)
        self._pixels = NO_LIMITS if pixels.set_on(processor) else pixels
        self.pixels = PixelLimits.of(processor) or pixels
        """The limits that images are scaled to, whoever scales them."""

    def __call__(self, key: str, messages: Sequence[Message], images: Sequence[bytes]) -> Encoded:
        """Encode one chat. Raises SampleError with the reason if it cannot be used."""
        self.template.refuse_control_tokens(messages)
        _check_number_of_images(messages, images)
        text = self.template.render(messages)
        pictures = self._decode(images)
        features, before = self._process(text, pictures)
        features, spans = self._truncate(text, features, before, pictures)
        turns, answer = self._turns(text, messages, features, spans)
        inputs = self._model_inputs(features)
        if not turns.any():
            raise SampleError(f"no response token within max_length={self.max_length} tokens{_of_images(before)}")
        return Encoded(key, inputs, turns > 0, turns, answer)

    def check(self) -> None:
        """Raise RecipeError where no chat at all can be encoded.

        Called at start-up, so that it is not found sample by sample.
        """
        self.template.check()
        try:
            self.filler()
        except SampleError as error:
            raise RecipeError(f"this model's processor cannot take a small grey image: {error}") from error

    def prompt(self, messages: Sequence[Message], images: Sequence[bytes]) -> dict[str, Tensor]:
        """Model inputs that end where the assistant's turn begins, for generation."""
        _check_number_of_images(messages, images)
        features, _ = self._process(self.template.render(messages, prompt=True), self._decode(images))
        return self._model_inputs(features)

    def filler(self) -> Encoded:
        """A row with a small grey picture and no response token.

        A batch without images gets it, so that every rank runs the vision tower in every step (ZeRO-3 matches
        collectives by order); without a response token it changes no loss and no gradient.
        """
        text = self.template.render([{"role": "user", "content": [{"type": "image"}]}])
        features, _ = self._process(text, [Image.new("RGB", (32, 32), (128, 128, 128))])
        inputs = self._model_inputs(features)
        return Encoded("filler", inputs, torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool))

    def _decode(self, images: Sequence[bytes]) -> list[Image.Image]:
        return [self._pixels.apply(decode_image(data)) for data in images]

    def _process(self, text: str, pictures: list[Image.Image]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        once = {"add_special_tokens": False} if self.template.writes_bos(text) else {}
        with as_sample_error("the model's processor"):
            features = dict(
                self.processor(
                    text=[text],
                    images=[pictures] if pictures else None,
                    return_tensors="pt",
                    return_offsets_mapping=True,
                    return_text_replacement_offsets=True,
                    return_mm_token_type_ids=True,
                    **once,
                )
            )
        replaced = features.pop("text_replacement_offsets", ())
        replaced = replaced[0] if len(replaced) else []  # InternVL's are a tensor where there is none
        if len(replaced) != len(pictures):
            raise SampleError(f"the chat template keeps the places of {len(replaced)} of {len(pictures)} images")
        return features, replaced

    def _model_inputs(self, features: Mapping[str, Any]) -> dict[str, Tensor]:
        names = self.processor.model_input_names
        inputs = {name: value for name, value in features.items() if name in names and isinstance(value, Tensor)}
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    def _truncate(self, text: str, features: dict[str, Any], spans: list[dict[str, Any]], pictures: list[Any]):
        """Cut to max_length tokens, before the first image that does not fit whole."""
        length = features["input_ids"].shape[1]
        if length <= self.max_length:
            return features, spans
        end_of_text = int(features["offset_mapping"][0, self.max_length - 1, 1])
        kept = [span for span in spans if span["new_span"][1] <= end_of_text]
        if len(kept) < len(spans):
            # Anew, and not a slice: LLaVA-OneVision gives the images that stay another number of tokens.
            text, pictures = text[: spans[len(kept)]["span"][0]], pictures[: len(kept)]
            return self._truncate(text, *self._process(text, pictures), pictures)
        for name in (*TOKEN_KEYS, "offset_mapping"):
            if name in features:
                features[name] = features[name][:, : self.max_length]
        return features, spans

    def _turns(self, text: str, messages: Sequence[Message], features: dict[str, Any], spans) -> tuple[Tensor, int]:
        """Encoded's `turns` and `answer`."""
        answer = 0
        starts, ends = features["offset_mapping"][0].unbind(-1)
        turns = torch.zeros(len(starts), dtype=torch.int32)
        for turn, (begin, end) in self.template.spans_by_turn(text, messages).items():
            grown = sum(
                (s["new_span"][1] - s["new_span"][0]) - (s["span"][1] - s["span"][0])
                for s in spans
                if s["span"][1] <= begin
            )
            turns[(starts < end + grown) & (ends > begin + grown)] = turn
            answer = turn if end + grown <= int(ends.max()) else 0  # in the end that of the last response
        return turns, answer


def collate(samples: Sequence[Encoded], filler: Encoded, pad_id: int) -> Batch:
    """Pad on the right to the longest sample; add the filler row if no sample has an image."""
    counts = tuple(int(sample.response.sum()) for sample in samples)
    rows = list(samples)
    image_keys = set(filler.inputs) - set(TOKEN_KEYS)
    with_images = sum(bool(image_keys & set(sample.inputs)) for sample in samples)
    if not with_images:
        rows.append(filler)
    width = max(row.inputs["input_ids"].shape[1] for row in rows)
    inputs = {}
    for name in sorted(set().union(*(row.inputs for row in rows))):
        parts = [row.inputs[name] for row in rows if name in row.inputs]
        if name in TOKEN_KEYS:
            fill = pad_id if name == "input_ids" else 0
            inputs[name] = torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1]), value=fill) for p in parts])
        else:
            inputs[name] = torch.cat(_same_shape(parts))
    flat = [row * width + torch.nonzero(sample.response)[:, 0] - 1 for row, sample in enumerate(samples)]
    return Batch(
        inputs=inputs,
        positions=torch.cat(flat) if flat else torch.zeros(0, dtype=torch.long),
        labels=torch.cat([s.response_ids for s in samples]) if samples else torch.zeros(0, dtype=torch.long),
        keys=tuple(sample.key for sample in samples),
        counts=counts,
        answers=tuple(_answer_tokens(sample) for sample in samples),
        images=with_images,
        tokens=sum(sample.inputs["input_ids"].shape[1] for sample in samples),
    )


def _answer_tokens(sample: Encoded) -> int:
    return int((sample.response & (sample.turns == sample.answer)).sum()) if sample.answer else 0


def decode_image(data: bytes) -> Image.Image:
    """Bytes to an RGB picture, upright, as data_prep checked it. Raises SampleError if they are no image."""
    try:
        return images.decode_image(data)
    except BadSample as bad:
        raise SampleError(f"image cannot be decoded: {bad}") from bad


def _check_number_of_images(messages: Sequence[Message], images: Sequence[bytes]) -> None:
    """Raise SampleError unless each image part has its image: not every processor looks."""
    parts = sum(part["type"] == "image" for message in messages for part in _parts(message))
    if parts != len(images):
        raise SampleError(f"the chat has {parts} image part(s), and {len(images)} image(s) came with it")


def _parts(message: Message) -> Sequence[Mapping[str, Any]]:
    return [] if isinstance(message["content"], str) else message["content"]


def _of_images(spans: Sequence[Mapping[str, Any]]) -> str:
    """What to do where images leave no room for the response."""
    tokens = sum(span["new_span"][1] - span["new_span"][0] for span in spans)
    if not tokens:
        return " (data.max_length)"
    return f": {len(spans)} image(s) come before it. Lower data.max_pixels or raise data.max_length"


def _same_shape(parts: list[Tensor]) -> list[Tensor]:
    """Zero-pad all but the first dimension to the largest, as LLaVA's image tiles need."""
    if parts[0].dim() < 2 or len({p.shape[1:] for p in parts}) == 1:
        return parts
    largest = [max(p.shape[d] for p in parts) for d in range(1, parts[0].dim())]
    padded = []
    for part in parts:
        widths = [w for d in reversed(range(1, part.dim())) for w in (0, largest[d - 1] - part.shape[d])]
        padded.append(torch.nn.functional.pad(part, widths))
    return padded
