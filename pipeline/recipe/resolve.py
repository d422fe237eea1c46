"""Load a recipe from a YAML file, --set overrides and stage 1's run folder, and record where each value came from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from data_prep.storage import is_url
from pipeline.errors import RecipeError
from pipeline.recipe.presets import PRESETS, check_preset, preset_values
from pipeline.recipe.schema import STEPS, Recipe

CHECKPOINTING = ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints")

# These change speed, memory or which files are kept, not what is learned. A run may continue with other values of them.
# (With interact.micro_batch_size or micro_batch_tokens, the number of matches that are drawn in an update changes too.)
# The values that a preset fills in are compared themselves, each with the step that uses it.
CHANGEABLE = {
    "run",
    "preset",
    "stage_1",
    "cache_from",
    "deepspeed",
    "kernels",
    "gradient_checkpointing",
    "attention",
    "hang_minutes",
    "log_to",
    "report",
    "data.workers",
    "data.memory_mb",
    "data.held_out",
    "data.max_bad_share",
    "cache.batch_tokens",
    "cache.folder",
    "cache.max_bucket_share",
} | {
    f"{step}.{key}"
    for step in STEPS
    for key in (
        "deepspeed",
        "micro_batch_size",
        "micro_batch_tokens",
        "max_skipped_in_a_row",
        "evaluate_every",
        *CHECKPOINTING,
    )
}


STUDENT_OF_STAGE_1 = ("student.path", "student.layers", "verbalizer.form", "cache_from")
"""What the student's verbalizers depend on, and where their teacher's are."""
TEACHER_OF_CACHE = ("teacher.layers", "verbalizer.form")
"""What the teacher's verbalizers depend on, besides the teacher."""

SHIPPED = Path(__file__).parents[2]
"""The folder with ds_configs/ and recipes/: the checkout, or the folder of the installed packages."""

NO_DORA = (
    "DoRA is not offered: peft's reads a base layer's weight that ZeRO-3 has not gathered. LoRA is: interact.lora_rank "
    "and reinforce.lora_rank"
)
MOST_VALUES = 10_000
"""Values of a recipe, aliases counted as often as they stand: a hundred times what all fields together have."""


@dataclass(frozen=True)
class Resolved:
    """A recipe, and where each of its values came from."""

    recipe: Recipe
    origins: Mapping[str, str]
    """Flat key -> "recipe", "command line", "preset NAME", "default" or "stage 1"."""

    def to_yaml(self) -> str:
        """The recipe as YAML that loads again, with each value's origin in a comment."""
        return "\n".join(_yaml_lines(self.recipe, self.origins)) + "\n"

    def inherited(self) -> list[str]:
        """Log lines for the values taken from stage 1, such as `seed = 3 (from stage 1)`."""
        values = leaves(self.recipe)
        return [f"{key} = {values[key]} (from stage 1)" for key, origin in self.origins.items() if origin == "stage 1"]


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Resolved:
    """Read a recipe file and `a.b=c` overrides. Values that neither sets come from the run folder's recipe, if any.

    Where another preset is chosen than a file names, what that preset filled in there does not count. Raises
    RecipeError with all unknown keys ("did you mean") and all bad values at once.
    """
    values = _read_yaml(path)
    given = [_parse_override(override) for override in overrides]
    _leave_preset(values, dict(given).get("preset"))
    origins = dict.fromkeys(_flat_keys(values), "recipe")
    for key, value in given:
        _set(values, key, value)
        origins = {k: o for k, o in origins.items() if not k.startswith(key + ".")}
        origins |= dict.fromkeys(_flat_keys(value, key) if isinstance(value, dict) else [key], "command line")
    _apply_preset(values, origins)
    recipe = _validate(values, str(path))
    earlier = recipe.run / "recipe.yaml"
    if earlier.is_file() and earlier.resolve() != path.resolve():
        inherited = _read_yaml(earlier)
        _leave_preset(inherited, values.get("preset"))
        for key, value in _flat_items(inherited):
            if not _is_set(key, origins) and value != leaves(recipe).get(key):
                _set(values, key, value)
                origins[key] = "stage 1"
        recipe = _validate(values, f"{path} with {earlier}")
    check_preset(recipe.preset, recipe.reinforce.steps)
    recipe = _with_shipped_configs(recipe)
    return Resolved(recipe, {key: _origin(key, origins) for key in leaves(recipe)})


