"""More families of tiny models from config, each with its own processor: what the pairs of tiny.py do not show.

Random weights, the byte-level tokenizer with each family's own special tokens, real classes, no download.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny import CHAT, QWEN_CHAT, byte_tokenizer
from transformers.utils import is_torchvision_available

from pipeline.vlm.image_only import IMAGE_ONLY

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
IMAGE = 28
"""Side of a picture in pixels, where a family has one; 2 x 2 patches of 14."""


def write_family(folder: Path, kind: str, layers: int, width: int = 32, seed: int = 0) -> Path:
    """A random tiny VLM of one of FAMILIES, as a Hugging Face folder."""
    config, processor = FAMILIES[kind](layers, width)
    torch.manual_seed(seed)
    model = tf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # what starts at 0 or 1, as norms do, would hide an offset or another part's gradient
        for parameter in model.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(**special: str) -> Any:
    """The byte tokenizer, with special tokens under the names by which a processor asks for them."""
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special,
        model_max_length=4096,
    )


def _text(tokenizer: Any, layers: int, width: int, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 1024,
        "rope_parameters": dict(ROPE),
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        **more,
    }


def _siglip(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": IMAGE, "patch_size": 14, "vision_use_head": False, **more,
    }  # fmt: skip


def _qwen3(config: type, text_kind: str, vision: dict[str, Any] | None = None, **text: Any):
    """Families that take Qwen3-VL's tower, tokens and processor."""

    def build(layers: int, width: int):
        tokenizer = byte_tokenizer()
        token = tokenizer.convert_tokens_to_ids
        rope = {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
        made = config(
            text_config=_text(tokenizer, layers, width, text_kind, **{"rope_parameters": rope, **text}),
            vision_config={
                "depth": 2, "hidden_size": 16, "out_hidden_size": width, "num_heads": 2, "intermediate_size": 32,
                "patch_size": 16, "num_position_embeddings": 64, **(vision or {}),
            },
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )  # fmt: skip
        images = tf.Qwen2VLImageProcessorPil(min_pixels=32 * 32, max_pixels=64 * 64, patch_size=16)
        form = IMAGE_ONLY["Qwen3VLProcessor"]
        return made, form(image_processor=images, tokenizer=tokenizer, chat_template=QWEN_CHAT)

    return build


def _gemma3(layers: int, width: int):
    """Norms with an offset of 1, scaled embeddings, sliding attention, a soft-cap, and a mask from token types."""
    tokenizer = _tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token="<image_soft>")
    config = tf.Gemma3Config(
        text_config=_text(
            tokenizer, layers, width, "gemma3_text", final_logit_softcapping=1.0, sliding_window=16,
            layer_types=["sliding_attention", "full_attention"] * (layers // 2) + ["full_attention"] * (layers % 2),
            query_pre_attn_scalar=width // 4,
            rope_parameters={"sliding_attention": dict(ROPE), "full_attention": dict(ROPE)},
        ),
        vision_config=_siglip(),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    images = tf.Gemma3ImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    template = CHAT.replace("IMAGE", "<boi>")
    return config, tf.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)


def _idefics3(layers: int, width: int):
    tokenizer = _tokenizer(fake="<fake_token_around_image>", end="<end_of_utterance>", all="<global-img>")
    config = tf.Idefics3Config(
        text_config=_text(tokenizer, layers, width, "llama"),
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": IMAGE, "patch_size": 14,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    sizes = {"size": {"longest_edge": IMAGE}, "max_image_size": {"longest_edge": IMAGE}}
    images = tf.Idefics3ImageProcessorPil(do_image_splitting=False, **sizes)
    template = CHAT.replace("IMAGE", "<image>")
    return config, tf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def _smolvlm(layers: int, width: int):
    old, processor = _idefics3(layers, width)
    config = tf.SmolVLMConfig(
        text_config=old.text_config.to_dict(),
        vision_config={**old.vision_config.to_dict(), "model_type": "smolvlm_vision"},
        image_token_id=old.image_token_id,
        scale_factor=1,
        tie_word_embeddings=False,
    )
    sizes = {"size": {"longest_edge": IMAGE}, "max_image_size": {"longest_edge": IMAGE}}
    images = tf.SmolVLMImageProcessorPil(do_image_splitting=False, **sizes)
    form = IMAGE_ONLY["SmolVLMProcessor"]
    template = processor.chat_template
    return config, form(image_processor=images, tokenizer=processor.tokenizer, image_seq_len=4, chat_template=template)


def _llava_next(layers: int, width: int):
    tokenizer = byte_tokenizer()
    grid = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]
    config = tf.LlavaNextConfig(
        text_config=_text(tokenizer, layers, width, "llama"),
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": IMAGE, "patch_size": 14, "projection_dim": 16,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )  # fmt: skip
    side = {"height": IMAGE, "width": IMAGE}
    images = tf.LlavaNextImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size=side, image_grid_pinpoints=grid)
    return config, tf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT.replace("IMAGE", "<image>\n"),
        num_additional_image_tokens=1,
    )


