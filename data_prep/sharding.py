"""`python -m data_prep shard`: read the input once to check and plan, then again to write.

Of n ranks, rank i % n checks record i. The ranks share what they found, so every rank makes the same plan. Then
rank k % n writes shard k. So neither the bytes nor the rejects depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.atomic import PARTIAL, write_file
from data_prep.lock import lock_folder
from data_prep.plan import Plan, PlannedShard, claim_folder, make_plan
from data_prep.progress import Progress
from data_prep.ranks import Ranks
from data_prep.records import Accepted, Location, Rejected, check_record, convert_record, digest_of, with_id
from data_prep.schema import SCHEMA_VERSION, SPLITS, BadSample, DataError
from data_prep.shards import FORMAT, ShardEntry, ShardWriter, describe_shard, write_manifest
from data_prep.sources import LazyRecord, Source

EXCHANGE_EVERY = 64
"""Records that each rank checks between two exchanges."""
SEND_EVERY_SECONDS = 0.5
"""Between two messages of a rank to rank 0 about what it has written."""

REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class ShardJob:
    """What the command line asked for."""

    source: Source
    options: argparse.Namespace
    """The source's own options."""
    output: Path
    samples_per_shard: int
    held_out: float
    max_rejects: float
    limit: int | None
    repeated_ids: str = "number"
    """number or reject: what happens to a record whose id an earlier one has."""
    convert: str | None = None
    """A background colour: images of more than 8 bits or with transparency are written as they look on it."""

    def settings(self) -> dict[str, Any]:
        """What decides the bytes that are written. Paths are cut to their last part: a moved input is the same."""
        own = {name: value.name if isinstance(value, Path) else value for name, value in vars(self.options).items()}
        common = {"samples_per_shard": self.samples_per_shard, "held_out": self.held_out, "limit": self.limit}
        chosen = {"repeated_ids": self.repeated_ids, "convert": self.convert}
        unusual = {name: value for name, value in chosen.items() if value not in ("number", None)}
        return {"source": self.source.name, **own, **common, **unusual}

    def records(self) -> Iterator[tuple[Location, LazyRecord]]:
        """The source's records, each with its location."""
        records = islice(self.source.read(self.options), self.limit)
        return ((Location(index, record.file, record.line), record) for index, record in enumerate(records))


@dataclass(frozen=True)
class ShardResult:
    """What `shard` did."""

    plan: Plan
    refused: bool
    """Too many rejects: nothing was written but rejects.jsonl."""
    shards_kept: int
    """Shards that an earlier run had finished."""


def shard(job: ShardJob, ranks: Ranks) -> ShardResult:
    """All: check, plan and write. Raises DataError or RankFailed, on every rank alike."""
    with ExitStack() as held:
        ranks.run_on_first(lambda: held.enter_context(lock_folder(job.output)))
        return _shard(job, ranks)


def _shard(job: ShardJob, ranks: Ranks) -> ShardResult:
    found = _check_all(job, ranks)
    plan = make_plan(found, job.samples_per_shard, job.held_out, job.repeated_ids == "number")
    if not plan.read:
        raise DataError(f"--source {job.source.name}: read 0 records; expected at least one")
    refused = len(plan.rejects) > job.max_rejects * plan.read
    ranks.run_on_first(lambda: _begin(job, plan, refused))
    if refused:
        return ShardResult(plan, refused, 0)
    mine = plan.shards[ranks.rank :: ranks.size]
    with Progress("wrote", visible=ranks.rank == 0) as progress:
        total = _ProgressTotal(progress, plan.accepted)
        parts = ranks.run_and_collect(lambda: _write(job, mine, _ProgressSender(ranks, total)), total.add)
    entries = [entry for written, _ in parts for entry in written]
    ranks.run_on_first(lambda: _write_manifests(job, plan, entries))
    return ShardResult(plan, refused, sum(kept for _, kept in parts))


def _check_all(job: ShardJob, ranks: Ranks) -> list[Accepted | Rejected]:
    """All: check every record of the source; returns the results of all ranks on every rank."""
    records = job.records()
    found: list[Accepted | Rejected] = []
    with Progress("examined", visible=ranks.rank == 0) as progress:
        while True:
            parts = ranks.gather(ranks.run_on_all(lambda: _check_some(job, records, ranks)))
            if len({part.seen for part in parts}) > 1:
                raise DataError(
                    f"the ranks do not see the same input: after {len(found)} records, the next were "
                    + ", ".join(f"{part.seen} on rank {rank}" for rank, part in enumerate(parts))
                )
            found += [record for part in parts for record in part.found]
            progress.update(len(found), parts[0].progress)
            if parts[0].seen < EXCHANGE_EVERY * ranks.size:
                return found


@dataclass(frozen=True)
class _Checked:
    """What one rank found among the next records."""

    found: list[Accepted | Rejected]
    seen: int
    """Records that it read, its own and those of other ranks."""
    progress: float | None


