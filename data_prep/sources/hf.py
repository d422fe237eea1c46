"""Hugging Face datasets, from the hub or from local parquet, jsonl or arrow files, streamed through `datasets`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.layouts import LAYOUTS, PICTURES, SYSTEM, has_chat, read_sample
from data_prep.schema import DataError
from data_prep.sources import LazyRecord, Sample, source

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}
"""Suffix of a local file -> the builder of `datasets` that reads it; of a folder, the first that it has."""

FIELDS = ("messages", "images", "id", "question_type", "system")
"""What --columns may name a column for."""
SAME_AS = {
    "messages": tuple({field for needed, _ in LAYOUTS for field in needed}),
    "images": PICTURES,
    "system": SYSTEM,
}
"""Field -> columns that are not read where --columns names another for it."""


def options(parser: argparse.ArgumentParser) -> None:
    """The options of --source hf."""
    parser.add_argument(
        "--input",
        required=True,
        metavar="NAME_OR_PATH",
        help="a dataset's name on the hub, or a local file or folder of parquet, jsonl, json or arrow files",
    )
    parser.add_argument("--config", metavar="NAME", help="the hub dataset's configuration, where it has several")
    parser.add_argument("--split", default="train", metavar="NAME", help="the split that is read (default train)")
    parser.add_argument(
        "--columns",
        type=_columns,
        default={},
        metavar="FIELD=COLUMN,...",
        help="where messages, images, id, question_type and system are, if not in columns of usual names (see "
        "docs/data_format.md); such as messages=chat,images=pictures",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images, where the dataset holds paths (default: that of the input)",
    )


@source("hf", options)
def read(args: argparse.Namespace) -> Iterator[LazyRecord]:
    """A Hugging Face dataset: hub name or local parquet, jsonl or arrow; columns messages and images, or as given.

    Raises DataError where `datasets` cannot open or read it, or the columns are not there.
    """
    path = Path(args.input)
    files = _local_files(path)
    folder = args.images or (path if path.is_dir() else path.parent)
    total = _parquet_rows(files)
    for number, row in enumerate(_rows(args, files)):
        if number == 0:
            _check_columns(row, args.columns)
        done = (number + 1) / total if total else None
        yield LazyRecord(partial(_sample, row, args.columns, folder), path.name if files else args.input, progress=done)


def _rows(args: argparse.Namespace, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    number = -1
    try:
        if files:
            names = [str(file) for file in files]
            stream = datasets.load_dataset(
                BUILDERS[files[0].suffix], data_files={args.split: names}, split=args.split, streaming=True
            )
        else:
            stream = datasets.load_dataset(args.input, args.config, split=args.split, streaming=True)
        for number, row in enumerate(_undecoded(stream)):  # noqa: B007  # the error needs the number
            yield row
    except GeneratorExit:
        raise
    except Exception as error:  # of datasets, pyarrow, fsspec or the network: none has a common base
        raise DataError(
            f"--input {args.input}: datasets cannot read record {number + 1} ({type(error).__name__}: {error}); "
            "expected a dataset's name on the hub or local parquet, jsonl or arrow"
        ) from None


def _undecoded(stream: Any) -> Any:
    """The stream with its images left as the bytes that they are."""
    import datasets

    if stream.features is None:
        return stream.decode(False)  # not always: this would leave JSON objects as text, too
    return stream.cast(datasets.Features({name: _as_stored(feature) for name, feature in stream.features.items()}))


def _as_stored(feature: Any) -> Any:
    """A feature whose images, videos and sounds, at any depth, stay the bytes that they are."""
    import datasets

    if isinstance(feature, (datasets.Image, datasets.Video, datasets.Audio)):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: _as_stored(inner) for name, inner in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_as_stored(feature.feature))
    return feature


def _sample(row: dict[str, Any], columns: dict[str, str], folder: Path) -> Sample:
    hidden = {name for field in columns for name in SAME_AS.get(field, ())}  # what the mapping takes the place of
    mapped = {field: row.get(column) for field, column in columns.items()}
    record = {**{name: value for name, value in row.items() if name not in hidden}, **mapped}
    return replace(read_sample(record, folder), question_type=record.get("question_type"))


def _check_columns(row: dict[str, Any], columns: dict[str, str]) -> None:
    """Raise DataError where a given column, or one that holds chats, is not there."""
    missing = [column for column in columns.values() if column not in row]
    if missing or not has_chat([*row, *columns]):
        raise DataError(
            f"no column {missing[0] if missing else 'messages or conversations'!r} among {', '.join(row)}; "
            "say where they are: --columns messages=COLUMN,images=COLUMN"
        )


def _local_files(path: Path) -> list[Path]:
    """The data files at a path, in order; none where it is no path but a name on the hub. Raises DataError."""
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise DataError(f"--input {path}: expected a file that ends in {', '.join(BUILDERS)}")
        return [path]
    if path.is_dir():
        for suffix in BUILDERS:
            if files := sorted(path.rglob(f"*{suffix}")):
                return files
        raise DataError(f"--input {path}: no file in this folder ends in {', '.join(BUILDERS)}")
    if path.suffix in BUILDERS or path.is_absolute() or str(path).startswith("."):
        raise DataError(f"--input {path}: no such file or folder")
    return []


def _parquet_rows(files: Sequence[Path]) -> int | None:
    if not files or files[0].suffix != ".parquet":
        return None
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        return sum(read_metadata(file).num_rows for file in files)
    except (ArrowException, OSError):
        return None  # datasets will say what is wrong


def _columns(text: str) -> dict[str, str]:
    pairs = dict(pair.partition("=")[::2] for pair in text.split(","))
    if unknown := [field for field, column in pairs.items() if field not in FIELDS or not column]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r}; expected FIELD=COLUMN pairs, the fields being some of {', '.join(FIELDS)}"
        )
    return pairs
