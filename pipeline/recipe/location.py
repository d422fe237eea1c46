"""The type of a recipe's field that is a folder or a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import PlainSerializer, PlainValidator

from data_prep.schema import DataError
from data_prep.storage import is_url, location


def _location(value: object) -> Path:
    if not isinstance(value, str) and not isinstance(value, Path) and not is_url(value):
        raise ValueError("expected a path or a URL")
    try:
        return location(value)  # type: ignore[arg-type]
    except DataError as error:
        raise ValueError(str(error)) from None


Location = Annotated[Path, PlainValidator(_location), PlainSerializer(lambda found: found)]
"""A folder, or a URL such as s3://bucket/shards."""