def _check_some(job: ShardJob, records: Iterator[tuple[Location, LazyRecord]], ranks: Ranks) -> _Checked:
    found: list[Accepted | Rejected] = []
    seen, progress = 0, None
    for location, record in islice(records, EXCHANGE_EVERY * ranks.size):
        seen, progress = seen + 1, record.progress
        if location.index % ranks.size == ranks.rank:
            found.append(check_record(location, record, job.source.name, job.convert))
    return _Checked(found, seen, progress)


def _begin(job: ShardJob, plan: Plan, refused: bool) -> None:
    """Rank 0: write plan.json and rejects.jsonl, which stand before any shard."""
    if not refused:
        claim_folder(job.output, plan.fingerprint(), job.settings())
        for split in SPLITS:
            for leftover in (job.output / split).glob(f".*{PARTIAL}"):  # of a run that was killed
                leftover.unlink(missing_ok=True)
    lines = "".join(reject.to_json() + "\n" for reject in plan.rejects)
    write_file(job.output / REJECTS, lines.encode())


def _write(
    job: ShardJob, shards: Sequence[PlannedShard], report: _ProgressSender
) -> tuple[list[tuple[str, ShardEntry]], int]:
    """Write a rank's shards. Returns (split, manifest entry) of each, and how many an earlier run had finished."""
    entries: list[tuple[str, ShardEntry]] = []
    missing = []
    for shard in shards:
        if entry := _finished(job, shard):
            entries.append((shard.split, entry))
            report(entry["samples"])
        else:
            missing.append(shard)
    kept = len(entries)
    entries += _write_missing(job, missing, report)
    report.now()
    return entries, kept


def _write_missing(
    job: ShardJob, shards: Sequence[PlannedShard], report: _ProgressSender
) -> Iterator[tuple[str, ShardEntry]]:
    home = {accepted.location.index: (shard, accepted) for shard in shards for accepted in shard.samples}
    with ExitStack() as unfinished:
        writers: dict[str, ShardWriter] = {}  # at most one a split: samples come in the order of the plan
        for location, record in job.records() if home else ():
            if location.index not in home:
                continue
            shard, accepted = home.pop(location.index)
            if shard.split not in writers:
                writers[shard.split] = unfinished.enter_context(ShardWriter(job.output / shard.split / shard.name))
            writers[shard.split].add(accepted.key, _members(job, location, record, accepted))
            report(1)
            if len(writers[shard.split]) == len(shard.samples):
                yield shard.split, writers.pop(shard.split).commit()
            if not home:
                return
    if home:
        raise DataError(f"{len(home)} records were gone when they were to be written: the input changed; run again")


def _members(job: ShardJob, location: Location, record: LazyRecord, accepted: Accepted) -> dict[str, bytes]:
    """Read a sample's members again. Raises DataError where they differ from what was checked."""
    try:
        members = convert_record(location, record, job.source.name, job.convert, decode=False).members
    except BadSample as bad:
        raise DataError(f"{location} changed between the first reading and the second: {bad}; run again") from None
    if digest_of(members) != accepted.digest:
        raise DataError(f"{location} changed between the first reading and the second; run again")
    return with_id(members, accepted)


def _finished(job: ShardJob, shard: PlannedShard) -> ShardEntry | None:
    """The entry of a shard that an earlier run finished. claim_folder has checked that the plan is the same."""
    path = job.output / shard.split / shard.name
    try:
        entry = describe_shard(path) if path.exists() else None
    except DataError:
        return None
    return entry if entry and entry["keys"] == shard.keys else None


def _write_manifests(job: ShardJob, plan: Plan, entries: list[tuple[str, ShardEntry]]) -> None:
    """Rank 0: write the manifests, last of all. So a folder with a manifest is complete."""
    provenance = {**job.settings(), "read": plan.read, "rejected": len(plan.rejects), "plan": plan.fingerprint()}
    for split in SPLITS:
        shards = sorted((entry for where, entry in entries if where == split), key=lambda entry: entry["name"])
        fields = {"format": FORMAT, "version": SCHEMA_VERSION, "split": split, "provenance": provenance}
        write_manifest(job.output / split, shards, **fields)


class _ProgressTotal:
    """Rank 0: how many samples all ranks have written."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._written = progress, total, 0

    def add(self, counts: list[int]) -> None:
        """Add the numbers that ranks sent."""
        self._written += sum(counts)
        self._progress.update(self._written, self._written / max(1, self._total))


class _ProgressSender:
    """Sends rank 0, now and then, how many samples this rank has written; rank 0 receives as well."""

    def __init__(self, ranks: Ranks, total: _ProgressTotal):
        self._ranks, self._total = ranks, total
        self._unsent, self._sent_at = 0, time.monotonic()

    def __call__(self, written: int) -> None:
        self._unsent += written
        if time.monotonic() - self._sent_at >= SEND_EVERY_SECONDS:
            self.now()

    def now(self) -> None:
        self._ranks.send(self._unsent)
        self._unsent, self._sent_at = 0, time.monotonic()
        if self._ranks.rank == 0:
            self._total.add(self._ranks.receive())