def refuse_changes(resolved: Resolved, started: Iterable[str]) -> None:
    """Raise RecipeError where a value that a started step has used differs from the run's own recipe.yaml.

    started: the steps that have written something to the run folder. Values of other steps may still change.
    """
    path = resolved.recipe.run / "recipe.yaml"
    started = set(started)
    if not started or not path.is_file():
        return
    values = _read_yaml(path)
    # The defaults first: an older version of this package wrote no line for a field that is new since.
    old, new = leaves(_validate(values, str(path))) | dict(_flat_items(values)), leaves(resolved.recipe)
    differing = []
    for key in sorted(set(old) | set(new)):
        section = key.split(".")[0]
        if (
            section == "cache"
        ):  # it may change until interact: another codec makes another cache, in a folder of its own
            section = "interact"
        in_use = section in started if section in STEPS else True
        if in_use and key not in CHANGEABLE and old.get(key) != new.get(key):
            differing.append(f"  {key}: the run has {old.get(key)}, now {new.get(key)} ({resolved.origins.get(key)})")
    if differing:
        raise RecipeError(
            f"{resolved.recipe.run} was begun with another recipe (by {', '.join(s for s in STEPS if s in started)}):\n"
            + "\n".join(differing)
            + f"\nContinue with the run's own values (--recipe {path}), or start another run with --set run=FOLDER."
        )


def refuse_another_student(recipe: Recipe) -> None:
    """Raise RecipeError where stage_1 is no run, or one of another student: its verbalizers would be used silently.

    The teacher, the data and the codec are checked against the cache's own fingerprints.
    """
    if recipe.stage_1 is None:
        return
    theirs = _recipe_of("stage_1", recipe.stage_1)
    _refuse_other_values("stage_1", "student", recipe.stage_1, theirs, recipe, STUDENT_OF_STAGE_1)


def refuse_another_teacher(recipe: Recipe) -> None:
    """Raise RecipeError where cache_from is no run, has no cache of its own, or verbalizers of other layers or form.

    All else about the teacher and the data is checked against the cache's own fingerprints.
    """
    if recipe.cache_from is None:
        return
    theirs = _recipe_of("cache_from", recipe.cache_from)
    if (owner := theirs.teacher_stage_1) != theirs.run:
        raise RecipeError(
            f"cache_from: {recipe.cache_from} has no cache of its own, but uses that of {owner}. "
            f"Set cache_from: {owner}"
        )
    _refuse_other_values("cache_from", "teacher", recipe.cache_from, theirs, recipe, TEACHER_OF_CACHE)


def own_caches(recipe: Recipe) -> Path:
    """The folder or URL of a run's own caches: cache.folder, or RUN/cache."""
    return recipe.cache.folder or recipe.run / "cache"


def caches_of(run: Path) -> Path:
    """The same of a run's folder, by its recipe.yaml; the run may have been moved since it was begun.

    Raises RecipeError where its recipe.yaml is damaged.
    """
    path = run / "recipe.yaml"
    folder = _validate(_read_yaml(path), str(path)).cache.folder if path.is_file() else None
    return folder or run / "cache"


def _recipe_of(field: str, run: Path) -> Recipe:
    path = run / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(f"{field}: {run} is no run: expected a run's folder, with recipe.yaml in it")
    return _validate(_read_yaml(path), str(path))


