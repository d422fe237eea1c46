"""The recipes that come with the package: their names, pairs and the line that each begins with."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.errors import RecipeError
from pipeline.recipe.resolve import SHIPPED

RECIPES = SHIPPED / "recipes"
CONFIGS = RECIPES / "configs"
"""config.json of the models that recipes name: `plan` needs no more of a model."""


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe of the package."""

    path: Path

    @property
    def name(self) -> str:
        """Its file's name without .yaml."""
        return self.path.stem

    @property
    def pair(self) -> str:
        """TEACHER -> STUDENT, by the names of their folders."""
        return " -> ".join(self._models().values())

    @property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text(encoding="utf-8")

    @property
    def line(self) -> str:
        """The first sentence of the comment that the file begins with."""
        comment = self.text.partition("\n\n")[0].splitlines()
        words = " ".join(line.removeprefix("#").strip() for line in comment)
        return words.partition(". ")[0].removesuffix(".")

    def configs(self) -> dict[str, Path]:
        """{"teacher" or "student": folder with the shipped config.json of that model}, as far as there is one."""
        folders = {role: config_folder(model) for role, model in self._models().items()}
        return {role: folder for role, folder in folders.items() if folder.is_dir()}

    def _models(self) -> dict[str, str]:
        """The names of both models' folders. A run's folder is not looked at, as load_recipe does."""
        values = yaml.safe_load(self.text)
        return {role: Path(values[role]["path"]).name for role in ("teacher", "student")}


def config_folder(model: str) -> Path:
    """Where a model's config.json is shipped, by its folder's name: "Qwen2-VL-7B-Instruct" is in qwen2_vl_7b."""
    return CONFIGS / model.lower().removesuffix("-instruct").replace("-", "_").replace(".", "_")


def shipped_recipes() -> list[ShippedRecipe]:
    """All of them, by name."""
    return [ShippedRecipe(path) for path in sorted(RECIPES.glob("*.yaml"))]


def shipped_recipe(name: str) -> ShippedRecipe:
    """One of them, by its name or its file's. Raises RecipeError where there is none, with the closest name."""
    known = {one.name: one for one in shipped_recipes()}
    wanted = Path(name).name.removesuffix(".yaml")
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known)}"
        raise RecipeError(f"no recipe '{wanted}' in {RECIPES}; {hint}")
    return known[wanted]
