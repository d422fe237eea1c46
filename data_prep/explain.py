"""`python -m data_prep shard --explain`: the first records, as they would be stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from data_prep.images import decode_image
from data_prep.records import convert_record
from data_prep.schema import BadSample, key_for

if TYPE_CHECKING:
    from data_prep.sharding import ShardJob

RECORDS = 3
"""How many records are explained."""


def explain(job: ShardJob) -> Iterator[str]:
    """For each of the first records, a text: its key, JSON and images, or why it is rejected. Raises DataError."""
    for location, record in islice(job.records(), RECORDS):
        try:
            converted = convert_record(location, record, job.source.name, job.convert)
        except BadSample as bad:
            yield f"{location}: rejected: {bad}"
            continue
        key, lines = key_for(converted.id), [f"{location}:"]
        for name, content in converted.members.items():
            lines.append(f"  {key}.{name}")
            lines += _json_lines(content) if name == "json" else [f"    {_describe(content)}"]
        if converted.notices:
            lines.append(f"  note: {', '.join(converted.notices)}; see docs/data_format.md")
        yield "\n".join(lines)


def _json_lines(content: bytes) -> list[str]:
    return [f"    {line}" for line in json.dumps(json.loads(content), indent=2, ensure_ascii=False).splitlines()]


def _describe(content: bytes) -> str:
    width, height = decode_image(content).size
    return f"{width} x {height} pixels, {len(content):,} bytes"