def _refuse_other_values(field: str, who: str, run: Path, its: Recipe, recipe: Recipe, keys: Iterable[str]) -> None:
    theirs, ours = leaves(its), leaves(recipe)
    lines = [f"  {key}: {run} has {theirs[key]}, this recipe {ours[key]}" for key in keys if theirs[key] != ours[key]]
    if lines:
        raise RecipeError(
            f"{field} is a run of another {who}:\n" + "\n".join(lines) + f"\nSet the same values, or leave {field} out."
        )


def leaves(section: BaseModel, prefix: str = "") -> dict[str, object]:
    """A recipe as flat keys: {"interact.steps": 150, ...}. Tuples become lists, and paths become strings."""
    flat: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            flat |= leaves(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            flat[prefix + name] = list(value)
        else:
            flat[prefix + name] = str(value) if isinstance(value, Path) or is_url(value) else value
    return flat


def _with_shipped_configs(recipe: Recipe) -> Recipe:
    updates: dict[str, Any] = {"deepspeed": _shipped(recipe.deepspeed)}
    for step in STEPS:
        section = getattr(recipe, step)
        if section.deepspeed is not None:
            updates[step] = section.model_copy(update={"deepspeed": _shipped(section.deepspeed)})
    return recipe.model_copy(update=updates)


def _shipped(config: Path) -> Path:
    """The path of a DeepSpeed config. ds_configs/NAME that does not exist here is replaced by the shipped file."""
    shipped = SHIPPED / config
    return shipped if config.parts[:1] == ("ds_configs",) and not config.exists() and shipped.exists() else config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; the shipped ones are in {SHIPPED / 'recipes'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected `key: value` lines at the top, found {type(values).__name__}")
    return values


def _parse_yaml(text: str, source: str) -> Any:
    """Plain values only. Raises RecipeError where it is no YAML, or its aliases make it larger than any recipe is."""
    try:
        values = yaml.safe_load(text)
    except RecursionError:
        raise RecipeError(f"{source} is not YAML of a recipe: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise RecipeError(f"{source} is not YAML: {error}") from None
    counted, left = 0, [values]
    while left:
        one, counted = left.pop(), counted + 1
        if counted > MOST_VALUES:
            raise RecipeError(f"{source}: expected a recipe of less than {MOST_VALUES} values; aliases make more of it")
        left += list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
    return values


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: expected KEY=VALUE, as in --set interact.steps=100")
    return key.strip(), _parse_yaml(value, f"--set {key}")


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


def _apply_preset(values: dict[str, Any], origins: dict[str, str]) -> None:
    for key, value in preset_values(values).items():
        if not _is_set(key, origins):
            _set(values, key, value)
            origins[key] = f"preset {values['preset']}"


def _leave_preset(values: dict[str, Any], chosen: Any) -> None:
    """Remove what a file has from the preset that it names, where another one has been chosen (None: none has been).

    RUN/recipe.yaml has a line for each value, whoever set it: without this the next preset would train with what was
    filled in, or left as it is by default, for the one before.
    """
    named, then = PRESETS.get(str(values.get("preset"))), PRESETS.get(str(chosen))
    if named is None or then is None or named is then:
        return
    for key in {**named.values, **then.values}:
        section, name = key.split(".")
        inner = values.get(section)
        if isinstance(inner, dict) and inner.get(name) == named.values.get(key, _default(section, name)):
            inner.pop(name, None)
            if name == "steps" and inner.get("epochs") is None:
                inner.pop("epochs", None)  # its null would count as the other way to set steps


def _default(section: str, name: str) -> object:
    model = Recipe.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return model.model_fields[name].default


def _is_set(key: str, origins: Mapping[str, str]) -> bool:
    # steps and epochs are alternatives: setting one of them decides both.
    stem, _, last = key.rpartition(".")
    alternative = {"steps": "epochs", "epochs": "steps"}.get(last)
    return key in origins or (alternative is not None and f"{stem}.{alternative}" in origins)


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
        if "dora" in where.lower():
            return f"unknown key '{where}': {NO_DORA}"
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
