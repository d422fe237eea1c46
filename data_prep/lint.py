"""`python -m data_prep lint`: read every record back, and say which are not what they should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.images import check_image
from data_prep.progress import Progress
from data_prep.schema import SPLITS, BadSample, DataError, key_for, validate_record
from data_prep.shards import MANIFEST, ShardFolder, ShardInfo, describe_shard
from data_prep.storage import is_file


@dataclass(frozen=True)
class Problem:
    """A fault of a shard, or of one sample in it."""

    shard: str
    """split/name"""
    key: str
    """The sample's key; empty where the fault is the shard's."""
    what: str


def shard_folders(path: Path) -> list[ShardFolder]:
    """The shard folders at a path: itself, or those of the splits in it. Raises DataError where there is none."""
    inside = [path / split for split in SPLITS if is_file(path / split / MANIFEST)]
    return [ShardFolder(folder) for folder in inside or [path]]


def lint(folders: list[ShardFolder]) -> tuple[list[Problem], list[tuple[str, int]]]:
    """Check hashes, offsets, messages and images of every sample, and that no key comes twice.

    Returns the faults, and of how many images each key of images.NOTICES is true.
    """
    notices: Counter[str] = Counter()
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    total, done = sum(len(folder) for folder in folders), 0
    problems += _count_problems(folders)
    with Progress("checked") as progress:
        for folder in folders:
            problems += [*_manifest_problems(folder), *_unlisted_files(folder)]
            for shard in folder.shards:
                problems += _shard_problems(folder, shard)
                for index in range(shard.first, shard.first + shard.samples):
                    problems += _sample_problems(folder, shard, index, seen, notices)
                    done += 1
                    progress.update(done, done / total)
    return problems, sorted(notices.items())


def _count_problems(folders: list[ShardFolder]) -> Iterator[Problem]:
    """Always read = written + rejected, over the splits of an output."""
    if [folder.manifest.get("split") for folder in folders] != list(SPLITS):
        return
    facts, others = (folder.manifest.get("provenance") for folder in folders)
    if facts != others:
        yield Problem(MANIFEST, "", "the provenance of the splits differs")
    if not isinstance(facts, dict):
        return
    read, rejected = facts.get("read"), facts.get("rejected")
    written = sum(len(folder) for folder in folders)
    if isinstance(read, int) and isinstance(rejected, int) and read != written + rejected:
        yield Problem(MANIFEST, "", f"read {read}, written {written}, rejected {rejected}: read = written + rejected")


def _manifest_problems(folder: ShardFolder) -> Iterator[Problem]:
    """What a manifest says of the folder as a whole. One without a checksum, of an older version, may be damaged."""
    manifest, name = folder.manifest, f"{folder.path.name}/{MANIFEST}"
    for field, expected in (
        ("samples", len(folder)),
        ("bytes", sum(shard.bytes for shard in folder.shards)),
        ("split", folder.path.name if folder.path.name in SPLITS else manifest.get("split")),
    ):
        if manifest.get(field) != expected:
            yield Problem(name, "", f"{field} is {manifest.get(field)!r}, expected {expected!r}")
    provenance = manifest.get("provenance", {})
    facts = [provenance.get(fact, 0) for fact in ("read", "rejected")] if isinstance(provenance, dict) else [None]
    if not all(isinstance(fact, int) and fact >= 0 for fact in facts):
        yield Problem(name, "", f"provenance is {str(provenance)[:200]}: read and rejected must be numbers")


def _unlisted_files(folder: ShardFolder) -> Iterator[Problem]:
    known = {shard.name for shard in folder.shards}
    for path in sorted(folder.path.glob("*.tar")):
        if path.name not in known:
            yield Problem(f"{folder.path.name}/{path.name}", "", "is not in the manifest")


def _shard_problems(folder: ShardFolder, shard: ShardInfo) -> Iterator[Problem]:
    expected = next(entry for entry in folder.manifest["shards"] if entry["name"] == shard.name)
    try:
        found = describe_shard(folder.path / shard.name)
    except DataError as error:
        yield Problem(_name(folder, shard), "", str(error))
        return
    for field, value in expected.items():
        if found.get(field) != value:
            shown = "" if isinstance(value, list) else f": {found.get(field)}, expected {value}"
            yield Problem(_name(folder, shard), "", f"{field} differ from the manifest's{shown}")


def _sample_problems(
    folder: ShardFolder, shard: ShardInfo, index: int, seen: dict[str, str], notices: Counter[str]
) -> Iterator[Problem]:
    key, name = folder.keys[index], _name(folder, shard)
    if key in seen:
        yield Problem(name, key, f"this key is also in {seen[key]}")
    seen.setdefault(key, name)
    try:
        members = folder.read_members(index)
        sample = folder.read(index)
        validate_record(sample.record, sample.images)
        looked = [check_image(content) for content in sample.images]
    except BadSample as bad:
        yield Problem(name, key, str(bad))
    except DataError as error:
        yield Problem(name, key, str(error).partition(". The shard is")[0])
    else:
        notices.update(name for _, found in looked for name in found)
        suffixes = [f"{number}.{suffix}" for number, (suffix, _) in enumerate(looked)]
        if list(members) != ["json", *suffixes]:
            yield Problem(name, key, f"members {', '.join(members)}; expected {', '.join(['json', *suffixes])}")
        if key_for(sample.record["id"]) != key:
            yield Problem(
                name, key, f"its id is {sample.record['id']!r}, whose key is {key_for(sample.record['id'])!r}"
            )


def _name(folder: ShardFolder, shard: ShardInfo) -> str:
    return f"{folder.path.name}/{shard.name}"
