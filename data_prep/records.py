"""One record of a source becomes the members that a shard holds, or a reject with its reason."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from data_prep.images import check_image, convert_image, image_suffix
from data_prep.schema import SPLITS, BadSample, key_for, tag_with_id, type_name, validate_record
from data_prep.sources import LazyRecord, Sample


@dataclass(frozen=True)
class Location:
    """Where a record stands in the input."""

    index: int
    """Its number in the source, from 0."""
    file: str
    line: int | None

    def __str__(self) -> str:
        return f"{self.file or 'record'}:{self.line if self.line is not None else self.index}"


@dataclass(frozen=True)
class Accepted:
    """A record that can be written. Holds only what the plan needs, since every rank keeps all of them."""

    location: Location
    id: str
    """The sample's id. Differs from the record's where that is repeated: see `plan.make_plan`."""
    split: str | None
    """The source's own split, if it has one."""
    pictures: tuple[bytes, ...]
    """A digest of each image's bytes; of the chat's text where there are no images."""
    digest: bytes
    """Of all the members' bytes, with the record's id."""
    notices: tuple[str, ...] = ()
    """Of each image, the keys of images.NOTICES that apply."""
    repeats: str | None = None
    """The record's id, where an earlier record has it too."""

    @property
    def key(self) -> str:
        """The sample's key in the shard."""
        return key_for(self.id)


@dataclass(frozen=True)
class Rejected:
    """A record that is left out, as rejects.jsonl has it."""

    location: Location
    id: str | None
    reason: str
    detail: str

    def to_json(self) -> str:
        """One line of rejects.jsonl."""
        where = {"file": self.location.file, "line": self.location.line, "index": self.location.index}
        fields = {**where, "id": self.id, "reason": self.reason, "detail": self.detail}
        # ASCII: id and detail may hold what is not UTF-8
        return json.dumps({name: value for name, value in fields.items() if value not in (None, "")})


@dataclass(frozen=True)
class Converted:
    """A record in the form in which a shard holds it."""

    id: str
    split: str | None
    members: dict[str, bytes]
    images: list[bytes]
    """The image files as they came."""
    notices: tuple[str, ...]
    """Of each image, the keys of images.NOTICES that apply; empty where images were not decoded."""


def check_record(location: Location, record: LazyRecord, source: str, background: str | None) -> Accepted | Rejected:
    """Read and convert a record, and decode its images to the last pixel. background: as in convert_record."""
    try:
        converted = convert_record(location, record, source, background)
    except BadSample as bad:
        return Rejected(location, None if bad.id is None else str(bad.id)[:200], bad.reason, bad.detail[:500])
    pictures = [_digest(content) for content in converted.images]
    if not pictures:
        pictures = [_digest(json.dumps(json.loads(converted.members["json"])["messages"]).encode())]
    digest = digest_of(converted.members)
    return Accepted(location, converted.id, converted.split, tuple(pictures), digest, converted.notices)


def convert_record(
    location: Location, record: LazyRecord, source: str, background: str | None, decode: bool = True
) -> Converted:
    """Make a record's id, its own split and its members. Raises BadSample.

    background: a colour, with which images go through images.convert_image; None: they stay as they came.
    decode: whether to decode each image to its last pixel.
    """
    try:
        sample = record.load()
    except RecursionError:
        raise BadSample("bad_json", "lists and objects are nested too deeply") from None
    with tag_with_id(sample.id):
        if sample.split not in (None, *SPLITS):
            raise BadSample("wrong_type", f"split is {sample.split!r}; expected one of {', '.join(SPLITS)}")
        sample_id = _id(sample.id, location)
        content = _sample_json(sample_id, sample, location, source)
        validate_record(content, sample.images)
        members = {"json": to_json(content)}
        notices: tuple[str, ...] = ()
        for number, image in enumerate(sample.images):
            if decode:
                notices += check_image(image)[1]
            stored = image if background is None else convert_image(image, background)
            members[f"{number}.{image_suffix(stored)}"] = stored
        return Converted(sample_id, sample.split, members, sample.images, notices)


def to_json(content: dict[str, Any]) -> bytes:
    """A sample's JSON as its shard holds it. Raises BadSample (bad_utf8)."""
    try:
        return json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadSample("bad_utf8", f"the record holds {error.object[error.start : error.end]!r}") from None


def with_id(members: dict[str, bytes], accepted: Accepted) -> dict[str, bytes]:
    """The members with the id that was given to a record whose own is repeated."""
    if accepted.repeats is None:
        return members
    content = json.loads(members["json"])
    provenance = {**content["provenance"], "repeated_id": accepted.repeats}
    return {**members, "json": to_json({**content, "id": accepted.id, "provenance": provenance})}


def digest_of(members: dict[str, bytes]) -> bytes:
    """16 bytes that change when a member's name or content does."""
    return _digest(b"".join(name.encode() + b"=" + _digest(content) for name, content in members.items()))


def _sample_json(sample_id: str, sample: Sample, location: Location, source: str) -> dict[str, Any]:
    content: dict[str, Any] = {"id": sample_id, "messages": sample.messages}
    if sample.question_type is not None:
        content["question_type"] = sample.question_type
    where = {"source": source, "file": location.file, "line": location.line, "index": location.index}
    known = {name: value for name, value in where.items() if value not in (None, "")}
    return {**content, "provenance": {**known, **sample.provenance}}


def _id(given: Any, location: Location) -> str:
    if given is None or given == "":
        return f"{location.index:08d}"
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise BadSample("wrong_type", f"id is {type_name(given)}; expected a string or a whole number")
    return str(given)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]
