"""Whether a step goes on with what it began with: the data and the number of updates, as its order and schedule need,
and what else it learns from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.shards import ShardFolder, data_fingerprint
from pipeline.errors import CheckpointError


def data_state(data: ShardFolder, updates: int, sources: Mapping[str, str] | None = None) -> dict[str, Any]:
    """For the step's checkpoint: the data's fingerprint, its number of samples, and the step's updates.

    sources: what else the step learns from, {its name in messages: SHA-256}.
    """
    state = {"fingerprint": data_fingerprint(data.manifest), "samples": len(data), "updates": updates}
    return {**state, "sources": dict(sources or {})}


def refuse_other_data(
    step: str, field: str, data: ShardFolder, saved: Mapping[str, Any], now: Mapping[str, Any], checkpoints: Path
) -> None:
    """Raise CheckpointError where a step's data, sources or number of updates are not those of its checkpoint.

    The samples of an update are places in a permutation of all of them, so it would read some again and others never.
    field: of the recipe, which names the data. saved, now: data_state of then and of now; older checkpoints have no
    sources, and go on with any.
    """
    again = f"remove {checkpoints} to begin {step} anew"
    if saved["fingerprint"] != now["fingerprint"]:
        expected, found = (
            f"{one['samples']:,} samples (fingerprint {one['fingerprint'][:12]})" for one in (saved, now)
        )
        raise CheckpointError(
            f"{step}: {data.path} ({field}) has changed since the step's checkpoint: expected {expected}, found "
            f"{found}. A step ends with the samples that it began with; shards may be added before it or after it. "
            f"Bring back the folder's earlier shards and manifest.json, or {again}. Then run the same command again"
        )
    if saved["updates"] != now["updates"]:
        raise CheckpointError(
            f"{step}: the step's checkpoint is of {saved['updates']} updates in all, the recipe now asks for "
            f"{now['updates']}, and the learning rate of each depends on it. Put {step}.steps or {step}.epochs back, "
            f"or {again}. Then run the same command again"
        )
    for name, expected in saved.get("sources", {}).items():
        if (found := now["sources"].get(name)) != expected:
            raise CheckpointError(
                f"{step}: the step's checkpoint was made with another {name}: expected SHA-256 {expected}, found "
                f"{found}. A step ends with what it began with. Put stage_1 and cache_from of the recipe back, or "
                f"{again}. Then run the same command again"
            )
