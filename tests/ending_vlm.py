"""A tiny VLM of random weights whose greedy answers end: many of its tokens end a turn."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import write_vlm

SEEDS = {"qwen2_vl": 2, "llava_onevision": 0}
"""Of which some answers end within 16 tokens and some do not."""


def write_ending_vlm(folder: Path, kind: str = "qwen2_vl", seed: int | None = None) -> Path:
    write_vlm(folder, kind, 3, 32, seed=SEEDS[kind] if seed is None else seed)
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], *range(60, 130, 2)]}))
    return folder
