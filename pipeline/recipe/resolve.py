"""From a YAML file, --set overrides and stage 1's run folder to one recipe that knows where each value came from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import RecipeError
from pipeline.recipe.schema import STEPS, Recipe, leaves

# These change speed, memory or what is kept, never a number: a run may go on with other values.
FREE = {
    "run",
    "deepspeed",
    "gradient_checkpointing",
    "data.workers",
    "data.held_out",
    "data.max_bad_share",
    "cache.batch_tokens",
} | {f"{step}.{key}" for step in STEPS for key in ("micro_batch_size", "checkpoint_every", "keep_checkpoints")}


SHIPPED = Path(__file__).parents[2]
"""Where ds_configs/ and recipes/ lie: the checkout, or beside the packages of an installation."""


@dataclass(frozen=True)
class Resolved:
    """A recipe and, for each of its values, where it came from."""

    recipe: Recipe
    origins: Mapping[str, str]
    """Flat key -> "recipe", "command line", "default" or "stage 1"."""

    def to_yaml(self) -> str:
        """A YAML file that loads as a recipe again, each value's origin in a comment."""
        return "\n".join(_yaml_lines(self.recipe, self.origins)) + "\n"

    def inherited(self) -> list[str]:
        """Lines such as `seed = 3 (from stage 1)`, for the log."""
        values = leaves(self.recipe)
        return [f"{key} = {values[key]} (from stage 1)" for key, origin in self.origins.items() if origin == "stage 1"]


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Resolved:
    """Read a recipe file and `a.b=c` overrides; what neither sets comes from the run folder's recipe, if there is one.

    Raises RecipeError with every unknown key ("did you mean") and every bad value at once.
    """
    values = _read_yaml(path)
    origins = dict.fromkeys(_flat_keys(values), "recipe")
    for override in overrides:
        key, value = _parse_override(override)
        _set(values, key, value)
        origins = {k: o for k, o in origins.items() if not k.startswith(key + ".")}
        origins |= dict.fromkeys(_flat_keys(value, key) if isinstance(value, dict) else [key], "command line")
    recipe = _validate(values, str(path))
    earlier = recipe.run / "recipe.yaml"
    if earlier.is_file() and earlier.resolve() != path.resolve():
        for key, value in _flat_items(_read_yaml(earlier)):
            if not _is_set(key, origins) and value != leaves(recipe).get(key):
                _set(values, key, value)
                origins[key] = "stage 1"
        recipe = _validate(values, f"{path} with {earlier}")
    recipe = recipe.model_copy(update={"deepspeed": _shipped(recipe.deepspeed)})
    return Resolved(recipe, {key: _origin(key, origins) for key in leaves(recipe)})


def refuse_changes(resolved: Resolved, begun: Iterable[str]) -> None:
    """Raise RecipeError when a value that a begun step already used differs from the run's own recipe.yaml.

    begun: names of the steps that have left something behind. Values of steps that have not begun may still change.
    """
    path = resolved.recipe.run / "recipe.yaml"
    begun = set(begun)
    if not begun or not path.is_file():
        return
    values = _read_yaml(path)
    # The defaults first: an older version of this package wrote no line for a field that is new since.
    old, new = leaves(_validate(values, str(path))) | dict(_flat_items(values)), leaves(resolved.recipe)
    differing = []
    for key in sorted(set(old) | set(new)):
        section = key.split(".")[0]
        if section == "cache":  # another codec makes another cache beside the one that is there
            section = "interact"
        settled = section in begun if section in STEPS else True
        if settled and key not in FREE and old.get(key) != new.get(key):
            differing.append(f"  {key}: the run has {old.get(key)}, now {new.get(key)} ({resolved.origins.get(key)})")
    if differing:
        raise RecipeError(
            f"{resolved.recipe.run} was begun with another recipe (by {', '.join(s for s in STEPS if s in begun)}):\n"
            + "\n".join(differing)
            + f"\nGo on with the run's own values (--recipe {path}), or start another run with --set run=FOLDER."
        )


def _shipped(config: Path) -> Path:
    """A DeepSpeed config as the recipe names it; ds_configs/NAME that is not found from here is the shipped one."""
    shipped = SHIPPED / config
    return shipped if config.parts[:1] == ("ds_configs",) and not config.exists() and shipped.exists() else config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; the shipped ones are in {SHIPPED / 'recipes'}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected `key: value` lines at the top, found {type(values).__name__}")
    return values


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: expected KEY=VALUE, as in --set interact.steps=100")
    return key.strip(), yaml.safe_load(value)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{key}: {section} is a value, not a section")
        values = inner
    values[last] = value


def _flat_items(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat_items(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _flat_keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [key for key, _ in _flat_items(values, prefix + "." if prefix else "")]


def _is_set(key: str, origins: Mapping[str, str]) -> bool:
    # steps and epochs stand for one another: setting one is deciding both.
    stem, _, last = key.rpartition(".")
    other = {"steps": "epochs", "epochs": "steps"}.get(last)
    return key in origins or (other is not None and f"{stem}.{other}" in origins)


def _origin(key: str, origins: Mapping[str, str]) -> str:
    return origins.get(key, "default")


def _validate(values: Mapping[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise RecipeError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(item["loc"][-1]), _fields_at(item["loc"][:-1]), n=1, cutoff=0.5)
        hint = f"; did you mean '{close[0]}'?" if close else f"; known here: {', '.join(_fields_at(item['loc'][:-1]))}"
        return f"unknown key '{where}'{hint}"
    if item["type"] == "missing":
        return f"{where}: missing, and it has no default"
    return f"{where}: {item['msg']}, found {item['input']!r}"


def _fields_at(location: Iterable[Any]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)


def _yaml_lines(section: BaseModel, origins: Mapping[str, str], prefix: str = "", indent: str = "") -> Iterable[str]:
    flat = leaves(section)
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _yaml_lines(value, origins, f"{prefix}{name}.", indent + "  ")
        else:
            text = yaml.safe_dump(flat[name], default_flow_style=True, width=10**6).split("\n...")[0].strip()
            yield f"{indent}{name}: {text}  # {origins[prefix + name]}"
