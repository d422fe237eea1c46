"""`python -m data_prep shard`: read everything once to plan, then write; each rank its part of both.

First, record i is examined by rank i % n, and what was found is shared, so that every rank makes the same plan. Then
shard k is written by rank k % n. So neither bytes nor rejects depend on the number of ranks.
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
from data_prep.images import image_suffix
from data_prep.plan import Plan, PlannedShard, claim_folder, make_plan
from data_prep.progress import Progress
from data_prep.ranks import Ranks
from data_prep.records import Good, Place, Reject, build, digest_of, examine
from data_prep.schema import SCHEMA_VERSION, SPLITS, BadSample, DataError
from data_prep.shards import FORMAT, ShardEntry, ShardWriter, describe_shard, write_manifest
from data_prep.sources import Draft, Source

EXCHANGE_EVERY = 64
"""Records that each rank examines between two exchanges."""
TELL_EVERY_SECONDS = 0.5
"""Between two messages to rank 0 about what was written."""

REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class Job:
    """What the command line asked for."""

    source: Source
    options: argparse.Namespace
    """The source's own options."""
    output: Path
    samples_per_shard: int
    held_out: float
    max_rejects: float
    limit: int | None

    def settings(self) -> dict[str, Any]:
        """All that decides what is written, as JSON; of paths the last part only, so that a moved input is the same."""
        own = {name: value.name if isinstance(value, Path) else value for name, value in vars(self.options).items()}
        common = {"samples_per_shard": self.samples_per_shard, "held_out": self.held_out, "limit": self.limit}
        return {"source": self.source.name, **own, **common}

    def records(self) -> Iterator[tuple[Place, Draft]]:
        """The source's drafts, each with its place."""
        drafts = islice(self.source.read(self.options), self.limit)
        return ((Place(index, draft.file, draft.line), draft) for index, draft in enumerate(drafts))


@dataclass(frozen=True)
class Outcome:
    """What became of it."""

    plan: Plan
    refused: bool
    """Too many rejects: nothing was written but rejects.jsonl."""
    shards_kept: int
    """Shards that an earlier run had finished."""


def shard(job: Job, ranks: Ranks) -> Outcome:
    """All: examine, plan and write. Raises RankFailed, on every rank, for the first error of any."""
    plan = make_plan(_examine_all(job, ranks), job.samples_per_shard, job.held_out)
    if not plan.read:
        raise DataError(f"--source {job.source.name}: read 0 records; expected at least one")
    refused = len(plan.rejects) > job.max_rejects * plan.read
    ranks.on_first(lambda: _begin(job, plan, refused))
    if refused:
        return Outcome(plan, refused, 0)
    mine = plan.shards[ranks.rank :: ranks.size]
    with Progress("wrote", visible=ranks.rank == 0) as progress:
        count = _Counter(progress, plan.good)
        parts = ranks.finish(lambda: _write(job, mine, _Teller(ranks, count)), count.hear)
    entries = [entry for written, _ in parts for entry in written]
    ranks.on_first(lambda: _write_manifests(job, plan, entries))
    return Outcome(plan, refused, sum(kept for _, kept in parts))


def _examine_all(job: Job, ranks: Ranks) -> list[Good | Reject]:
    """All: everything that is in the source, judged, on every rank."""
    records = job.records()
    found: list[Good | Reject] = []
    with Progress("examined", visible=ranks.rank == 0) as progress:
        while True:
            parts = ranks.gather(ranks.together(lambda: _examine_some(job, records, ranks)))
            if len({part.seen for part in parts}) > 1:
                raise DataError(
                    f"the ranks do not see the same input: after {len(found)} records, the next were "
                    + ", ".join(f"{part.seen} on rank {rank}" for rank, part in enumerate(parts))
                )
            found += [record for part in parts for record in part.found]
            progress.update(len(found), parts[0].done)
            if parts[0].seen < EXCHANGE_EVERY * ranks.size:
                return found


@dataclass(frozen=True)
class _Part:
    """What one rank found among the next records."""

    found: list[Good | Reject]
    seen: int
    done: float | None


def _examine_some(job: Job, records: Iterator[tuple[Place, Draft]], ranks: Ranks) -> _Part:
    found: list[Good | Reject] = []
    seen, done = 0, None
    for place, draft in islice(records, EXCHANGE_EVERY * ranks.size):
        seen, done = seen + 1, draft.done
        if place.index % ranks.size == ranks.rank:
            found.append(examine(place, draft, job.source.name))
    return _Part(found, seen, done)


