"""Hugging Face datasets, from the hub or from local parquet, jsonl or arrow files, streamed through `datasets`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.json_records import METADATA, json_records
from data_prep.layouts import LAYOUTS, PICTURES, SYSTEM, has_chat, read_sample
from data_prep.schema import BadSample, DataError
from data_prep.sources import LazyRecord, Sample, source

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
"""Suffix of a local file -> the builder of `datasets` that reads it."""
JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
"""Suffixes of files that data_prep.json_records reads: there one bad record costs itself, in `datasets` the file."""
SUFFIXES = (*BUILDERS, *JSON)
"""Of a folder, the files with the first suffix that it has are read."""
FIRST_RECORDS = 100
"""Records of a JSON file whose fields together are its columns."""

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

    Raises DataError where it cannot be opened or read, or the columns are not there.
    """
    path = Path(args.input)
    files = _local_files(path)
    folder = args.images or (path if path.is_dir() else path.parent)
    if files and files[0].name.endswith(JSON):
        yield from _json_records(args, files, folder)
        return
    total = _parquet_rows(files)
    for number, row in enumerate(_rows(args, files)):
        if number == 0:
            _check_columns(list(row), args.columns)
        done = (number + 1) / total if total else None
        yield LazyRecord(partial(_sample, row, args.columns, folder), path.name if files else args.input, progress=done)


def _json_records(args: argparse.Namespace, files: Sequence[Path], folder: Path) -> Iterator[LazyRecord]:
    _check_columns(_fields(files[0]), args.columns)
    for number, path in enumerate(files):
        images = path.parent if path.name == METADATA and not args.images else folder
        for found in json_records(path):
            load = partial(_sample_of_json, found.value, args.columns, images)
            yield LazyRecord(load, path.name, line=found.line, progress=(number + found.progress) / len(files))


def _fields(path: Path) -> list[str]:
    fields: dict[str, None] = {}
    for found in islice(json_records(path), FIRST_RECORDS):
        with contextlib.suppress(BadSample):
            record = found.value() if callable(found.value) else found.value
            fields.update(dict.fromkeys(record if isinstance(record, dict) else ()))
    return list(fields)


def _sample_of_json(value: Any, columns: dict[str, str], folder: Path) -> Sample:
    record = value() if callable(value) else value
    return _sample(record, columns, folder) if isinstance(record, dict) else read_sample(record, folder)


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


def _check_columns(names: Sequence[str], columns: dict[str, str]) -> None:
    """Raise DataError where a given column, or one that holds chats, is not there."""
    missing = [column for column in columns.values() if column not in names]
    if missing or not has_chat([*names, *columns]):
        raise DataError(
            f"no column {missing[0] if missing else 'messages or conversations'!r} among {', '.join(names)}; "
            "say where they are: --columns messages=COLUMN,images=COLUMN"
        )


def _local_files(path: Path) -> list[Path]:
    """The data files at a path, in order; none where it is no path but a name on the hub. Raises DataError."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"--input {path}: expected a file that ends in {', '.join(SUFFIXES)}")
        return [path]
    if path.is_dir():
        if (path / METADATA).is_file():
            return [path / METADATA]
        for suffix in SUFFIXES:
            if files := sorted(path.rglob(f"*{suffix}")):
                return files
        raise DataError(f"--input {path}: no file in this folder ends in {', '.join(SUFFIXES)}")
    if path.name.endswith(SUFFIXES) or path.is_absolute() or str(path).startswith("."):
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
