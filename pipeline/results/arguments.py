"""What the commands share: a run's recipe, data that holds samples, and its samples in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.shards import ShardFolder
from pipeline.errors import DataError, RecipeError


def run_recipe(run: Path) -> Path:
    """Path of the resolved recipe in a run's folder. Raises RecipeError if the folder is not a run."""
    path = run / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(f"{run} is no run: expected the folder that a recipe names as `run`, with recipe.yaml in it")
    return path


def open_non_empty(folder: Path) -> ShardFolder:
    """A shard folder with at least one sample. Raises DataError."""
    shards = ShardFolder(folder)
    if not len(shards):
        raise DataError(
            f"{folder} is a shard folder without a sample; python -m data_prep shard --help says how to make one"
        )
    return shards


def evenly_spaced(total: int, limit: int | None) -> Sequence[int]:
    """At most `limit` of `total` indices, at equal distances: data may be sorted, by question type say. None: all."""
    count = total if limit is None else min(limit, total)
    return [number * total // count for number in range(count)]


def batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The indices, `size` at a time."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def named_model(text: str) -> tuple[str, Path]:
    """Split 'NAME=DIR' or 'DIR'; a '/' before the '=' means that the '=' belongs to the folder name."""
    name, equals, folder = text.partition("=")
    if equals and name and folder and "/" not in name:
        return name, Path(folder)
    return Path(text).resolve().name, Path(text)


def named_models(texts: Sequence[str]) -> dict[str, Path]:
    """{name: folder} of several 'NAME=DIR' or 'DIR'. Raises RecipeError where two have one name."""
    named = dict(named_model(text) for text in texts)
    if len(named) < len(texts):
        raise RecipeError(f"two models have one name ({', '.join(texts)}); name them: --model NAME=DIR")
    return named
