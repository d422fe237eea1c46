"""Tiny vision-language models from config: random weights, a byte-level tokenizer, real classes, no download."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_prep.shards import FORMAT, shard_name, write_manifest, write_shard
from pipeline.vlm.image_only import IMAGE_ONLY

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<image>", "<video>",
]  # fmt: skip
CHAT = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% for c in m['content'] %}{% if c['type']=='image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN_CHAT = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
LLAVA_CHAT = CHAT.replace("IMAGE", "<image>\n")
THINKING_CHAT = QWEN_CHAT.replace(
    "{{ m['role'] }}\n", "{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
).replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
"""Opens a thinking block in its generation prompt, and inserts an empty one before an answer, as Qwen3's do."""
KINDS = ("qwen2_vl", "llava_onevision")
"""Families whose tiny pairs run through both stages."""
MORE_KINDS = ("qwen2_5_vl", "qwen3_vl", "llava")
"""Families whose layers, verbalizers and masks are tested."""


def byte_tokenizer() -> tf.PreTrainedTokenizerFast:
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        model_max_length=4096,
    )


def write_vlm(
    folder: Path, kind: str, layers: int, width: int, seed: int = 0, tie: bool = False, rows: int = 0, tokenizer=None
) -> Path:
    """A random tiny VLM as a Hugging Face folder; rows > 0 pads the vocabulary to that many rows.

    tokenizer: another than byte_tokenizer(); its eos_token ends each turn.
    """
    tokenizer = tokenizer or byte_tokenizer()
    build = {"qwen2_vl": _qwen2_vl, "llava_onevision": _llava_onevision, "llava": _llava}.get(kind) or _newer_qwen(kind)
    config, processor = build(tokenizer, layers, width, tie, max(rows, len(tokenizer)))
    processor.chat_template = processor.chat_template.replace("<|im_end|>", tokenizer.eos_token)
    torch.manual_seed(seed)
    model = tf.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _text(tokenizer, layers: int, width: int, tie: bool, rows: int) -> dict:
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tie,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def _qwen2_vl(tokenizer, layers: int, width: int, tie: bool, rows: int):
    half = width // 4 // 2
    sections = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    token = tokenizer.convert_tokens_to_ids
    config = tf.Qwen2VLConfig(
        text_config={**_text(tokenizer, layers, width, tie, rows), "rope_parameters": rope},
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tie,
    )  # fmt: skip
    images = tf.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    return config, IMAGE_ONLY["Qwen2VLProcessor"](image_processor=images, tokenizer=tokenizer, chat_template=QWEN_CHAT)


def _llava_onevision(tokenizer, layers: int, width: int, tie: bool, rows: int):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    token = tokenizer.convert_tokens_to_ids
    grid = [[28, 28], [56, 56]]
    config = tf.LlavaOnevisionConfig(
        text_config={**_text(tokenizer, layers, width, tie, rows), "model_type": "qwen2", "rope_parameters": rope},
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False,
        },
        image_token_index=token("<image>"),
        video_token_index=token("<video>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_grid_pinpoints=grid,
        tie_word_embeddings=tie,
    )  # fmt: skip
    images = tf.LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    return config, IMAGE_ONLY["LlavaOnevisionProcessor"](
        image_processor=images,
        tokenizer=tokenizer,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_CHAT,
    )


def _newer_qwen(kind: str):
    """Qwen2.5-VL or Qwen3-VL: Qwen2-VL's text and tokens with a tower of their own."""

    def build(tokenizer, layers: int, width: int, tie: bool, rows: int):
        config, processor = _qwen2_vl(tokenizer, layers, width, tie, rows)
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        shared = {name: getattr(config, name) for name in names}
        text = {**_text(tokenizer, layers, width, tie, rows), "rope_parameters": config.text_config.rope_parameters}
        vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": width, "num_heads": 2, "intermediate_size": 32}
        if kind == "qwen2_5_vl":
            vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
            made = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **shared)
            name, images = "Qwen2_5_VLProcessor", processor.image_processor
        else:
            vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
            text |= {"head_dim": width // 4}
            made = tf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **shared)
            name = "Qwen3VLProcessor"
            images = tf.Qwen2VLImageProcessorPil(min_pixels=32 * 32, max_pixels=64 * 64, patch_size=16)
        return made, IMAGE_ONLY[name](image_processor=images, tokenizer=tokenizer, chat_template=QWEN_CHAT)

    return build


def _llava(tokenizer, layers: int, width: int, tie: bool, rows: int):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = tf.LlavaConfig(
        text_config={**_text(tokenizer, layers, width, tie, rows), "model_type": "llama", "rope_parameters": rope},
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 16,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=tie,
    )  # fmt: skip
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return config, tf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_CHAT,
        num_additional_image_tokens=1,
    )


def png(
    color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (56, 56), seed: int | None = None
) -> bytes:
    """A small picture as PNG bytes: one colour, or noise."""
    pixels = np.broadcast_to(np.array(color, np.uint8), (size[1], size[0], 3))
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG")
    return out.getvalue()


def turn(role: str, *parts: str) -> dict:
    """A chat message; the part "<image>" stands for an image."""
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def chats(count: int, seed: int = 0) -> list[tuple[str, dict, list[bytes]]]:
    """(key, record, images) of small chats with responses of unequal length; every fifth is text alone."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(count):
        answer = "ab" * int(random.integers(1, 9))
        question = [f"what is {index % 7}?"] if index % 5 == 4 else ["<image>", f"what is {index % 7}?"]
        images = [] if index % 5 == 4 else [png(seed=index)]
        record = {
            "id": f"sample {index}",
            "messages": [turn("user", *question), turn("assistant", answer)],
            "provenance": {"source": "tests", "index": index},
        }
        made.append((f"s{index:05d}", record, images))
    return made


def write_data(folder: Path, count: int, shards: int = 2, seed: int = 0, good: int = 1) -> Path:
    """A shard folder of `chats`, as `data_prep shard` would leave it; of every `good` samples one can be used."""
    samples = [
        (key, {"json": json.dumps(record).encode(), **{f"{i}.png": data for i, data in enumerate(images)}})
        for key, record, images in chats(count, seed)
    ]
    for number, (_, members) in enumerate(samples):
        if number % good:
            members["0.png"] = b"no picture"
    folder.mkdir(parents=True)
    size = -(-count // shards)
    entries = [
        write_shard(folder / shard_name(number), samples[number * size : (number + 1) * size])
        for number in range(shards)
    ]
    write_manifest(folder, entries, format=FORMAT, version=1, split="train")
    return folder
