"""Which answers changed between the untouched and the distilled student, and one of each kind to trace."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEFORE, AFTER = "untouched", "distilled"


@dataclass(frozen=True)
class Change:
    """The held-out samples whose answers went one way."""

    way: str
    samples: int
    key: str
    """The first of them, by key; empty where there is none."""
    command: str
    """What traces it; empty where there is none."""


def changes(run: Path, evaluation: Mapping[str, Mapping[str, Any]]) -> list[Change]:
    """Wrong to right, right to wrong, and wrong in both; empty where the two were not evaluated on the same data."""
    before, after = evaluation.get(BEFORE, {}), evaluation.get(AFTER, {})
    if "wrong" not in before or "wrong" not in after or before.get("data") != after.get("data"):
        return []
    unusable = {one["key"] for result in (before, after) for one in result.get("rejected", [])}
    was, now = set(before["wrong"]) - unusable, set(after["wrong"]) - unusable
    ways = {"wrong to right": was - now, "right to wrong": now - was, "wrong in both": was & now}
    return [_change(run, way, keys, before.get("data")) for way, keys in ways.items()]


def _change(run: Path, way: str, keys: set[str], data: str | None) -> Change:
    if not keys:
        return Change(way, 0, "", "")
    key = min(keys)
    words = ["python", "-m", "pipeline", "trace", "--run", str(run), "--sample", key]
    words += ["--data", data] if data is not None else []
    return Change(way, len(keys), key, shlex.join([*words, "--page", str(run / "trace.html")]))
