"""Tar shards: written atomically, the same bytes for the same samples, read in any order.

A *shard folder* holds 000000.tar, 000001.tar, ... and manifest.json. Data shards and the teacher cache share this form;
the manifest's "format" says which it is. The files are plain POSIX tar, so that WebDataset reads them too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.atomic import atomic_file, naming, write_file
from data_prep.open_files import OpenFiles
from data_prep.schema import SCHEMA_VERSION, ChangedSample, DataError, parse_json, type_name
from data_prep.sizes import SampleSize, is_size, sample_size
from data_prep.storage import RemoteFiles, is_file, is_url, location, read_bytes
from data_prep.sums import is_sum, sample_sum, sample_sums

MANIFEST = "manifest.json"
FORMAT = "vlsi-shards"

_SHARD = re.compile(r"[A-Za-z0-9_-]+\.tar")
_MEMBER = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")

UNSIGNED = "manifest-sha256:" + "0" * 64
"""In place of a manifest's checksum while it is taken."""
_SIGNED = re.compile(rb"manifest-sha256:[0-9a-f]{64}")

SHARD_FIELDS = {"name": str, "samples": int, "bytes": int, "sha256": str, "keys": list, "offsets": list, "end": int}

_Places = tuple[list[str], list[int], int]  # keys, offsets, end
ShardEntry = dict[str, Any]
"""A shard in manifest.json: name, samples, bytes, sha256, keys, offsets (of each sample's first header), end.

Of chats also sizes, SampleSize.to_json of each sample, and sums, its checksum. Older manifests may have neither.
"""


@dataclass(frozen=True)
class ShardInfo:
    """One shard of a folder."""

    name: str
    samples: int
    bytes: int
    sha256: str
    first: int
    """Index, in the folder, of the shard's first sample."""


@dataclass(frozen=True)
class RawSample:
    """A sample as the shard holds it."""

    key: str
    record: dict[str, Any]
    """The JSON: see data_prep.schema."""
    images: list[bytes]
    """Image files, undecoded, in the order of the chat's image parts."""


def shard_name(number: int) -> str:
    """000007.tar"""
    return f"{number:06d}.tar"


