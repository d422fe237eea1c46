"""The site's pages in one folder: those of docs/ and the repository's root, and those made from the code.

Links are written as they work in the repository. A page moves (README.md becomes index.md), so its links are written
anew; a linked file that is no page, such as a result in bench/, is copied into the site.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import yaml

from docs.site.commands import commands_page
from docs.site.recipe_fields import recipe_fields_page
from docs.site.recipes import recipes_page

FROM_ROOT = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
"""Pages from the repository's root -> their place in the site."""
INDEX, COMMANDS = "decisions/index.md", "commands.md"
MADE = {"docs/decisions": INDEX, "pipeline/recipe/schema.py": "recipe_fields.md", "recipes": "shipped_recipes.md"}
"""What a link in the repository leads to -> the page that is made from it."""
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def write_pages(root: Path, output: Path) -> None:
    """Write OUTPUT/mkdocs.yml and OUTPUT/pages/.

    Raises FileNotFoundError, naming page and link, for a broken link, and ValueError where two pages would be one.
    """
    for folder in ("pages", "site"):
        shutil.rmtree(output / folder, ignore_errors=True)
    places = sources(root)
    if taken := set(places.values()) & {*MADE.values(), COMMANDS}:
        raise ValueError(f"a page that is made and one of the repository would both be {', '.join(sorted(taken))}")
    pages = output / "pages"
    for source, place in places.items():
        _write(pages / place, relinked(source.read_text(encoding="utf-8"), source, root, pages))
    decisions = [place for place in places.values() if place.startswith("decisions/")]
    _write(pages / INDEX, _index(pages, decisions))
    _write(pages / MADE["pipeline/recipe/schema.py"], recipe_fields_page())
    _write(pages / MADE["recipes"], recipes_page(root / "recipes"))
    _write(pages / COMMANDS, commands_page())
    shutil.copytree(root / "docs" / "figures", pages / "figures")
    shutil.copytree(root / "docs" / "site" / "assets", pages / "assets")
    _write(output / "mkdocs.yml", _configuration(root, decisions))


def sources(root: Path) -> dict[Path, str]:
    """Each page that is a file of the repository -> its place in the site."""
    docs = root / "docs"
    found = sorted(docs.glob("*.md")) + sorted((docs / "decisions").glob("*.md"))
    return {path: path.relative_to(docs).as_posix() for path in found} | {
        root / name: place for name, place in FROM_ROOT.items()
    }


def relinked(text: str, source: Path, root: Path, pages: Path) -> str:
    """A page's text with its relative links as the site has them; copies the files that they need into the site."""
    place = sources(root)[source]

    def replace(link: re.Match) -> str:
        target = link[2]
        if re.match(r"[a-z]+:", target):
            return link[0]
        path = Path(os.path.normpath(source.parent / target))
        return f"{link[1]}{os.path.relpath(_in_site(path, source, root, pages), Path(place).parent)}{link[3]}"

    return "".join(part if part.startswith("`") else _LINK.sub(replace, part) for part in _CODE.split(text))


def _in_site(path: Path, source: Path, root: Path, pages: Path) -> str:
    """Where a linked file lies in the site."""
    if path in (known := sources(root)):
        return known[path]
    inside = path.relative_to(root).as_posix()
    if inside in MADE:
        return MADE[inside]
    if inside.startswith("docs/figures/") and path.is_file():
        return inside.removeprefix("docs/")
    if not path.is_file():
        raise FileNotFoundError(f"{source.relative_to(root)}: expected a file behind the link to {inside}, found none")
    copy = pages / "files" / inside
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, copy)
    return f"files/{inside}"


def _index(pages: Path, decisions: list[str]) -> str:
    """A page with a link to each decision, by its title."""
    titles = {place: _title((pages / place).read_text(encoding="utf-8")) for place in decisions}
    lines = [f"* [{title}]({place.removeprefix('decisions/')})" for place, title in titles.items()]
    return "# Decisions\n\nWhat was chosen, why, and what was given up.\n\n" + "\n".join(lines) + "\n"


def _title(text: str) -> str:
    return text.splitlines()[0].removeprefix("# ")


def _configuration(root: Path, decisions: list[str]) -> str:
    """mkdocs.yml with the decisions in its nav."""
    configuration = yaml.safe_load((root / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    for group in configuration["nav"]:
        for entries in group.values():
            for entry in entries if isinstance(entries, list) else []:
                if entry.get("Decisions") == INDEX:
                    entry["Decisions"] = [INDEX, *decisions]
    return yaml.safe_dump(configuration, sort_keys=False)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
