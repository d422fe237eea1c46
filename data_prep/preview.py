"""`python -m data_prep preview`: samples on one HTML page, with the images in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.atomic import write_file
from data_prep.images import check_image, decode_image
from data_prep.schema import validate_record
from data_prep.shards import RawSample, ShardFolder

MAX_SIDE = 480
"""Largest side of an image on the page, in pixels; smaller images are embedded as they are."""

MIME = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "gif": "image/gif", "bmp": "image/bmp"}
"""Suffix -> media type, of the formats that browsers show. Others are embedded as PNG."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --line: light-dark(#d8d8de, #3a3a42); --soft: light-dark(#666, #a0a0aa);
  --card: light-dark(#fff, #1d1d22); --ours: light-dark(#eef4ff, #1c2740); }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem; background: light-dark(#f6f6f8, #131317); }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin: 2rem 0 .8rem; }} .soft {{ color: var(--soft); }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }}
article {{ background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem; }}
img {{ display: block; max-width: 100%; min-width: 6rem; border-radius: .3rem; margin: .3rem 0; }}
p {{ margin: .35rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
.assistant {{ background: var(--ours); border-radius: .4rem; padding: .3rem .6rem; }}
.role, footer {{ font-size: .78rem; color: var(--soft); overflow-wrap: anywhere; }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def preview(folders: list[ShardFolder], count: int, output: Path) -> int:
    """Write a page of up to `count` samples of each folder, evenly spaced; returns how many it shows.

    Raises DataError where a shard is damaged, BadSample where an image is.
    """
    shown, sections = 0, []
    for folder in folders:
        few = min(count, len(folder))
        cards = [_card(folder.read(place * len(folder) // few)) for place in range(few)]
        shown += len(cards)
        head = f"{folder.path.name} <span class=soft>{len(cards)} of {len(folder):,} samples</span>"
        sections.append(f"<h2>{head}</h2><main>{''.join(cards)}</main>")
    title = f"{html.escape(str(output.parent))}: data preview"
    write_file(output, PAGE.format(title=title, body="".join(sections)).encode())
    return shown


def _card(sample: RawSample) -> str:
    validate_record(sample.record, sample.images)
    images = iter(sample.images)
    turns = "".join(_turn(turn, images) for turn in sample.record["messages"])
    notes = {"type": sample.record.get("question_type"), **sample.record["provenance"]}
    foot = html.escape(", ".join(f"{name}: {value}" for name, value in notes.items() if value is not None))
    return f"<article>{turns}<footer><b>{html.escape(sample.key)}</b> {foot}</footer></article>"


def _turn(turn: dict[str, Any], images: Iterator[bytes]) -> str:
    parts = (
        f'<img alt="" src="{_data_uri(next(images))}">'
        if part["type"] == "image"
        else f"<p>{html.escape(part['text'])}</p>"
        for part in turn["content"]
    )
    role = html.escape(turn["role"])
    return f'<div class="{role}"><span class="role">{role}</span>{"".join(parts)}</div>'


def _data_uri(content: bytes) -> str:
    from PIL import Image

    suffix = check_image(content)[0]
    with Image.open(io.BytesIO(content)) as image:
        if max(image.size) > MAX_SIDE or suffix not in MIME:
            small = decode_image(content)
            small.thumbnail((MAX_SIDE, MAX_SIDE))
            buffer = io.BytesIO()
            small.save(buffer, "PNG")
            content, suffix = buffer.getvalue(), "png"
    return f"data:{MIME[suffix]};base64,{base64.b64encode(content).decode()}"
