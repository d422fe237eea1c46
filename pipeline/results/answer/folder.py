"""The output folder of `answer`: shards that mirror those of the data, written by any number of processes.

answers.json            the identity: what the answers are made from. Written first; every process must have the same
000000.tar              mirrors data shard 000000.tar: same name, keys and order, without the rejected samples
000000.answered.json    the shard's sidecar: its manifest entry and its rejects. Written after it: "this shard is done"
rejects.jsonl           all rejects, from the sidecars
manifest.json           written last: the folder is complete
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.lock import lock_file
from data_prep.schema import SCHEMA_VERSION, SPLITS
from data_prep.shards import (
    FORMAT,
    MANIFEST,
    ShardEntry,
    ShardFolder,
    ShardInfo,
    write_file,
    write_manifest,
    write_shard,
)
from pipeline.cache.fingerprint import compare
from pipeline.errors import DataError, RecipeError
from pipeline.runtime.data.bad_samples import BadSamples, Rejected
from pipeline.runtime.folder import write_json

IDENTITY = "answers.json"
REJECTS = "rejects.jsonl"
AGAIN_S = (0.5, 2.0)
"""How long to wait, at random between these, before other parts' shards are looked for again."""


@dataclass(frozen=True)
class Origin:
    """What answers are made from."""

    model: Path
    data: Path
    identity: Mapping[str, str]
    """Fingerprints and settings that decide the answers. A folder holds answers of one identity only."""

    def to_json(self) -> dict[str, Any]:
        """The content of answers.json."""
        return {"model": str(self.model), "data": str(self.data), "identity": dict(self.identity)}


@dataclass(frozen=True)
class ShardAnswers:
    """A sidecar: what became of one data shard."""

    entry: ShardEntry | None
    """The answered shard's manifest entry; None if all samples were rejected, and there is no shard."""
    read: int
    """Samples of the data shard: those in the answered shard and those rejected."""
    rejected: list[Rejected]

    @property
    def used(self) -> int:
        """Samples in the answered shard."""
        return self.entry["samples"] if self.entry else 0


