"""A family's default config, shrunk by the names of its fields to a model of a few thousand weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING

WIDTH, HEAD, HEADS, DEPTH, TOWER_DEPTH = 64, 16, 4, 4, 3
VOCABULARY, FIRST_SPECIAL = 512, 400
SIDE = 4
"""An image is so many patches high and wide."""

_EXACT: dict[str, Any] = {
    "head_dim": HEAD, "qk_nope_head_dim": HEAD, "qk_rope_head_dim": HEAD, "v_head_dim": HEAD, "global_head_dim": HEAD,
    "q_lora_rank": 32, "kv_lora_rank": 32, "o_lora_rank": 32, "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY, "sliding_window": 16,
    "max_position_embeddings": 512, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "query_pre_attn_scalar": HEAD, "num_position_embeddings": 64,
    "attention_chunk_size": 16, "mm_tokens_per_image": 4, "num_nextn_predict_layers": 0,
    "hidden_size_per_layer_input": HEAD, "vision_use_head": False,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ADDED = {
    "gemma4": {"vision_config": "gemma4_vision"},
    "gemma4_unified": {"vision_config": "gemma4_unified_vision"},
}
"""Parts of a config, by their model types, that are left out of the default."""
_BY_KIND: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {SIDE * SIDE: 4}},
    "blip-2": {"image_token_index": FIRST_SPECIAL},
    "cohere_compass": {
        "text_config.rope_parameters": {kind: dict(_ROPE) for kind in ("full_attention", "sliding_attention")}
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", *["sparse"] * (DEPTH - 1)]},
    "apertus1p5": {"audio_config.codebook_dim": WIDTH, "text_config.vocab_size": 270_000},
    "dots3_note": {"text_config.num_key_value_heads": HEADS, "text_config.head_dim": 2 * HEAD},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "glm5_next": {"text_config.num_key_value_heads": HEADS, "text_config.qk_rope_head_dim": 0},
    "hunyuan_vl": {"text_config.head_dim": HEAD},
    "kimi_k25": {"text_config.num_key_value_heads": HEADS},
    "llama4": {"vision_config.intermediate_size": 4 * WIDTH},
    "minicpm_ocr": {"image_token_id": FIRST_SPECIAL},
    "minicpmv4_6": {"image_token_id": FIRST_SPECIAL},
    "minicpmv4_7": {"image_token_id": FIRST_SPECIAL},
    "mistral_large4": {
        "text_config.kv_source_layers": list(range(DEPTH)),
        "text_config.num_key_value_heads": HEADS,
    },
    "molmo2": {"adapter_config.vision_feature_layer": [2, 1], "adapter_config.vision_feature_layers": [2, 1]},
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},
    "muse_spark": {"out_hidden_size": 4 * WIDTH},
    "nemotron_h_omni": {"image_token_id": FIRST_SPECIAL},
    "qwen2_5_omni_thinker": {"vision_start_token_id": FIRST_SPECIAL + 90},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": FIRST_SPECIAL + 90},
    "qwen4_exp": {
        "text_config.indexer_n_heads": HEADS,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": HEAD,
        "text_config.indexer_budget": 64,
        "text_config.indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config.sliding_window": 16},
}
"""What a family's fields need beside their names' rules, or its default config lacks."""
_LEFT_OUT = ("transformers_version", "id2label", "label2id", "no_rope_layers")
_BY_NAME: list[tuple[str, Callable[[Any, bool], Any]]] = [
    (r"^(num_hidden_layers|depth|num_layers|n_layers|layers|num_encoder_layers)$", lambda _v, text: _depth(text)),
    (r"(num|n)_(key_value|global_key_value)_heads$|^num_key_value_heads$", lambda _v, _text: HEADS // 2),
    (r"(num_attention_heads|num_heads|n_heads|attention_heads|num_key_heads|num_value_heads)$", lambda _v, _t: HEADS),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$", lambda _v, _text: 4),
    (r"(num_experts_per_tok|moe_k|top_k_experts|moe_topk)$", lambda _v, _text: 2),
    (r"(key|value)_head_dim$", lambda _v, _text: HEAD),
    (r"(intermediate_size|ffn_hidden_size|ffn_dim|mlp_dim|ff_dim)$", lambda _v, _text: 2 * WIDTH),
    (
        r"(hidden_size|embed_dim|embed_proj_dim|vision_output_dim|projector_(in|out)put_dim|adapter_(in|out)_dim|adapter_(in|out)put_size|output_proj_dims|d_model|hidden_dim|out_channels|projection_dim|embedding_dim)$",
        lambda _v, _t: WIDTH,
    ),
]


def shrunk_config(kind: str) -> Any:
    """A small config of a family. Raises whatever transformers raises where it cannot be made."""
    whole = CONFIG_MAPPING[kind]().to_dict()
    whole |= {name: CONFIG_MAPPING[part]().to_dict() for name, part in _ADDED.get(kind, {}).items()}
    values = _shrink(whole, text=True, ids={})
    for path, value in _BY_KIND.get(kind, {}).items():
        *above, name = path.split(".")
        section = values
        for part in above:
            section = section[part]
        section[name] = value
    return CONFIG_MAPPING[kind](**values)


def _depth(text: bool) -> int:
    return DEPTH if text else TOWER_DEPTH


def _shrink(values: dict[str, Any], text: bool, ids: dict[str, int]) -> dict[str, Any]:
    kept = {
        name: value for name, value in values.items() if name not in ("transformers_version", "id2label", "label2id")
    }
    made = {name: _field(name, value, text, ids) for name, value in kept.items()}
    if made.get("per_layer_config"):
        made["per_layer_config"] = _of_single_layers(values["per_layer_config"], _depth(text), ids)
    _of_images(made)
    _of_layers(made, _depth(text), values.get("num_hidden_layers"))
    if "rope_parameters" in made:
        _of_rope(made["rope_parameters"], made.get("head_dim") or WIDTH // HEADS)
    return made


def _of_single_layers(layers: dict[str, Any], depth: int, ids: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Settings of single layers: those of the layers that are left, else the last one's, as of the layer types."""
    kept = {layer: values for layer, values in layers.items() if int(layer) < depth - 1}
    made = {**kept, str(depth - 1): layers[max(layers, key=int)]}
    heads = ("num_attention_heads", "num_key_value_heads")
    shrunk = {layer: _shrink(values, text=True, ids=ids) for layer, values in made.items()}
    return {layer: {name: v for name, v in values.items() if name not in heads} for layer, values in shrunk.items()}