class ShardWriter:
    """Writes one shard. Used as a context, it leaves no file behind unless `commit` was called.

    with ShardWriter(path) as writer:
        writer.add("key", {"json": b"...", "0.png": b"..."})
        entry = writer.commit()
    """

    def __init__(self, path: Path):
        self.path = path
        self._offsets: dict[str, int] = {}
        self._sizes: list[SampleSize | None] = []
        self._atomic = atomic_file(path)
        # Not webdataset.TarWriter: it sorts members (image before json, 10 before 2), sets a mode and format of its
        # own and does not say where a sample starts. USTAR has room for nothing but what is set here: no times, no
        # owners.
        self._tar = tarfile.open(fileobj=self._atomic.file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._atomic.discard()

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append a sample, its members in the given order.

        Raises ValueError for a name that is not safe in a tar, or a key that is there already.
        """
        if key in self._offsets:
            raise ValueError(f"key {key!r} comes twice in one shard")
        headers = [_header(f"{key}.{suffix}", len(content)) for suffix, content in members.items()]
        self._offsets[key] = self._tar.offset
        self._sizes.append(sample_size(members))
        with naming(self.path):
            for header, content in zip(headers, members.values(), strict=True):
                self._tar.addfile(header, io.BytesIO(content))

    def commit(self) -> ShardEntry:
        """Finish the tar, bring it to the disk and give it its name; returns the manifest entry."""
        end, file = self._tar.offset, self._atomic.file
        with naming(self.path):
            self._tar.close()
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = _sha256(file)
            sums = sample_sums(file, list(self._offsets.values()), end)
            self._atomic.commit()
        places = list(self._offsets), list(self._offsets.values()), end
        return _entry(self.path.name, size, digest, places, self._sizes, sums)


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> ShardEntry:
    """Write (key, {"json": bytes, "0.png": bytes, ...}) samples as one shard; returns its manifest entry.

    Raises ValueError as ShardWriter.add does. On any error, also of `samples` itself, nothing stands under the name.
    """
    with ShardWriter(path) as writer:
        for key, members in samples:
            writer.add(key, members)
        return writer.commit()


def describe_shard(path: Path) -> ShardEntry:
    """Make the manifest entry of a shard on disk, by reading it. Raises DataError where it is no whole tar."""
    keys: list[str] = []
    offsets: list[int] = []
    sizes: list[SampleSize | None] = []
    end = 0
    try:
        with path.open("rb") as file:
            digest, size = _sha256(file), file.tell()
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for key, group in groupby(tar, lambda member: member.name.partition(".")[0]):
                    members = list(group)
                    keys.append(key)
                    offsets.append(members[0].offset)
                    end = members[-1].offset_data + _padded(members[-1].size)
                    sizes.append(sample_size({_suffix(member): _content(tar, member) for member in members}))
            sums = sample_sums(file, offsets, end) if end <= size else []
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # the last two: a size that no file has
        raise DataError(f"{path} is not a whole tar file: {error}") from None
    if end > size or size % tarfile.RECORDSIZE:
        raise DataError(f"{path} is cut off: {size} bytes")
    return _entry(path.name, size, digest, (keys, offsets, end), sizes, sums)


def write_manifest(folder: Path, shards: list[ShardEntry], **fields: Any) -> dict[str, Any]:
    """Write folder/manifest.json, whole or not at all, one line a shard; `fields` stand first; returns the manifest.

    Its "checksum" is the SHA-256 of the file with zeros in the checksum's place.
    """
    manifest = {
        **fields,
        "samples": sum(shard["samples"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "checksum": UNSIGNED,
    }
    head = json.dumps(manifest, indent=1, ensure_ascii=False)[:-2]
    lines = ",\n".join("  " + json.dumps(shard, ensure_ascii=False) for shard in shards)
    content = f'{head},\n "shards": [\n{lines}\n ]\n}}\n'.encode()
    checksum = _checksum(content)
    write_file(folder / MANIFEST, content.replace(UNSIGNED.encode(), checksum.encode(), 1))
    return {**manifest, "checksum": checksum, "shards": shards}


def read_manifest(folder: Path, format: str = FORMAT, newest: int = SCHEMA_VERSION) -> dict[str, Any]:
    """Read and check folder/manifest.json. Raises DataError: none there, damaged, of another format or newer.

    newest: the last version of the format that the caller reads.
    """
    path = folder / MANIFEST
    try:
        content = read_bytes(path)
        manifest = parse_json(content)
        _require(manifest, {"format": str, "version": int}, "the manifest")
        found, version = manifest["format"], manifest["version"]
        if found == format and version <= newest:
            _check_manifest(manifest, content)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_no_manifest(folder, format)) from None
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; remove it and run again what made the folder") from None
    if found != format:
        raise DataError(f"{path} has format {found!r}; expected {format!r}: this is another kind of shard folder")
    if version > newest:
        raise DataError(f"{path} has version {version}; this program reads up to {newest}: update it")
    return manifest


def _check_manifest(manifest: dict[str, Any], content: bytes) -> None:
    """Raise ValueError where the file's bytes are not what its checksum says, or something is missing or impossible.

    Manifests of older versions have no checksum.
    """
    has_one = "checksum" in manifest or UNSIGNED.partition(":")[0].encode() in content  # a flip hits one of the two
    if has_one and manifest.get("checksum") != _checksum(content):
        raise ValueError("its content does not match its checksum")
    _require(manifest, {"samples": int, "bytes": int, "shards": list}, "the manifest")
    for number, shard in enumerate(manifest["shards"]):
        _require(shard, SHARD_FIELDS, f"shard {number}")
        if not _SHARD.fullmatch(shard["name"]):  # who mirrors a folder writes files of these names
            raise ValueError(f"shard {number}: {shard['name']!r} is not the name of a shard, such as 000000.tar")
        if not len(shard["keys"]) == len(shard["offsets"]) == shard["samples"]:
            raise ValueError(f"shard {number}: keys and offsets do not match its samples")
        places = [*shard["offsets"], shard["end"]]
        if not all(isinstance(key, str) for key in shard["keys"]) or not all(isinstance(at, int) for at in places):
            raise ValueError(f"shard {number}: a key is no text, or an offset no number")
        if places != sorted(places) or places[0] < 0:
            raise ValueError(f"shard {number}: the offsets do not rise")
        sizes = shard.get("sizes")
        if sizes is not None and not (_counts(sizes, shard["samples"]) and all(map(is_size, sizes))):
            raise ValueError(f"shard {number}: sizes are not those of its samples")
        sums = shard.get("sums")
        if sums is not None and not (_counts(sums, shard["samples"]) and all(map(is_sum, sums))):
            raise ValueError(f"shard {number}: sums are not those of its samples")
    names = [shard["name"] for shard in manifest["shards"]]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands there twice")


def _counts(found: Any, samples: int) -> bool:
    return isinstance(found, list) and len(found) == samples


def _require(found: Any, fields: dict[str, type], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {type_name(found)}; expected an object")
    for name, kind in fields.items():
        if name not in found:
            raise ValueError(f"{where} has no {name!r}")
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise ValueError(f"{where} has {name!r} {type_name(found[name])}; expected a {kind.__name__}")


def _checksum(content: bytes) -> str:
    """Of a manifest's bytes, whatever the checksum in them is."""
    unsigned = _SIGNED.sub(UNSIGNED.encode(), content, count=1)
    return f"{UNSIGNED.partition(':')[0]}:{hashlib.sha256(unsigned).hexdigest()}"


def data_fingerprint(manifest: dict[str, Any]) -> str:
    """The fingerprint of a shard folder: its shards' names and hashes, in order."""
    lines = "".join(f"{shard['name']} {shard['sha256']}\n" for shard in manifest["shards"])
    return hashlib.sha256(lines.encode()).hexdigest()


class ShardFolder:
    """A shard folder, on a disk or behind a URL, read by sample index, from any number of processes.

    Picklable: files are opened when they are needed.

    Raises DataError where there is no manifest, or it is of another format, or a shard is damaged or gone.
    """

    def __init__(self, path: str | Path, format: str = FORMAT, newest: int = SCHEMA_VERSION):
        self.path = location(path)
        self.manifest = read_manifest(self.path, format, newest)
        self.shards: list[ShardInfo] = []
        self.keys: list[str] = []
        for entry in self.manifest["shards"]:
            size = {name: entry[name] for name in ("name", "samples", "bytes", "sha256")}
            self.shards.append(ShardInfo(**size, first=len(self.keys)))
            self.keys += entry["keys"]
        self.has_sizes: bool = all("sizes" in entry for entry in self.manifest["shards"])
        """Whether the manifest has the size of every sample."""
        self._firsts = [shard.first for shard in self.shards]
        self._files = RemoteFiles(self.path) if is_url(self.path) else OpenFiles(self.path)

    def __len__(self) -> int:
        return len(self.keys)

    def size(self, index: int) -> SampleSize:
        """A sample's size, where the manifest has it. Raises KeyError where it does not."""
        entry, place, _ = self._find(index)
        return SampleSize.from_json(entry["sizes"][place])

    def nbytes(self, index: int) -> int:
        """Bytes that a sample takes in its shard."""
        _, _, (start, stop) = self._find(index)
        return stop - start

    def _find(self, index: int) -> tuple[ShardEntry, int, tuple[int, int]]:
        """The shard's manifest entry, the sample's number in it, and its bytes there: (first, end)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.path}")
        shard = bisect_right(self._firsts, index) - 1
        entry, place = self.manifest["shards"][shard], index - self._firsts[shard]
        offsets = entry["offsets"]
        return entry, place, (offsets[place], offsets[place + 1] if place + 1 < len(offsets) else entry["end"])

    def read(self, index: int) -> RawSample:
        """Read a sample; index counts through the shards, from 0. Raises IndexError, DataError."""
        members = self.read_members(index)
        try:
            record = parse_json(members.pop("json"))
            numbered = sorted(members, key=lambda name: int(name.partition(".")[0]))
        except (KeyError, ValueError) as error:
            raise self._damaged(index, f"not a json and numbered images: {error!r}") from None
        return RawSample(self.keys[index], record, [members[name] for name in numbered])

    def read_members(self, index: int) -> dict[str, bytes]:
        """Read a sample's members, {"json": b"...", "0.png": b"..."}, in their order. Raises IndexError, DataError."""
        entry, place, (start, stop) = self._find(index)
        try:
            content = self._files.read(entry["name"], start, stop - start)
            if "sums" in entry and sample_sum(content) != entry["sums"][place]:
                raise self._damaged(index, "its bytes do not match their checksum", ChangedSample)
            members = dict(_members(content, self.keys[index]))
        except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
            raise self._damaged(index, str(error)) from None
        return members

    def _damaged(self, index: int, why: str, kind: type[DataError] = DataError) -> DataError:
        shard = self.shards[bisect_right(self._firsts, index) - 1]
        # Whoever reads another kind of folder knows what makes it again; lint reads data shards alone.
        advice = f": python -m data_prep lint {self.path} lists what is bad; then remove it and make it again"
        return kind(
            f"{self.path / shard.name}: cannot read sample {self.keys[index]!r}: {why}. The shard is not what the "
            f"manifest says{advice if self.manifest['format'] == FORMAT else ''}"
        )


def _members(content: bytes, key: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            if member.name.partition(".")[0] != key or not member.isreg():
                raise ValueError(f"found {member.name!r} in its place")
            yield _suffix(member), _content(tar, member)


def _header(name: str, size: int) -> tarfile.TarInfo:
    if len(name) > 100 or not _MEMBER.fullmatch(name):
        raise ValueError(f"{name!r} is not safe as a member of a shard: letters, digits, - and _, at most 100")
    header = tarfile.TarInfo(name)  # mtime, uid and gid are 0, names of owner and group empty
    header.size, header.mode = size, 0o644
    return header


def _entry(
    name: str, size: int, digest: str, places: _Places, sizes: list[SampleSize | None], sums: list[int]
) -> ShardEntry:
    keys, offsets, end = places
    entry = {"name": name, "samples": len(keys), "bytes": size, "sha256": digest}
    entry |= {"keys": keys, "offsets": offsets, "end": end}
    known = [each.to_json() for each in sizes if each is not None]
    # A teacher cache's records have no sizes, and checksums of their own.
    return {**entry, "sizes": known, "sums": sums} if len(known) == len(keys) else entry


def _suffix(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[2]


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member) if member.isreg() else None  # a link may point anywhere
    return file.read() if file else b""


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _no_manifest(folder: Path, format: str) -> str:
    inside = [name for name in ("train", "held_out") if is_file(folder / name / MANIFEST)]
    if inside:
        hint = "did you mean " + " or ".join(str(folder / name) for name in inside) + "?"
    elif format == FORMAT:
        hint = f"make it with: python -m data_prep shard --source NAME ... --output {folder.parent}"
    else:
        hint = "what makes this folder has not ended yet"
    return f"no {folder / MANIFEST}; expected a shard folder ({format}); {hint}"
