"""How large the demo models are: Qwen2-VL, shrunk."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

from demo.vocabulary import MERGE, PATCH


@dataclass(frozen=True)
class Size:
    """The numbers by which teacher and student differ."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    tower_blocks: int
    tower_width: int
    tower_heads: int


SIZES = {
    "demo": {
        "teacher": Size(layers=8, width=128, heads=4, kv_heads=2, tower_blocks=3, tower_width=64, tower_heads=4),
        "student": Size(layers=4, width=48, heads=3, kv_heads=3, tower_blocks=2, tower_width=48, tower_heads=3),
    },
    "wide": {
        "teacher": Size(layers=12, width=256, heads=8, kv_heads=4, tower_blocks=4, tower_width=96, tower_heads=4),
        "student": Size(layers=6, width=96, heads=4, kv_heads=4, tower_blocks=3, tower_width=64, tower_heads=4),
    },
}
"""Name -> role -> size. demo is what ships; wide is for a GPU, and has not been trained yet."""


def model_config(size: Size, tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """Write a transformers configuration for a size.

    Rotary angles differ from Qwen2-VL's in two ways. With theta 10,000 and few dimensions a head, the slowest
    frequencies, which Qwen2-VL gives to columns, would hardly tell one tile from the next: theta is 100. And columns
    get most of the frequencies, since the order of the tiles is what a puzzle is about.
    """
    token = tokenizer.convert_tokens_to_ids
    pairs = size.width // size.heads // 2
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.width,
        "intermediate_size": 2 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [pairs // 8, pairs // 8, pairs - 2 * (pairs // 8)],
        },
    }
    vision = {
        "depth": size.tower_blocks,
        "embed_dim": size.tower_width,
        "hidden_size": size.width,
        "num_heads": size.tower_heads,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
