"""`python -m pipeline cache-info --suspects`: samples whose given answer the teacher finds unlikely.

No model is loaded: a record has the response tokens, and what the teacher's last layer says where each is predicted.
likelihood.py makes a score of that.

T response tokens.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.shards import write_file
from data_prep.storage import local_copy
from pipeline.cache.head import head_sha256, read_head
from pipeline.cache.layout import cache_codec
from pipeline.codec.packing import join_arrays, unpack_record
from pipeline.codec.registry import Codec
from pipeline.errors import CacheError, SampleError
from pipeline.results.cache.data import CachedData
from pipeline.results.cache.likelihood import explanation, given_log_probs, score
from pipeline.results.cache.on_disk import CacheOnDisk, Shard, read_record
from pipeline.runtime.display.progress import StepProgress
from pipeline.signal import Unembedding

SHOWN = 20
"""Rows of the table without --limit."""

TEXT_WIDTH = 60
"""Characters shown of a question and of an answer."""

BATCH_TOKENS = 4096
"""Response tokens that are decoded at a time, and some more: samples stay whole."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A sample and its score."""

    key: str
    shard: str
    index: int
    """Its number in its shard, counted from 0."""
    tokens: int
    log_prob: float
    """The score: mean log-probability of the response tokens, nats a token."""
    lowest: float
    """Log-probability of the least likely response token."""
    lowest_position: int
    """Number of that token among the response tokens, counted from 1 as in the tables of --sample."""


@dataclass(frozen=True)
class _Record:
    key: str
    index: int
    tokens: np.ndarray
    arrays: Mapping[str, np.ndarray]
    """The codec's unpacked arrays of the last layer alone [T, 1, n]."""


def run(cache: CacheOnDisk, limit: int | None, output: Path | None) -> None:
    """Rank all samples; print the first ones, and write all to `output`, one JSON object a line.

    Raises CacheError: nothing to rank, a damaged record, or a file that cannot be written.
    """
    if output is not None and output.is_dir():
        raise CacheError(f"--output {output} is a folder; name a file in it, such as {output / 'suspects.jsonl'}")
    if cache.identity.mapped:
        raise CacheError(
            f"--suspects: {cache.path} is of vocabulary: mapped. It ranks by the teacher's probability of each "
            "response token, but the teacher may say the same text in another token. Show one sample: --sample KEY"
        )
    if not cache.intact:
        raise CacheError(f"{cache.path} has no whole shard yet ({cache.state}). Make it: {cache.command()}")
    ranked = rank(cache)
    data = CachedData(cache)
    planted = data.planted((one.key, one.shard, one.index) for one in ranked)
    console = Console(highlight=False)
    console.print(_table(ranked[: limit or SHOWN], data))
    for line in _notes(cache, ranked, planted):
        console.print(line, markup=False, soft_wrap=True)
    if output is not None:
        _write(output, ranked, planted)


def rank(cache: CacheOnDisk) -> list[Suspect]:
    """All samples of the shards without a known problem, the least likely answer first. Skipped ones are left out."""
    codec = cache_codec(cache.path, cache.identity, cache.recipe or "R")
    head = read_head(cache.path, head_sha256(cache.path), "cpu", cache.recipe or "R") if codec.needs_head else None
    found: list[Suspect] = []
    progress = StepProgress("suspects", sum(len(shard["keys"]) for shard in cache.intact))
    try:
        for shard in cache.intact:
            found += _score_shard(cache, shard, codec, head)
            progress.advance(f"{len(found):,} scored", by=len(shard["keys"]))
    finally:
        progress.close()
    return sorted(found, key=by_suspicion)


def by_suspicion(suspect: Suspect) -> tuple[float, float, str]:
    """Sort key: the lowest score first; ties by the least likely token, then by key."""
    return suspect.log_prob, suspect.lowest, suspect.key