def _internvl(layers: int, width: int):
    tokenizer = _tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = tf.InternVLConfig(
        text_config=_text(tokenizer, layers, width, "qwen2"),
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [IMAGE, IMAGE], "patch_size": [7, 7],
        },
        image_token_id=tokenizer.context_image_token_id,
        downsample_ratio=0.5,
        image_seq_length=4,
    )  # fmt: skip
    images = tf.GotOcr2ImageProcessorPil(size={"height": IMAGE, "width": IMAGE}, crop_to_patches=False)
    form = IMAGE_ONLY["InternVLProcessor"]
    template = CHAT.replace("IMAGE", "<IMG_CONTEXT>\n")
    return config, form(image_processor=images, tokenizer=tokenizer, image_seq_length=4, chat_template=template)


def _ovis2(layers: int, width: int):
    names = ["<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = _tokenizer(**{f"ovis_{index}": name for index, name in enumerate(names)})
    config = tf.Ovis2Config(
        text_config=_text(tokenizer, layers, width, "qwen2"),
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": IMAGE, "patch_size": 7, "num_visual_indicator_tokens": 5, "vocab_size": 40,
            "hidden_stride": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=[tokenizer.convert_tokens_to_ids(n) for n in names if n != "<IMG_ATOM>"],
        hidden_size=width,
        vocab_size=len(tokenizer),
    )  # fmt: skip
    images = tf.Ovis2ImageProcessorPil(size={"height": IMAGE, "width": IMAGE}, crop_to_patches=False)
    template = CHAT.replace("IMAGE", "<image>")
    return config, tf.Ovis2Processor(images, tokenizer, image_seq_length=4, chat_template=template)


def _mistral3(layers: int, width: int):
    tokenizer = _tokenizer(img="[IMG]", img_break="[IMG_BREAK]", img_end="[IMG_END]")
    config = tf.Mistral3Config(
        text_config=_text(tokenizer, layers, width, "mistral", sliding_window=None),
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": IMAGE, "patch_size": 7, "rope_parameters": dict(ROPE),
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    images = tf.PixtralImageProcessor(size={"longest_edge": IMAGE}, patch_size={"height": 7, "width": 7})
    template = CHAT.replace("IMAGE", "[IMG]")
    return config, tf.PixtralProcessor(images, tokenizer, patch_size=7, spatial_merge_size=2, chat_template=template)


def _cohere2_vision(layers: int, width: int):
    """Attention and MLP side by side, sliding attention, a tied head, and a logit scale that the model leaves out."""
    tokenizer = _tokenizer(
        boi_token="<|START_OF_IMG|>", eoi_token="<|END_OF_IMG|>", image_token="<|IMG_PATCH|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )  # fmt: skip
    kinds = ["sliding_attention", "full_attention"] * layers
    config = tf.Cohere2VisionConfig(
        text_config=_text(tokenizer, layers, width, "cohere2", sliding_window=16, layer_types=kinds[:layers]),
        vision_config=_siglip(patch_size=7),
        image_token_id=tokenizer.image_token_id,
        downsample_factor=2,
        alignment_intermediate_size=2 * width,
    )
    images = tf.Cohere2VisionImageProcessor(
        size={"height": IMAGE, "width": IMAGE}, patch_size=7, downsample_factor=2, crop_to_patches=False
    )
    images.patch_size = 2
    return config, tf.Cohere2VisionProcessor(images, tokenizer, chat_template=CHAT.replace("IMAGE", "<|IMG_PATCH|>"))


def _lfm2_vl(layers: int, width: int):
    """Short convolutions between attention layers, whose weight is read uncalled; a final norm of another name."""
    tokenizer = _tokenizer(
        image_token="<|img|>", image_start_token="<|image_start|>", image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )  # fmt: skip
    kinds = ["conv", "full_attention"] * layers
    config = tf.Lfm2VlConfig(
        text_config=_text(
            tokenizer, layers, width, "lfm2", layer_types=kinds[:layers], block_auto_adjust_ff_dim=False, conv_L_cache=3
        ),
        vision_config={
            "model_type": "siglip2_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "patch_size": 7, "num_patches": 16, "vision_use_head": False,
        },
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=32,
        downsample_factor=2,
    )  # fmt: skip
    images = tf.Lfm2VlImageProcessor(
        do_image_splitting=False, use_thumbnail=False, encoder_patch_size=7, downsample_factor=2, tile_size=IMAGE,
        min_image_tokens=1, max_image_tokens=4,
    )  # fmt: skip
    return config, tf.Lfm2VlProcessor(images, tokenizer, chat_template=CHAT.replace("IMAGE", "<|img|>"))


def _llama4(layers: int, width: int):
    """Experts, attention in chunks, and layers without positions."""
    tokenizer = _tokenizer(
        image="<|image|>", begin="<|image_start|>", end="<|image_end|>", patch="<|patch|>",
        across="<|tile_x_separator|>", down="<|tile_y_separator|>",
    )  # fmt: skip
    config = tf.Llama4Config(
        text_config=_text(
            tokenizer, layers, width, "llama4_text", intermediate_size_mlp=2 * width, num_local_experts=4,
            attention_chunk_size=64,
        ),
        vision_config={
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": IMAGE, "patch_size": 7, "vision_output_dim": 32, "projector_input_dim": 32,
            "projector_output_dim": 32, "rope_parameters": dict(ROPE),
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
    )  # fmt: skip
    images = tf.Llama4ImageProcessor(size={"height": IMAGE, "width": IMAGE}, max_patches=1)
    return config, tf.Llama4Processor(images, tokenizer, patch_size=7, chat_template=CHAT.replace("IMAGE", "<|image|>"))


MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
HYBRID = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2, "full_attention_interval": 2,
}  # fmt: skip
FAMILIES = {
    "qwen3_vl_moe": _qwen3(tf.Qwen3VLMoeConfig, "qwen3_vl_moe_text", {"deepstack_visual_indexes": [0, 1]}, **MIXTURE),
    "qwen3_5": _qwen3(tf.Qwen3_5Config, "qwen3_5_text", **HYBRID),
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "llava_next": _llava_next,
    "internvl": _internvl,
    "ovis2": _ovis2,
    "mistral3": _mistral3,
    "cohere2_vision": _cohere2_vision,
    "lfm2_vl": _lfm2_vl,
    "llama4": _llama4,
}
"""What each kind of family needs of the pipeline is in its builder's words."""
NEED_TORCHVISION = ("mistral3", "cohere2_vision", "lfm2_vl", "llama4")
"""transformers builds their processors only where torchvision can be imported."""
BROKEN = {"llama4": "5.24"}
"""The transformers in which a family's own forward fails; tests/bench/families holds the pipeline to saying so."""


def as_parameter(kind: str, *marks: pytest.MarkDecorator) -> Any:
    """A family as a test's parameter, skipped where this installation cannot run it."""
    broken = tf.__version__.startswith(BROKEN.get(kind, "none"))
    lacks = kind in NEED_TORCHVISION and not is_torchvision_available()
    reason = f"transformers {tf.__version__} cannot run it" if broken else "needs torchvision: make test-torchvision"
    return pytest.param(kind, marks=[*marks, pytest.mark.skipif(broken or lacks, reason=reason)])
