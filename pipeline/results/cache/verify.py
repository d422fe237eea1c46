"""`python -m pipeline cache-info --verify`: hash every shard and decode every record."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from data_prep.shards import MANIFEST
from data_prep.storage import is_file, local_copy
from pipeline.cache.head import HEAD, head_sha256, read_head
from pipeline.cache.layout import cache_codec, command_to_remove, missing_shards
from pipeline.cache.mapping import MAPPING, has_map
from pipeline.codec.packing import unpack_places, unpack_record
from pipeline.codec.registry import CODECS, Codec
from pipeline.errors import CacheError, SampleError
from pipeline.results.cache.on_disk import CacheOnDisk, read_record, valid_sidecars
from pipeline.runtime.display.progress import StepProgress
from pipeline.signal import HiddenSignal, Signal, Unembedding

NO_HEAD = Unembedding(torch.zeros(0, 0), 0)
"""Placeholder head. Decoding hidden states only passes the head on, and the checks do not use it."""

ROUNDING = 1e-3
"""Largest allowed distance of a sum of probabilities from 1."""


@dataclass(frozen=True)
class Problem:
    """One problem that verification found."""

    file: str
    key: str
    """Key of the record; empty if the problem concerns the whole file."""
    what: str


@dataclass(frozen=True)
class ShardCheck:
    """The result of checking one shard."""

    name: str
    problems: tuple[Problem, ...]
    found_by_only_missing: bool
    """Whether --only-missing finds without help that the shard has to be made again."""
    records: int
    """Number of records decoded without error."""
    tokens: int
    """Number of response tokens in these records."""
    seconds: float
    """CPU seconds spent on unpacking and decoding."""


def run(cache: CacheOnDisk) -> None:
    """Verify a cache and print the problems.

    Raises CacheError if there is any; its message has the command that repairs the cache.
    """
    workers = max(1, min(os.cpu_count() or 1, len(cache.sidecars)))
    started = time.monotonic()
    checked = check_shards(cache, workers)
    elapsed = time.monotonic() - started
    problems = [*check_other_files(cache), *(problem for shard in checked for problem in shard.problems)]
    console = Console(highlight=False)
    for line in _problem_lines(problems):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_summary_line(cache, checked, elapsed, workers), markup=False, soft_wrap=True)
    if problems:
        raise CacheError(f"{cache.path}: {len(problems)} problem(s). Put it right: {repair_command(cache, checked)}")


def check_shards(cache: CacheOnDisk, workers: int) -> list[ShardCheck]:
    """Check every shard that was made, in `workers` processes; results in shard order.

    Raises CacheError if the codec's vocabulary order is missing.
    """
    if not cache.sidecars:
        return []
    codec = cache_codec(cache.path, cache.identity, cache.recipe or "R")
    total = sum(len(sidecar["keys"]) for sidecar in cache.sidecars.values())
    checked: dict[str, ShardCheck] = {}
    wrong = 0
    # Fork before the progress bar starts its thread. Fresh interpreters would each take seconds to import torch.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), torch.set_num_threads, (1,)) as pool:
        jobs: list[Future[ShardCheck]] = [
            pool.submit(check_shard, cache.with_one_shard(name), codec, name) for name in cache.sidecars
        ]
        progress = StepProgress("verify", total)
        try:
            for job in as_completed(jobs):
                shard = job.result()
                checked[shard.name] = shard
                wrong += bool(shard.problems)
                progress.advance(f"{wrong} bad shards", by=len(cache.sidecars[shard.name]["keys"]))
        finally:
            progress.close()
    return [checked[name] for name in cache.sidecars]


def check_shard(cache: CacheOnDisk, codec: Codec, name: str) -> ShardCheck:
    """Hash a shard and decode its records; one record is in memory at a time."""
    sidecar = cache.sidecars[name]
    wrong = missing_shards(cache.path, cache.identity, [cache.expected[name]], cache.sidecars, verify=True)
    problems = [Problem(name, "", why) for why in wrong.values()]
    foreign = sidecar["made_for"] != cache.made_for  # its records belong to another codec, and would be misread
    if foreign or not is_file(cache.path / name):
        return ShardCheck(name, tuple(problems), True, 0, 0, 0.0)
    tokens, skipped, seconds = 0, set(), 0.0
    with local_copy(cache.path / name) as copy, open(copy, "rb") as file:
        for index, key in enumerate(sidecar["keys"]):
            try:
                record, started = read_record(file, sidecar, index), time.process_time()
                tokens += decode(record, codec, cache)
                seconds += time.process_time() - started
            except SampleError:
                skipped.add(key)
            except ValueError as error:
                problems.append(Problem(name, key, str(error)))
    if not problems and (tokens, skipped) != (sidecar["tokens"], sidecar["skipped"].keys()):
        stated, found = (
            f"{t} tokens and {len(s)} skipped samples"
            for t, s in ((sidecar["tokens"], sidecar["skipped"]), (tokens, skipped))
        )
        problems.append(Problem(name, "", f"its sidecar says {stated}, its records {found}"))
    bad = sum(bool(problem.key) for problem in problems)
    return ShardCheck(name, tuple(problems), bool(wrong), len(sidecar["keys"]) - len(skipped) - bad, tokens, seconds)


def decode(record: bytes, codec: Codec, cache: CacheOnDisk) -> int:
    """Decode one record and return its number of response tokens.

    Raises SampleError if the sample was skipped, ValueError if the record is wrong.
    """
    layers = len(cache.identity.layers)
    tokens, streams = unpack_record(record, codec.token_bytes(layers), cache.made_for)
    try:
        signal = codec.decode(codec.unpack(streams, len(tokens), layers), NO_HEAD)
        if cache.identity.mapped and len(unpack_places(record, cache.made_for)) != len(tokens) + 1:
            raise ValueError("it does not say of each of its tokens which response token it is")
    except (KeyError, IndexError) as error:
        raise ValueError(f"it does not decode: {error!r}") from None
    _check_values(signal, cache.identity.vocab)
    return len(tokens)


def repair_command(cache: CacheOnDisk, checked: Sequence[ShardCheck]) -> str:
    """The command that repairs the cache. It first removes each sidecar that declares bad records valid."""
    misleading = [shard.name for shard in checked if shard.problems and not shard.found_by_only_missing]
    files = [(cache.path / name).with_suffix(".json") for name in misleading]
    return f"{command_to_remove(files)} && {cache.command()}" if misleading else cache.command()


def _check_values(signal: Signal, vocab: int) -> None:
    if isinstance(signal, HiddenSignal):
        if not signal.hidden.isfinite().all():
            raise ValueError("it has hidden states that are not finite")
        return
    if not 0 <= int(signal.ids.min()) <= int(signal.ids.max()) < vocab:
        raise ValueError(f"it has ids outside of 0..{vocab - 1}")
    total = signal.probs.sum(-1) + signal.tail
    if not ((total - 1).abs() < ROUNDING).all() or not signal.neg_entropy.isfinite().all():
        raise ValueError("its probabilities do not sum to 1")


def check_other_files(cache: CacheOnDisk) -> list[Problem]:
    """Problems of the sidecars, the manifest, the map and the head."""
    listed = {shard["name"]: shard for shard in cache.manifest["shards"]} if cache.manifest else {}
    valid, problems = valid_sidecars(cache.path), []
    for name, entry in listed.items():
        if name not in valid:
            file = str(Path(name).with_suffix(".json"))
            problems.append(Problem(file, "", "the sidecar is gone or damaged; the manifest still has it"))
        elif valid[name] != entry:
            problems.append(Problem(MANIFEST, "", f"it does not say of {name} what its sidecar says"))
    identity = cache.identity
    if cache.sidecars and identity.mapped and not has_map(cache.path, identity.fingerprints, identity.vocab):
        problems.append(Problem(MAPPING, "", "it is gone, or not the map that cache.json names"))
    if cache.sidecars and CODECS[cache.identity.codec["name"]].needs_head:
        problems += _head_problems(cache)
    return problems


def _head_problems(cache: CacheOnDisk) -> Iterator[Problem]:
    written = head_sha256(cache.path)
    if cache.manifest and cache.manifest.get("head_sha256") != written:
        yield Problem(MANIFEST, "", "it does not say of the head what its sidecar says")
    try:
        read_head(cache.path, written or "none recorded", "cpu", cache.recipe or "R")
    except CacheError as error:
        yield Problem(HEAD, "", str(error))


def _problem_lines(problems: Sequence[Problem]) -> Iterator[str]:
    """One line per problem; neighbouring records of a file with the same problem share a line."""
    for (file, what), group in groupby(problems, key=lambda problem: (problem.file, problem.what)):
        keys = [problem.key for problem in group]
        records = keys[0] if len(keys) == 1 else f"{keys[0]} to {keys[-1]} ({len(keys):,})"
        yield ": ".join(filter(None, (file, records, what)))


def _summary_line(cache: CacheOnDisk, checked: Sequence[ShardCheck], elapsed: float, workers: int) -> str:
    records = sum(shard.records for shard in checked)
    token_layers = sum(shard.tokens for shard in checked) * len(cache.identity.layers)
    decoding = max(1e-9, sum(shard.seconds for shard in checked))  # the clock may be too coarse for a tiny cache
    line = f"verified {len(checked)} shards: {records:,} records, {token_layers:,} token-layers decoded"
    if not token_layers:
        return line
    return (
        f"{line} in {elapsed:.1f} s: {token_layers / elapsed:,.0f} token-layers/s with reading and hashing, "
        f"on {workers} processes; decoding alone {token_layers / decoding:,.0f} token-layers/s a core"
    )
