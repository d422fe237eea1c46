"""A recipe's values as YAML, each with a comment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

COLUMN = 38
"""Where comments begin, beside shorter values."""
WIDTH = 120
"""Of a line; a longer comment stands above its value."""


def written(values: Mapping[str, Any], reasons: Mapping[str, str], head: Sequence[str]) -> str:
    """Flat keys, in any order, as YAML in sections: {"interact.epochs": 1} with its reason as a comment."""
    plain = [key for key in values if "." not in key]
    sections = dict.fromkeys(key.partition(".")[0] for key in values if "." in key)
    lines = [*(f"# {line}" for line in head), "", *_lines(plain, "", values, reasons), ""]
    for section in sections:
        keys = [key for key in values if key.startswith(f"{section}.")]
        lines += [f"{section}:", *_lines(keys, "  ", values, reasons)]
    return "\n".join(lines) + "\n"


def _lines(keys: Sequence[str], indent: str, values: Mapping[str, Any], reasons: Mapping[str, str]) -> Iterator[str]:
    for key in keys:
        value = yaml.safe_dump(values[key], default_flow_style=True, width=10**6).split("\n...")[0].strip()
        line = f"{indent}{key.rpartition('.')[2]}: {value}"
        beside = f"{line:<{COLUMN}} # {reasons[key]}"
        if len(beside) <= WIDTH:
            yield beside
        else:
            yield f"{indent}# {reasons[key]}"
            yield line
