"""The page of the shipped recipes: each with its own text."""

from __future__ import annotations

from pathlib import Path

HEAD = """# The shipped recipes

A recipe is one YAML file and has every number of a run. Those in `recipes/` are a start: copy the nearest, and change
its models and data. [The fields of a recipe](recipe_fields.md) has the meaning of each key, and
`python -m pipeline plan --recipe R` says what a recipe will need before anything is started.
"""


def recipes_page(folder: Path) -> str:
    """The page as Markdown, a chapter for each *.yaml of a folder."""
    chapters = [
        f"\n## `recipes/{path.name}`\n\n```yaml\n{path.read_text(encoding='utf-8')}```\n"
        for path in sorted(folder.glob("*.yaml"))
    ]
    return HEAD + "".join(chapters)
