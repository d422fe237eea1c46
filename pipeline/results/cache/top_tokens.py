"""`python -m pipeline cache-info --sample`: the most likely token of each cached layer, for one sample.

T response tokens, J teacher layers.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from data_prep.storage import local_copy
from pipeline.cache.fingerprint import TOKENIZER_FILES, tokenizer_fingerprint
from pipeline.cache.head import read_head
from pipeline.cache.layout import cache_codec
from pipeline.codec.packing import unpack_record
from pipeline.codec.sampled import Sampled
from pipeline.errors import CacheError, RecipeError
from pipeline.recipe.resolve import load_recipe
from pipeline.results.cache.on_disk import CacheOnDisk, read_record
from pipeline.signal import HiddenSignal, Signal

SHOWN = 16
"""Number of response tokens printed of a longer sample."""

TEXT_WIDTH = 12
"""Maximum width of a token's text, in terminal columns."""

BUCKET = "(bucket)"
"""Stands for the bucket of a mapped vocabulary, which is no token."""

PADDING = 2
"""Space added to each table column, in terminal columns."""


@dataclass(frozen=True)
class TopTokens:
    """One sample of a cache: its response tokens, and each layer's most likely ids for the first of them."""

    shard: str
    tokens: Sequence[int]
    """[T] ids of all response tokens."""
    top_ids: Sequence[Sequence[int]]
    """[min(T, SHOWN), J] most likely ids."""
    shares: Sequence[Sequence[str]]
    """[min(T, SHOWN), J] number of sampled points on these ids, or their probability, as text."""


def show(cache: CacheOnDisk, key: str, folder: Path | None) -> None:
    """Print tables of tokens by layers, as many tables as the terminal width requires.

    Raises CacheError: no such key, a damaged record, no tokenizer. Raises SampleError if the sample was skipped.
    """
    sample = read_top_tokens(cache, key)
    path = folder or tokenizer_folder(cache)
    tokenizer = _load_tokenizer(path)
    console = Console(highlight=False)
    kind = "supervised response tokens" if cache.identity.mapped else "response tokens"
    console.print(Text(f"{key}, in {sample.shard}: {len(sample.tokens):,} {kind}", "bold"))
    console.print(Text(_quoted(tokenizer, sample.tokens)))
    for table in _tables(cache, sample, tokenizer, console.width):
        console.print(table)
    if len(sample.tokens) > SHOWN:
        console.print(f"and {len(sample.tokens) - SHOWN:,} tokens more")
    for line in _legend(cache, path):
        console.print(line, markup=False, soft_wrap=True)


def read_top_tokens(cache: CacheOnDisk, key: str) -> TopTokens:
    """Read and decode one sample. Raises CacheError and SampleError as `show` does."""
    name = next((name for name, sidecar in cache.sidecars.items() if key in sidecar["keys"]), None)
    if name is None:
        raise CacheError(_no_such_key(cache, key))
    sidecar = cache.sidecars[name]
    codec = cache_codec(cache.path, cache.identity, cache.recipe or "R")
    head_sha256 = cache.manifest["head_sha256"] if cache.manifest and codec.needs_head else None
    head = read_head(cache.path, head_sha256, "cpu", cache.recipe or "R") if codec.needs_head else None
    try:
        with local_copy(cache.path / name) as copy, open(copy, "rb") as file:
            record = read_record(file, sidecar, sidecar["keys"].index(key))
        layers = len(cache.identity.layers)
        tokens, streams = unpack_record(record, codec.token_bytes(layers), cache.made_for)
        arrays = codec.unpack(streams, len(tokens), layers)
        signal = codec.decode({name: array[:SHOWN] for name, array in arrays.items()}, head)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CacheError(
            f"{cache.path / name}: record '{key}' is damaged: {error}. What else is: python -m pipeline cache-info "
            f"{shlex.quote(str(cache.path))} --verify"
        ) from None
    ids, probs = top1(signal)
    points = codec.points if isinstance(codec, Sampled) else None
    shares = [[_share_text(p, points) for p in row] for row in probs.tolist()]
    return TopTokens(name, tokens.tolist(), ids.tolist(), shares)


def top1(signal: Signal) -> tuple[Tensor, Tensor]:
    """The most likely ids and their probabilities, each [T, J]; logits exist for one layer at a time."""
    if isinstance(signal, HiddenSignal):
        best = [signal.unembedding.logits(layer).softmax(-1).max(-1) for layer in signal.hidden.unbind(1)]
        return torch.stack([b.indices for b in best], 1), torch.stack([b.values for b in best], 1)
    top = signal.probs.max(-1)
    return signal.ids.gather(-1, top.indices[..., None])[..., 0], top.values