def _score_shard(cache: CacheOnDisk, shard: Shard, codec: Codec, head: Unembedding | None) -> Iterator[Suspect]:
    try:
        for batch in _batches(_records(cache, shard, codec)):
            tokens = np.concatenate([record.tokens for record in batch])
            if not 0 <= tokens.min() <= tokens.max() < cache.identity.vocab:
                raise ValueError(f"it has response tokens outside of 0..{cache.identity.vocab - 1}")
            signal = codec.decode(join_arrays([record.arrays for record in batch]), head)
            log_probs = given_log_probs(signal, torch.from_numpy(tokens).long(), codec).numpy()
            if not np.isfinite(log_probs).all():
                raise ValueError("it has probabilities that are not finite")
            ends = np.cumsum([len(record.tokens) for record in batch])
            for record, own in zip(batch, np.split(log_probs, ends[:-1]), strict=True):
                yield Suspect(record.key, shard["name"], record.index, len(own), *score(own))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CacheError(
            f"{cache.path / shard['name']} is damaged: {error}. What else is: python -m pipeline cache-info "
            f"{shlex.quote(str(cache.path))} --verify"
        ) from None


def _records(cache: CacheOnDisk, shard: Shard, codec: Codec) -> Iterator[_Record]:
    """A shard's records, without the skipped ones. Raises ValueError, with the key, for a damaged one."""
    layers = len(cache.identity.layers)
    with local_copy(cache.path / shard["name"]) as copy, open(copy, "rb") as file:
        for index, key in enumerate(shard["keys"]):
            try:
                record = read_record(file, shard, index)
                tokens, streams = unpack_record(record, codec.token_bytes(layers), cache.made_for)
                arrays = codec.unpack(streams, len(tokens), layers)
            except SampleError:
                continue
            except (ValueError, KeyError, IndexError) as error:
                raise ValueError(f"record '{key}': {error}") from None
            yield _Record(key, index, tokens, {name: array[:, -1:].copy() for name, array in arrays.items()})


def _batches(records: Iterator[_Record]) -> Iterator[list[_Record]]:
    batch: list[_Record] = []
    tokens = 0
    for record in records:
        batch.append(record)
        tokens += len(record.tokens)
        if tokens >= BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def _table(suspects: Sequence[Suspect], data: CachedData) -> Table:
    title = "suspects: answers that the teacher finds unlikely"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("key", overflow="fold")
    table.add_column("shard", no_wrap=True)
    for heading in ("log-prob", "lowest", "token"):
        table.add_column(heading, justify="right", no_wrap=True)
    texts = [data.question_and_answer(one.shard, one.index) for one in suspects]
    if any(texts):
        table.add_column("question", overflow="fold")
        table.add_column("answer", overflow="fold")
    for number, (one, text) in enumerate(zip(suspects, texts, strict=True), 1):
        values = (f"{one.log_prob:.3f}", f"{one.lowest:.3f}", f"{one.lowest_position} of {one.tokens}")
        table.add_row(str(number), one.key, one.shard, *values, *(Text(_one_line(part)) for part in text or ()))
    return table


def _one_line(text: str) -> str:
    """The beginning of a text as one line without control codes, which data must not send to a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= TEXT_WIDTH else f"{line[: TEXT_WIDTH - 3]}..."


def _notes(cache: CacheOnDisk, ranked: Sequence[Suspect], planted: Mapping[str, bool]) -> Iterator[str]:
    skipped = sum(len(shard["keys"]) for shard in cache.intact) - len(ranked)
    yield "log-prob: mean over the response tokens, nat a token; lowest: of the least likely token, and which that is."
    yield f"The teacher's last layer, {explanation(cache.identity.codec)}"
    yield f"read {len(ranked):,} samples of {len(cache.intact):,} shards; the cache job had skipped {skipped:,} more."
    if not cache.complete:
        yield f"The cache is not complete ({cache.state}): only these are ranked. Make the rest: {cache.command()}"
    if wrong := sum(planted.values()):
        hits = sum(planted.get(one.key, False) for one in ranked[:wrong])
        yield f"known wrong answers: {wrong:,}; of the first {wrong:,} suspects {hits:,} are known to be wrong."


def _write(output: Path, ranked: Sequence[Suspect], planted: Mapping[str, bool]) -> None:
    lines = (
        {"rank": number, "key": one.key, "shard": one.shard, "log_prob": one.log_prob, "lowest": one.lowest,
         "lowest_position": one.lowest_position, "tokens": one.tokens}
        | ({"planted": planted[one.key]} if one.key in planted else {})
        for number, one in enumerate(ranked, 1)
    )  # fmt: skip
    try:
        write_file(output, "".join(json.dumps(line) + "\n" for line in lines).encode())
    except OSError as error:
        raise CacheError(f"--output {output} cannot be written: {error}") from None
