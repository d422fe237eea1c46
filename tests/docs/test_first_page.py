"""docs/first_distillation.md: its commands are ones that the programs take, and its recipe is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import launch.train
import pipeline.__main__
from demo.chats import write_chats
from pipeline.recipe.resolve import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "first_distillation.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The words of each line of the page that begins with a prompt, its continuation lines included."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


def test_every_command_is_one_that_its_program_takes():
    ours = [words[3:] for words in commands() if words[:3] == ["python", "-m", "pipeline"]]
    assert [pipeline.__main__.parse(words).command for words in ours] == [
        "plan", "status", "evaluate", "trace", "report", "push",
    ]  # fmt: skip
    stages = [words[words.index("launch/train.py") + 1 :] for words in commands() if "launch/train.py" in words]
    assert [launch.train.parse(words).stage for words in stages] == [1, 2]


def test_its_recipe_is_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "first.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "first.yaml").recipe
    assert recipe.reinforce.steps == 0 and recipe.interact.cross_entropy_weight > 0
    assert recipe.teacher.path.is_dir() and recipe.student.path.is_dir()


def test_its_data_is_sharded_as_it_says(tmp_path, capsys):
    """With fewer chats: the page's own options, and every chat is used."""
    import data_prep.__main__

    write_chats(tmp_path / "first", 20, seed=0)
    (shard,) = (words[3:] for words in commands() if words[3:4] == ["shard"])
    place = {word: str(tmp_path / word) for word in shard if word.startswith(("first", "data/"))}
    assert data_prep.__main__.main([place.get(word, word) for word in shard]) == 0
    assert data_prep.__main__.main(["lint", str(tmp_path / "data" / "first")]) == 0
    assert "all good" in capsys.readouterr().out
