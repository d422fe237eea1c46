"""Templates filled in. What a page shows comes from data and models: all of it is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, **values: Any) -> bytes:
    """A page in UTF-8: one file, which loads nothing. Raises jinja2.UndefinedError for a value that is missing."""
    return _templates().get_template(template).render(values).encode()


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