def _begin(job: Job, plan: Plan, refused: bool) -> None:
    """Rank 0: what is written before any shard."""
    if not refused:
        claim_folder(job.output, plan.fingerprint(), job.settings())
        for split in SPLITS:
            for leftover in (job.output / split).glob(f".*{PARTIAL}"):  # of a run that was killed
                leftover.unlink(missing_ok=True)
    lines = "".join(reject.to_json() + "\n" for reject in plan.rejects)
    write_file(job.output / REJECTS, lines.encode())


def _write(job: Job, shards: Sequence[PlannedShard], tell: _Teller) -> tuple[list[tuple[str, ShardEntry]], int]:
    """Write a rank's shards; returns (split, manifest entry) of each, and how many of them were there already."""
    entries: list[tuple[str, ShardEntry]] = []
    missing = []
    for shard in shards:
        if entry := _finished(job, shard):
            entries.append((shard.split, entry))
            tell(entry["samples"])
        else:
            missing.append(shard)
    kept = len(entries)
    entries += _write_missing(job, missing, tell)
    tell.now()
    return entries, kept


def _write_missing(job: Job, shards: Sequence[PlannedShard], tell: _Teller) -> Iterator[tuple[str, ShardEntry]]:
    home = {good.place.index: (shard, good) for shard in shards for good in shard.samples}
    with ExitStack() as unfinished:
        writers: dict[str, ShardWriter] = {}  # one a split at most, for samples come in the plan's order
        for place, draft in job.records() if home else ():
            if place.index not in home:
                continue
            shard, good = home.pop(place.index)
            if shard.split not in writers:
                writers[shard.split] = unfinished.enter_context(ShardWriter(job.output / shard.split / shard.name))
            writers[shard.split].add(good.key, _members(job, place, draft, good))
            tell(1)
            if len(writers[shard.split]) == len(shard.samples):
                yield shard.split, writers.pop(shard.split).commit()
            if not home:
                return
    if home:
        raise DataError(f"{len(home)} records were gone when they were to be written: the input changed; run again")


def _members(job: Job, place: Place, draft: Draft, good: Good) -> dict[str, bytes]:
    """A sample's members, read again. Raises DataError where they are not what was examined."""
    try:
        members = build(place, draft, job.source.name, image_suffix)[2]
    except BadSample as bad:
        raise DataError(f"{place} changed between the first reading and the second: {bad}; run again") from None
    if digest_of(members) != good.digest:
        raise DataError(f"{place} changed between the first reading and the second; run again")
    return members


def _finished(job: Job, shard: PlannedShard) -> ShardEntry | None:
    """The entry of a shard that an earlier run finished. The folder is of the same plan: claim_folder saw to it."""
    path = job.output / shard.split / shard.name
    try:
        entry = describe_shard(path) if path.exists() else None
    except DataError:
        return None
    return entry if entry and entry["keys"] == shard.keys else None


def _write_manifests(job: Job, plan: Plan, entries: list[tuple[str, ShardEntry]]) -> None:
    """Rank 0: last of all, so that a folder with a manifest is complete."""
    provenance = {**job.settings(), "read": plan.read, "rejected": len(plan.rejects), "plan": plan.fingerprint()}
    for split in SPLITS:
        shards = sorted((entry for where, entry in entries if where == split), key=lambda entry: entry["name"])
        fields = {"format": FORMAT, "version": SCHEMA_VERSION, "split": split, "provenance": provenance}
        write_manifest(job.output / split, shards, **fields)


class _Counter:
    """Rank 0's count of what all ranks wrote."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._written = progress, total, 0

    def hear(self, told: list[int]) -> None:
        """Add what ranks told."""
        self._written += sum(told)
        self._progress.update(self._written, self._written / max(1, self._total))


class _Teller:
    """Tells rank 0, now and then, how many samples this rank wrote; on rank 0, listens as well."""

    def __init__(self, ranks: Ranks, count: _Counter):
        self._ranks, self._count = ranks, count
        self._untold, self._told = 0, time.monotonic()

    def __call__(self, written: int) -> None:
        self._untold += written
        if time.monotonic() - self._told >= TELL_EVERY_SECONDS:
            self.now()

    def now(self) -> None:
        self._ranks.tell(self._untold)
        self._untold, self._told = 0, time.monotonic()
        if self._ranks.rank == 0:
            self._count.hear(self._ranks.heard())
