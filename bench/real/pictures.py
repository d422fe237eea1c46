"""Tux Paint's stamps and OpenMoji as 72 x 72 PNGs with their captions. Both are fetched; nothing of them is committed.

  python -m bench.real.pictures        writes build/real/pictures, once

Stamps come from Debian's package tuxpaint-stamps-default (GPL-2), through apt-get; OpenMoji from the npm package
openmoji (CC BY-SA 4.0), through npm. Without these programs, put the .deb or the .tgz into build/real/download.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from data_prep.shards import write_file

FOLDER = Path("build/real")
PICTURES = FOLDER / "pictures"
INDEX = PICTURES / "pictures.jsonl"
SIDE = 72
"""Pixels of a side."""
PARTS = (("held_out", 15), ("teacher", 60), ("student", 100))
"""Part -> upper bound of the percentiles of a caption's hash. All pictures of one caption are in one part."""

STAMPS = "tuxpaint-stamps-default_2022.06.04-1_all.deb"
OPENMOJI = "openmoji-17.0.0.tgz"

STAMP_GROUPS = {
    "animals": "animals and nature", "plants": "animals and nature", "food": "food and drink", "people": "people",
    "clothes": "objects", "household": "objects", "medical": "objects", "military": "objects", "hobbies": "objects",
    "town": "travel and places", "vehicles": "travel and places", "space": "travel and places",
    "naturalforces": "travel and places", "symbols": "symbols", "sports": "activities", "seasonal": "activities",
}  # fmt: skip
"""Folder of a stamp -> what it is called in questions."""
EMOJI_GROUPS = {
    "animals-nature": "animals and nature", "food-drink": "food and drink", "people-body": "people",
    "objects": "objects", "travel-places": "travel and places", "symbols": "symbols", "activities": "activities",
    "flags": "flags", "smileys-emotion": "smileys",
}  # fmt: skip
"""Group of an emoji -> the same. Emoji of other groups (brands, interface elements) are left out."""


@dataclass(frozen=True)
class Picture:
    """A picture and what its makers say of it."""

    file: str
    """Name in PICTURES."""
    caption: str
    group: str
    part: str
    """teacher, student (who learn from it) or held_out."""


def main() -> None:
    """`python -m bench.real.pictures`. Exit code 1 where something cannot be fetched."""
    if INDEX.exists():
        return
    PICTURES.mkdir(parents=True, exist_ok=True)
    found, skipped = [], 0
    for name, caption, group, data in [*_stamps(), *_emoji()]:
        picture = _draw(data)
        if picture is None:
            skipped += 1
            continue
        picture.save(PICTURES / name)
        found.append(Picture(name, caption, group, part_of(caption)))
    write_file(INDEX, "".join(f"{json.dumps(asdict(one))}\n" for one in found).encode())
    print(f"{len(found)} pictures in {PICTURES}; {skipped} could not be drawn", file=sys.stderr)


def read_index() -> list[Picture]:
    """All pictures. Raises FileNotFoundError before main has run."""
    return [Picture(**json.loads(line)) for line in INDEX.read_text().splitlines()]


def part_of(caption: str) -> str:
    """The part of a caption, drawn by its hash."""
    percentile = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big") % 100
    return next(part for part, bound in PARTS if percentile < bound)


def _stamps() -> Iterator[tuple[str, str, str, bytes]]:
    """(name, caption, group, image file) of each stamp that has a picture."""
    folder = FOLDER / "stamps"
    if not folder.exists():
        package = _download(STAMPS, ("apt-get", "download", "tuxpaint-stamps-default"))
        partial = FOLDER / ".stamps-partial"
        subprocess.run(("dpkg-deb", "-x", package, partial), check=True)
        partial.rename(folder)
    root = folder / "usr/share/tuxpaint/stamps"
    for text in sorted(root.rglob("*.txt")):
        files = [file for suffix in (".png", ".svg") if (file := text.with_suffix(suffix)).exists()]
        caption = text.read_text(encoding="utf8").split("\n", 1)[0].strip()
        if files and caption:
            place = text.relative_to(root)
            yield (
                f"stamp-{'-'.join(place.with_suffix('').parts)}.png",
                caption,
                STAMP_GROUPS[place.parts[0]],
                files[0].read_bytes(),
            )


def _emoji() -> Iterator[tuple[str, str, str, bytes]]:
    """The same of each emoji without a skin tone."""
    archive = _download(OPENMOJI, ("npm", "pack", "--silent", "openmoji@17.0.0"))
    with tarfile.open(archive) as files:
        by_name = {file.name: file for file in files.getmembers()}
        records = json.load(_opened(files, by_name["package/data/openmoji.json"]))
        for record in records:
            if record["group"] in EMOJI_GROUPS and not record["skintone"]:
                data = _opened(files, by_name[f"package/color/svg/{record['hexcode']}.svg"]).read()
                yield f"emoji-{record['hexcode']}.png", record["annotation"], EMOJI_GROUPS[record["group"]], data


def _opened(files: tarfile.TarFile, file: tarfile.TarInfo) -> io.BufferedReader | tarfile.ExFileObject:
    opened = files.extractfile(file)
    if opened is None:
        raise ValueError(f"{file.name} of {OPENMOJI} is no file")
    return opened


def _download(name: str, command: tuple[str, ...]) -> Path:
    """The file of that name, fetched by a command that writes it where it runs. Exits where that does not work."""
    folder = FOLDER / "download"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if path.exists():
        return path
    if shutil.which(command[0]) is None:
        sys.exit(f"error: {command[0]} is not installed; fetch {name} elsewhere and put it into {folder}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if not path.exists():
        sys.exit(f"error: `{' '.join(command)}` did not write {path}; fetch it elsewhere.\n{done.stderr[-2000:]}")
    return path


def _draw(data: bytes) -> Image.Image | None:
    """A picture on white, SIDE pixels square; None for an SVG that resvg cannot size."""
    if data.lstrip()[:1] == b"<":
        import resvg_py

        try:
            data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=2 * SIDE))
        except ValueError:
            return None
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2), picture)
    return square


if __name__ == "__main__":
    main()
