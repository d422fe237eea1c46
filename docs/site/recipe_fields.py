"""The page of the recipe's fields, from pipeline/recipe/schema.py, where each field carries its meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.recipe.schema import Recipe

HEAD = """# The fields of a recipe

A recipe is one YAML file; [the shipped ones](shipped_recipes.md) are examples. Each field is set in the file or on
the command line: `--set interact.steps=100`. A field without a default must be set. An unknown one is an error, and
all errors are reported before a model is loaded. "Paper" is VLsI, arXiv 2412.01822. This page is made from
`pipeline/recipe/schema.py`.
"""
BOUNDS = {"gt": "above {}", "ge": "{} or more", "lt": "below {}", "le": "{} or less"}
NAMES = {int: "integer", float: "number", bool: "true or false", str: "text"}


def recipe_fields_page() -> str:
    """The page as Markdown: a chapter for each section of the schema, a heading for each field."""
    return HEAD + "".join(_chapter(section, places) for section, places in sections().items())


def sections() -> dict[type[BaseModel], list[str]]:
    """Each class of the schema that has fields of its own -> the dotted keys at which a recipe has it.

    The base of several sections comes once, before them, with the keys of all.
    """
    found: dict[type[BaseModel], list[str]] = {}
    for section, place in _walk(Recipe, ""):
        for one in reversed(section.__mro__):
            if one is not BaseModel and issubclass(one, BaseModel) and _own(one):
                found.setdefault(one, []).append(place)
    return found


def anchor(place: str, name: str) -> str:
    """The id of a field's heading."""
    return f"{place}.{name}" if place else name


def _walk(section: type[BaseModel], place: str) -> Iterator[tuple[type[BaseModel], str]]:
    yield section, place
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _walk(inner, anchor(place, name))


def _own(section: type[BaseModel]) -> list[str]:
    """A section's own fields that are values, without those of its bases and those that are sections."""
    values = [name for name in section.__annotations__ if name in section.model_fields]
    return [name for name in values if not _is_section(section.model_fields[name])]


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _chapter(section: type[BaseModel], places: list[str]) -> str:
    title = " and ".join([", ".join(f"`{place}`" for place in places[:-1]), f"`{places[-1]}`"][len(places) == 1 :])
    lines = [f"\n## {title if places != [''] else 'The run'}\n", section.__doc__ or ""]
    for name in _own(section):
        field = section.model_fields[name]
        shown = anchor(places[0], name) if len(places) == 1 else name
        # one heading, and an anchor for each of the keys that it is about
        ids = "".join(f'<a id="{anchor(place, name)}"></a>' for place in places)
        lines += [f"\n### {ids}`{shown}`\n", f"*{_type_text(field)}; {_default_text(field)}*\n", _meaning(field)]
    return "\n".join(lines) + "\n"


def _meaning(field: FieldInfo) -> str:
    """The description; what it says of each choice becomes a list."""
    lines: list[str] = []
    for line in (field.description or "").splitlines():
        choices, colon, rest = line.partition(": ")
        names = choices.split(", ")
        if colon and set(names) <= set(_choices(field.annotation)):
            lines += ["", f"* {', '.join(f'`{name}`' for name in names)}: {rest}"]
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal, also inside a union."""
    inner = [one for one in get_args(annotation) if not isinstance(one, (str, int))]
    own = [str(one) for one in get_args(annotation) if isinstance(one, str)]
    return own + [choice for one in inner for choice in _choices(one)]


def _type_text(field: FieldInfo) -> str:
    bounds = [
        BOUNDS[name].format(getattr(rule, name))
        for rule in field.metadata
        for name in BOUNDS
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([_name_of(field.annotation), *bounds])


def _name_of(annotation: Any) -> str:
    if choices := _choices(annotation):
        return "one of " + ", ".join(f"`{choice}`" for choice in choices)
    parts = [one for one in get_args(annotation) if one not in (type(None), ...)]
    if hasattr(annotation, "__metadata__"):  # Annotated[int, Field(gt=0)], as an entry of a list
        rules = [rule for field in parts[1:] for rule in getattr(field, "metadata", [])]
        said = [BOUNDS[n].format(getattr(rule, n)) for rule in rules for n in BOUNDS if hasattr(rule, n)]
        return ", ".join([_name_of(parts[0]), *said])
    if get_origin(annotation) in (tuple, list):
        return f"list of {_name_of(parts[0])}"
    if parts:
        return _name_of(parts[0])
    return NAMES.get(annotation) or re.sub(r"(?<!^)(?=[A-Z])", " ", annotation.__name__).lower()


def _default_text(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "must be set"
    if field.default is None:
        return "may be left out"
    value = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f"default `{value}`"