class AnswerFolder:
    """Answers that are being written. Raises RecipeError where the folder holds something else."""

    def __init__(self, path: Path, origin: Origin, data: ShardFolder):
        self.path, self.origin, self.data = path, origin, data
        if not (path / IDENTITY).is_file():
            self._refuse_other_content()
            write_json(path / IDENTITY, origin.to_json())  # processes that start at once write the same bytes
        self._refuse_other_origin()

    @contextlib.contextmanager
    def lock(self, shard: ShardInfo) -> Iterator[None]:
        """Hold the shard's lock. Raises data_prep's DataError where another process holds it."""
        path, advice = self.path / shard.name, "share the shards: --part 1/2 here and --part 2/2 there"
        with lock_file(path.with_name(f".{path.stem}.lock"), str(path), advice):
            yield

    def done(self, shard: ShardInfo) -> ShardAnswers | None:
        """What became of a data shard; None if it is still to be answered."""
        try:
            sidecar = json.loads(self._sidecar(shard).read_text(encoding="utf-8"))
            answers = ShardAnswers(sidecar["entry"], sidecar["read"], [Rejected(**one) for one in sidecar["rejected"]])
            if answers.entry and (self.path / shard.name).stat().st_size != answers.entry["bytes"]:
                return None
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: the shard is answered again
            return None
        return answers

    def write(
        self, shard: ShardInfo, samples: Iterable[tuple[str, dict[str, bytes]]], rejected: list[Rejected]
    ) -> None:
        """Write a shard and then its sidecar, each whole or not at all."""
        self._sidecar(shard).unlink(missing_ok=True)  # while a shard is being replaced, it must not count as done
        entry = None
        if len(rejected) < shard.samples:
            entry = write_shard(self.path / shard.name, samples)
        else:
            (self.path / shard.name).unlink(missing_ok=True)
        sidecar = {"entry": entry, "read": shard.samples, "rejected": [asdict(one) for one in rejected]}
        write_file(self._sidecar(shard), (json.dumps(sidecar, ensure_ascii=False) + "\n").encode())

    def write_rejects(self, more: Iterable[Rejected] = ()) -> None:
        """Write rejects.jsonl anew: the rejects of all shards that are done, and `more` of one that is not."""
        done = (self.done(shard) for shard in self.data.shards)
        rejected = [*(one for answers in done if answers for one in answers.rejected), *more]
        lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in rejected)
        write_file(self.path / REJECTS, "".join(lines).encode())

    def missing(self) -> list[int]:
        """Numbers, from 0, of the data shards that are still to be answered."""
        return [number for number, shard in enumerate(self.data.shards) if self.done(shard) is None]

    def still_missing(self) -> list[int]:
        """`missing`, asked once more after a moment where some are: of two parts that end at once, one sees both.

        Over NFS a host may go on finding a file missing until it learns that the folder has changed: from its own next
        change there, to which the server answers with the times before and after it. Two that change it at the same
        tick learn nothing of each other, so each changes it again, at another moment.
        """
        if not self.missing():
            return []
        time.sleep(random.uniform(*AGAIN_S))
        write_json(self.path / IDENTITY, self.origin.to_json())  # the same bytes
        return self.missing()

    def finish(self, bad_samples: BadSamples) -> tuple[int, int]:
        """Write rejects.jsonl and the manifest, when no shard is missing. Returns (samples read, samples used).

        bad_samples: a new count; it gets those of all shards, whoever made them. Raises DataError where they are too
        many, or no sample at all has answers.
        """
        all_answers = [answers for shard in self.data.shards if (answers := self.done(shard))]
        read, used = (sum(counts) for counts in zip(*((one.read, one.used) for one in all_answers), strict=True))
        self.write_rejects()
        if not used:
            raise DataError(
                f"none of the {read} samples of {self.data.path} has a usable answer, so {self.path} holds no data. "
                f"{self.path / REJECTS} has the reasons"
            )
        bad_samples.read, bad_samples.rejected = read, read - used
        bad_samples.check_whole()
        self._write_manifest([one.entry for one in all_answers if one.entry], read, used)
        return read, used

    def _write_manifest(self, entries: list[ShardEntry], read: int, used: int) -> None:
        parent, name = self.data.manifest, self.path.name
        answered = {
            **self.origin.to_json(),
            # The digest alone: a manifest finds its own checksum by the prefix.
            "data_checksum": parent.get("checksum", "").rpartition(":")[2],
            "data_provenance": parent.get("provenance"),
            "read": read,
            "rejected": read - used,
        }
        # Not as `provenance`: in that, `data_prep lint` counts the samples of train and held_out together.
        split = name if name in SPLITS else parent.get("split", "train")
        write_manifest(self.path, entries, format=FORMAT, version=SCHEMA_VERSION, split=split, answered=answered)

    def _sidecar(self, shard: ShardInfo) -> Path:
        return (self.path / shard.name).with_suffix(".answered.json")

    def _refuse_other_content(self) -> None:
        found = [file.name for file in (self.path / MANIFEST, *sorted(self.path.glob("*.tar"))) if file.exists()]
        if found and not (self.path / IDENTITY).is_file():  # else another process has begun it just now
            raise RecipeError(
                f"--output {self.path}: expected a new folder or one that this command has begun, with {IDENTITY}; "
                f"found {found[0]} without it. Give another --output"
            )

    def _refuse_other_origin(self) -> None:
        path = self.path / IDENTITY
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            now = dict.fromkeys(found["identity"], "none") | dict(self.origin.identity)
            mismatches = compare(now, found["identity"])
            begun_with = f"--model {found['model']} --data {found['data']}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{path} is damaged ({error!r}); give another --output") from None
        if mismatches:
            lines = [f"  {one.name}: the folder has {one.found or 'none'}, now {one.expected}" for one in mismatches]
            raise RecipeError(
                f"{self.path} was begun from something else, with {begun_with}:\n"
                + "\n".join(lines)
                + "\nContinue with what it was begun from, or give another --output"
            )
