"""Processors for images and text alone, where transformers' own cannot be built because torchvision is absent.

transformers builds a video processor into some processors, and that needs torchvision. The classes below keep
the image and text parts. ProcessorMixin reads a processor's parts and saved settings from the signature and the code
object of __init__, so each class writes out its own.
"""

from __future__ import annotations

import copyreg
import json
import re
from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    InternVLProcessor,
    LlavaOnevisionProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.processing_utils import ProcessorMixin


class _Qwen2VL(Qwen2VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        _qwen_tokens(self, tokenizer)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = None


class _Qwen25VL(Qwen2_5_VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        _qwen_tokens(self, tokenizer)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = None


class _Qwen3VL(Qwen3VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        _qwen_tokens(self, tokenizer)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = None


class _LlavaOnevision(LlavaOnevisionProcessor):
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
    ):
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token, self.video_token = image_token, video_token
        self.vision_aspect_ratio = vision_aspect_ratio
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([image_token, video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = None


class _InternVL(InternVLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=256, chat_template=None):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = None
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token, self.video_token = tokenizer.context_image_token, tokenizer.video_token
        self.image_token_id = tokenizer.context_image_token_id
        either = f"(?P<image>{re.escape(self.image_token)})|(?P<video>{re.escape(self.video_token)})"
        self.multimodal_pattern = re.compile(either)


class _SmolVLM(SmolVLMProcessor):
    """Without num2words too, which writes out the times of a video's frames."""

    def __init__(self, image_processor=None, tokenizer=None, image_seq_len=169, chat_template=None):
        names = {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
            "video_token": "<video>",
        }
        for name, token in names.items():
            setattr(self, name, getattr(tokenizer, name, token))
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_seq_len = image_seq_len
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = None

    def apply_chat_template(self, conversation, chat_template=None, **options):  # type: ignore[override]
        """Without asking the video processor how many frames a video has."""
        return ProcessorMixin.apply_chat_template(self, conversation, chat_template, **options)


def _qwen_tokens(processor: Any, tokenizer: Any) -> None:
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    for name, token in names.items():
        setattr(processor, name, token)
        setattr(processor, f"{name}_id", tokenizer.convert_tokens_to_ids(token))


IMAGE_ONLY: dict[str, type[ProcessorMixin]] = {
    "Qwen2VLProcessor": _Qwen2VL,
    "Qwen2_5_VLProcessor": _Qwen25VL,
    "Qwen3VLProcessor": _Qwen3VL,
    "LlavaOnevisionProcessor": _LlavaOnevision,
    "InternVLProcessor": _InternVL,
    "SmolVLMProcessor": _SmolVLM,
}


def _unpickled(name: str) -> ProcessorMixin:
    form = IMAGE_ONLY[name]
    return form.__new__(form)


def _pickled(processor: ProcessorMixin) -> tuple[Any, ...]:
    """Under the public class's name pickle would find that class, and refuse: loader workers that are not forked."""
    return _unpickled, (type(processor).__name__,), vars(processor)


for _name, _form in IMAGE_ONLY.items():
    _form.__name__ = _form.__qualname__ = _name  # saved folders carry the public class's name
    copyreg.pickle(_form, _pickled)


def load_image_only(folder: Path) -> ProcessorMixin | None:
    """Compose the image-only form of a folder's processor; None where there is no such form."""
    settings = _saved_settings(folder)
    form = IMAGE_ONLY.get(settings.get("processor_class", ""))
    if form is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    template = folder / "chat_template.jinja"
    own = {key: settings[key] for key in form.__init__.__code__.co_varnames if key in settings}
    own.setdefault("chat_template", template.read_text("utf-8") if template.is_file() else tokenizer.chat_template)
    return form(image_processor=image_processor, tokenizer=tokenizer, **own)


def _saved_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            found = json.loads(path.read_text("utf-8"))
            if name == "processor_config.json":
                settings |= {key: value for key, value in found.items() if not isinstance(value, dict)}
            elif "processor_class" in found:
                settings["processor_class"] = found["processor_class"]
    return settings
