"""An example of what a user brings: a JSON file of chats in LLaVA's form, and the pictures that it names.

  python -m demo.chats first          # first/chats.json, first/pictures/*.png

The chats ask about the puzzles that the demo's teacher can solve (data_prep/puzzles.py), with right answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data_prep.puzzles import puzzle


def write_chats(folder: Path, count: int, seed: int) -> Path:
    """Write `count` chats of one question each, and their pictures; returns the JSON file. The same for one seed."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    chats = []
    for index in range(count):
        drawn, picture = puzzle(seed, index, "train"), f"{index:05d}.png"
        (folder / "pictures" / picture).write_bytes(drawn.image)
        turns = [("human", f"<image>\n{drawn.question}"), ("gpt", drawn.answer)]
        said = [{"from": speaker, "value": text} for speaker, text in turns]
        chats.append({"id": f"chat-{index:05d}", "image": picture, "conversations": said})
    path = folder / "chats.json"
    path.write_text(json.dumps(chats, indent=1), encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> None:
    """Write the chats that the command line asks for, and show the first."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.chats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="chats (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other puzzles (default: 0)")
    options = parser.parse_args(arguments)
    path = write_chats(options.folder, options.count, options.seed)
    first = json.loads(path.read_text(encoding="utf-8"))[:1]
    print(f"{path}: {options.count} chats. The first:\n{json.dumps(first[0], indent=2)}")


if __name__ == "__main__":
    main()