def tokenizer_folder(cache: CacheOnDisk) -> Path:
    """A folder of the run with a tokenizer: the teacher's, the student's or the distilled student's.

    The ids of a mapped vocabulary are the student's, so the teacher's is not asked for then. Raises CacheError if none
    has one.
    """
    candidates: list[Path] = []
    if cache.recipe is not None:
        try:
            recipe = load_recipe(cache.recipe).recipe
        except RecipeError as error:
            raise CacheError(f"{error}\nGive --tokenizer DIR instead") from None
        candidates = [recipe.student.path, cache.recipe.parent / "student"]
        if not cache.identity.mapped:
            candidates.insert(0, recipe.teacher.path)
    for folder in candidates:
        if _has_tokenizer(folder):
            return folder
    searched = ", ".join(map(str, candidates)) or "no recipe.yaml two folders above the cache to name one"
    raise CacheError(f"no tokenizer to read ids with ({searched}); give the teacher's or student's: --tokenizer DIR")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for names in TOKENIZER_FILES for name in names)


def _load_tokenizer(folder: Path) -> Any:
    if not _has_tokenizer(folder):
        raise CacheError(
            f"no tokenizer in {folder}: expected a Hugging Face folder with tokenizer.json; --tokenizer DIR"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CacheError(
            f"the tokenizer in {folder} cannot be loaded: {error}; give another: --tokenizer DIR"
        ) from None


def _tables(cache: CacheOnDisk, sample: TopTokens, tokenizer: Any, width: int) -> Iterator[Table]:
    tokens = sample.tokens[:SHOWN]
    texts = [Text(_shorten(_quoted(tokenizer, [token]))) for token in tokens]
    left = [[Text("#"), *(Text(str(number)) for number in range(1, len(tokens) + 1))], [Text("token"), *texts]]
    bucket = cache.identity.student_ids if cache.identity.mapped else None
    layers = [
        [Text(_layer_heading(cache, j)), *_layer_cells(sample, tokenizer, j, bucket)]
        for j in range(len(cache.identity.layers))
    ]
    room = width - sum(map(_width, left))
    while layers:
        count = 1
        while count < len(layers) and sum(map(_width, layers[: count + 1])) <= room:
            count += 1
        table = Table(box=box.SIMPLE_HEAD, padding=(0, PADDING // 2), pad_edge=False)
        for column in (*left, *layers[:count]):
            table.add_column(column[0], no_wrap=True)
        for row in zip(*(column[1:] for column in (*left, *layers[:count])), strict=True):
            table.add_row(*row)
        yield table
        layers = layers[count:]


def _layer_heading(cache: CacheOnDisk, column: int) -> str:
    layers = cache.identity.layers
    return f"layer {layers[column]}" if column < len(layers) - 1 else "last layer"


def _layer_cells(sample: TopTokens, tokenizer: Any, column: int, bucket: int | None) -> Iterator[Text]:
    for token, ids, shares in zip(sample.tokens, sample.top_ids, sample.shares, strict=False):
        word = BUCKET if ids[column] == bucket else _shorten(_quoted(tokenizer, [ids[column]]))
        text = f"{word} {shares[column]}"
        yield Text(text, "bold" if ids[column] == token else "")


def _width(column: Sequence[Text]) -> int:
    return max(cell.cell_len for cell in column) + PADDING


def _quoted(tokenizer: Any, ids: Sequence[int]) -> str:
    """The decoded text, quoted and escaped: spaces matter in tokens, and data must not send terminal control codes."""
    return repr(tokenizer.decode(list(ids)))


def _shorten(text: str) -> str:
    return text if len(text) <= TEXT_WIDTH else f"{text[: TEXT_WIDTH - 3]}..."


def _share_text(probability: float, points: int | None) -> str:
    return f"{probability:.2f}" if points is None else f"{round(probability * points)}/{points}"


def _legend(cache: CacheOnDisk, folder: Path) -> Iterator[str]:
    share = {
        "sampled": "how many of its drawn points fell on it",
        "hidden": "its probability, through the cached head",
    }.get(cache.identity.codec["name"], "its probability")
    yield f"Each layer's likeliest id where the token is predicted, and {share}; bold: the token itself."
    if cache.identity.mapped:
        yield f"{BUCKET}: what the teacher says that is no single token of the student."
    expected = cache.identity.fingerprints.get("student_tokenizer" if cache.identity.mapped else "tokenizer")
    if expected is not None and (found := tokenizer_fingerprint(folder)) != expected:
        yield f"Words may be wrong: the cache was made with tokenizer {expected}, {folder} has {found}."


def _no_such_key(cache: CacheOnDisk, key: str) -> str:
    keys = [key for sidecar in cache.sidecars.values() for key in sidecar["keys"]]
    first = f"; the first are {', '.join(keys[:3])}" if keys else ""
    more = "" if cache.complete else f". The cache has {cache.state}; make the rest: {cache.command()}"
    return f"--sample {key}: not among the {len(keys):,} keys of {cache.path}{first}{more}"