def _field(name: str, value: Any, text: bool, ids: dict[str, int]) -> Any:
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return value
    if isinstance(value, dict):
        inner = text and not re.search(r"vision|vq|visual|audio|perceiver|qformer", name)
        return copy.deepcopy(value) if name.startswith("rope") else _shrink(value, inner, ids)
    if isinstance(value, bool) or value is None:
        return value
    if name in _EXACT:
        return _EXACT[name]
    if re.search(r"_token_(id|index)$", name):
        return ids.setdefault(name.replace("index", "id"), FIRST_SPECIAL + len(ids))
    if re.search(r"_token_ids$", name) and isinstance(value, list):
        return [ids.setdefault(f"{name}{place}", FIRST_SPECIAL + len(ids)) for place, _ in enumerate(value)]
    if isinstance(value, int):
        return next((make(value, text) for pattern, make in _BY_NAME if re.search(pattern, name)), value)
    return value


def _of_images(values: dict[str, Any]) -> None:
    if values.get("image_grid_pinpoints"):
        side = values["vision_config"]["image_size"]
        values["image_grid_pinpoints"] = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    patch, size = values.get("patch_size"), values.get("image_size")
    if isinstance(size, int) and isinstance(patch, int):
        values["image_size"] = SIDE * patch
    elif isinstance(size, (list, tuple)) and isinstance(patch, (list, tuple)):
        values["image_size"] = [SIDE * side for side in patch]


def _of_layers(values: dict[str, Any], depth: int, layers: int | None) -> None:
    """Lists of one entry a layer, and of layers' numbers; layers: as many as there were."""
    for name, value in values.items():
        if not isinstance(value, (list, tuple)) or not value:
            continue
        if re.search(r"layer_types|layers_block_type|_layer_types|activation_sparsity", name) or len(value) == layers:
            values[name] = [*value[: depth - 1], value[-1]]
        elif re.search(r"ind(ex|exes|ices)$|_layers?$", name) and all(isinstance(one, int) for one in value):
            values[name] = sorted({max(-depth, min(one, depth - 1)) for one in value})


def _of_rope(rope: Any, head: int) -> None:
    """Sections of rotary dimensions add up to what is rotated of a head."""
    for inner in rope.values() if isinstance(rope, dict) else ():
        if isinstance(inner, dict):
            _of_rope(inner, head)
    if isinstance(rope, dict) and "rope_theta" in rope:  # families that have no sections do not look for them
        pairs = int(head * (rope.get("partial_rotary_factor") or 1.0)) // 2
        parts = len(rope.get("mrope_section") or (0, 0, 0))
        others = [pairs // parts] * (parts - 1)
        rope["mrope_section"] = [pairs - sum(others), *others]
