"""Which sample goes into which shard. The plan follows from the records alone, so it is the same on every rank."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.atomic import write_file
from data_prep.records import Accepted, Rejected
from data_prep.schema import SCHEMA_VERSION, SPLITS, DataError
from data_prep.shards import shard_name
from data_prep.split import split_of

PLAN = "plan.json"
"""In the output folder: what its shards are made from."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard that is to be written."""

    split: str
    name: str
    samples: Sequence[Accepted]

    @property
    def keys(self) -> list[str]:
        """Its samples' keys, in order."""
        return [accepted.key for accepted in self.samples]


@dataclass(frozen=True)
class Plan:
    """The shards to be written, and the records that are left out."""

    shards: Sequence[PlannedShard]
    rejects: Sequence[Rejected]
    """In the order of the input."""

    @property
    def accepted(self) -> int:
        """Samples to be written."""
        return sum(len(shard.samples) for shard in self.shards)

    @property
    def read(self) -> int:
        """Records read: accepted + rejected."""
        return self.accepted + len(self.rejects)

    @property
    def repeated(self) -> int:
        """Samples whose id was numbered, because an earlier record has it."""
        return sum(accepted.repeats is not None for shard in self.shards for accepted in shard.samples)

    def notices(self) -> list[tuple[str, int]]:
        """Keys of images.NOTICES, and of how many images each is true."""
        found = Counter(name for shard in self.shards for accepted in shard.samples for name in accepted.notices)
        return sorted(found.items())

    def in_split(self, split: str) -> list[PlannedShard]:
        """The shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == split]

    def reasons(self) -> list[tuple[str, int]]:
        """Reason codes and how often each occurs, the most frequent first."""
        return sorted(Counter(reject.reason for reject in self.rejects).items(), key=lambda pair: (-pair[1], pair[0]))

    def fingerprint(self) -> str:
        """SHA-256 over every byte that will be written, and where it will stand."""
        digest = hashlib.sha256(f"schema {SCHEMA_VERSION}".encode())
        for shard in self.shards:
            digest.update(f"{shard.split}/{shard.name}".encode())
            for accepted in shard.samples:
                digest.update(accepted.digest + (accepted.id.encode() if accepted.repeats is not None else b""))
        return digest.hexdigest()


def make_plan(
    found: Iterable[Accepted | Rejected], samples_per_shard: int, held_out: float, number_repeated: bool = True
) -> Plan:
    """Plan the shards. `found` may come in any order. Of several records with one id, the first is accepted.

    held_out is the share of samples without a split of their own that is held out (0 to 1). With number_repeated the
    later ones get the ids ID-2, ID-3, ..., as far as no record has these itself; without, they are rejected.
    """
    found = list(found)
    ids = {record.id for record in found if isinstance(record, Accepted)}
    numbers: Counter[str] = Counter()
    rejects: list[Rejected] = []
    accepted: dict[str, Accepted] = {}
    for record in sorted(found, key=lambda record: record.location.index):
        if isinstance(record, Rejected):
            rejects.append(record)
        elif record.key in accepted and number_repeated:
            record = _numbered(record, ids, numbers)
            accepted[record.key] = record
        elif record.key in accepted:
            detail = f"{record.id!r} was at {accepted[record.key].location}"
            rejects.append(Rejected(record.location, record.id, "duplicate_id", detail))
        else:
            accepted[record.key] = record
    return Plan(_shards(list(accepted.values()), samples_per_shard, held_out), rejects)


def _numbered(record: Accepted, ids: set[str], numbers: Counter[str]) -> Accepted:
    """The record under an id that is not in `ids`, which it joins; `numbers` remembers where to begin."""
    while (new := f"{record.id}-{numbers[record.id] + 2}") in ids:
        numbers[record.id] += 1
    ids.add(new)
    return replace(record, id=new, repeats=record.id)


def claim_folder(folder: Path, fingerprint: str, settings: dict[str, Any]) -> None:
    """Write folder/plan.json, or check that the one there is of the same plan.

    Raises DataError where the folder was begun from something else: its shards would be mixed up with these.
    """
    path = folder / PLAN
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        foreign = [split for split in SPLITS if any((folder / split).glob("*.tar"))]
        if foreign:
            raise DataError(
                f"{folder / foreign[0]} holds shards, but there is no {path} to say what they are made from; "
                "give another --output, or remove them"
            ) from None
        content = {"format": "vlsi-plan", "version": SCHEMA_VERSION, "fingerprint": fingerprint, "settings": settings}
        write_file(path, (json.dumps(content, indent=1) + "\n").encode())
        return
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove {folder}, or give another --output") from None
    if begun.get("fingerprint") != fingerprint:
        raise DataError(
            f"{folder} was begun from something else: {_difference(begun.get('settings', {}), settings)}. "
            f"Give another --output, or remove {folder} to make it anew"
        )


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not names:
        return "the options are the same, so what the input holds has changed"
    return "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)


def _shards(accepted: list[Accepted], samples_per_shard: int, held_out: float) -> list[PlannedShard]:
    free = [record for record in accepted if record.split is None]
    drawn = dict(
        zip((record.key for record in free), split_of([record.pictures for record in free], held_out), strict=True)
    )
    shards = []
    for split in SPLITS:
        members = [record for record in accepted if (record.split or drawn[record.key]) == split]
        for number, start in enumerate(range(0, len(members), samples_per_shard)):
            shards.append(PlannedShard(split, shard_name(number), members[start : start + samples_per_shard]))
    return shards
