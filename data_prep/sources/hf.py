"""Hugging Face datasets, from the hub or from local parquet, jsonl or arrow files, streamed through `datasets`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.chats import to_messages
from data_prep.images import read_image
from data_prep.schema import BadSample, DataError, tag_with_id, type_name
from data_prep.sources import LazyRecord, Sample, source

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}
"""Suffix of a local file -> the builder of `datasets` that reads it; of a folder, the first that it has."""

USUAL_COLUMNS = {
    "messages": ("messages", "conversations"),
    "images": ("images", "image"),
    "id": ("id",),
    "question_type": ("question_type",),
}
"""What a sample is made from -> the columns that usually hold it. Only messages must be there."""


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
        help="where messages, images, id and question_type are, if not in columns of these names (also read: "
        "conversations, image); such as messages=chat,images=pictures",
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
    columns: dict[str, str] = {}
    total = _parquet_rows(files)
    for number, row in enumerate(_rows(args, files)):
        columns = columns or _find_columns(row, args.columns)
        done = (number + 1) / total if total else None
        yield LazyRecord(partial(_sample, row, columns, folder), path.name if files else args.input, progress=done)


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
    for name, feature in stream.features.items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            stream = stream.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return stream


def _sample(row: dict[str, Any], columns: dict[str, str], folder: Path) -> Sample:
    fields = {field: row.get(column) for field, column in columns.items()}
    with tag_with_id(fields.get("id")):
        images = fields.get("images")
        images = images if isinstance(images, list) else [] if images is None else [images]
        content = [_image(image, folder) for image in images]
        return Sample(
            to_messages(fields["messages"]), content, id=fields.get("id"), question_type=fields.get("question_type")
        )


def _image(image: Any, folder: Path) -> bytes:
    """An image's bytes as the dataset holds them, or as they lie at the path that it holds."""
    if isinstance(image, dict):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, str):
        return read_image(folder, image)
    raise BadSample("wrong_type", f"an image is {type_name(image)}; expected bytes or a path")


def _find_columns(row: dict[str, Any], given: dict[str, str]) -> dict[str, str]:
    """Field -> column. Raises DataError where a given column, or one for messages, is not there."""
    found = {field: name for field, names in USUAL_COLUMNS.items() for name in reversed(names) if name in row}
    columns = {**found, **given}
    missing = [column for column in given.values() if column not in row]
    if missing or "messages" not in columns:
        raise DataError(
            f"no column {missing[0] if missing else 'messages or conversations'!r} among {', '.join(row)}; "
            "say where they are: --columns messages=COLUMN,images=COLUMN"
        )
    return columns


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
    if unknown := [field for field, column in pairs.items() if field not in USUAL_COLUMNS or not column]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r}; expected FIELD=COLUMN pairs, the fields being some of {', '.join(USUAL_COLUMNS)}"
        )
    return pairs
