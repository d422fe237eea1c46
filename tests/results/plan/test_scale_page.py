"""docs/scale.md: its blocks are what its commands print. Run as a program, it writes them anew."""

from __future__ import annotations

import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "scale.md"
BLOCK = re.compile(r"```console\n\$ (?P<command>(?:[^\n]*\\\n)*[^\n]*)\n(?P<output>.*?)```", re.DOTALL)


def output_of(command: str) -> str:
    """What a command of the page prints, without spaces at line ends."""
    from pipeline.__main__ import main

    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "pipeline"], command
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(words[3:]) == 0
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())


def rewritten(page: str) -> str:
    """The page with every block's output made again."""
    return BLOCK.sub(lambda m: f"```console\n$ {m['command']}\n{output_of(m['command'])}```", page)


def test_every_block_is_what_its_command_prints(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = PAGE.read_text(encoding="utf-8")
    assert BLOCK.search(page)
    assert rewritten(page) == page, "docs/scale.md is out of date: run python tests/results/plan/test_scale_page.py"


def test_numbers_in_the_text_stand_in_a_block():
    """Each number with a decimal point, such as 23.3 hours, was printed by a command of the page."""
    page = PAGE.read_text(encoding="utf-8")
    printed = set(re.findall(r"\d+\.\d+", " ".join(match["output"] for match in BLOCK.finditer(page))))
    said = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", BLOCK.sub("", page)))
    assert said - printed == set()


@pytest.mark.parametrize("name", ["qwen2_vl_72b", "qwen2_vl_7b", "qwen2_vl_2b"])
def test_config_files_are_shipped(name):
    assert (ROOT / "recipes" / "configs" / name / "config.json").is_file()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
