"""One record: a draft becomes the members that a shard would hold, or the reason why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_prep.images import check_image
from data_prep.schema import SPLITS, BadSample, about, key_for, type_name, validate_record
from data_prep.sources import Draft, Sample


@dataclass(frozen=True)
class Place:
    """Where a record stands in the input."""

    index: int
    """Its number in the source, from 0."""
    file: str
    line: int | None

    def __str__(self) -> str:
        return f"{self.file or 'record'}:{self.line if self.line is not None else self.index}"


@dataclass(frozen=True)
class Good:
    """A record that can be written: what the plan needs to know of it, and no more."""

    place: Place
    id: str
    split: str | None
    """The source's own split, if it has one."""
    pictures: tuple[bytes, ...]
    """A digest of each image's bytes; of the chat's text where there are no images."""
    digest: bytes
    """Of all the members' bytes."""

    @property
    def key(self) -> str:
        """The sample's key in the shard."""
        return key_for(self.id)


@dataclass(frozen=True)
class Reject:
    """A record that is left out, as rejects.jsonl has it."""

    place: Place
    id: str | None
    reason: str
    detail: str

    def to_json(self) -> str:
        """One line of rejects.jsonl."""
        where = {"file": self.place.file, "line": self.place.line, "index": self.place.index}
        fields = {**where, "id": self.id, "reason": self.reason, "detail": self.detail}
        # ASCII: id and detail may hold what is not UTF-8
        return json.dumps({name: value for name, value in fields.items() if value not in (None, "")})


def examine(place: Place, draft: Draft, source: str) -> Good | Reject:
    """Read a record, decode its images to the last pixel, and judge it."""
    try:
        sample_id, split, members = build(place, draft, source, check_image)
    except BadSample as bad:
        return Reject(place, None if bad.id is None else str(bad.id)[:200], bad.reason, bad.detail[:500])
    pictures = [_digest(content) for name, content in members.items() if name != "json"]
    if not pictures:
        pictures = [_digest(json.dumps(json.loads(members["json"])["messages"]).encode())]
    return Good(place, sample_id, split, tuple(pictures), digest_of(members))


def build(
    place: Place, draft: Draft, source: str, look: Callable[[bytes], str]
) -> tuple[str, str | None, dict[str, bytes]]:
    """Make a record's id, own split and members; look(image bytes) gives the suffix. Raises BadSample."""
    sample = draft.make()
    with about(sample.id):
        if sample.split not in (None, *SPLITS):
            raise BadSample("wrong_type", f"split is {sample.split!r}; expected one of {', '.join(SPLITS)}")
        sample_id = _id(sample.id, place)
        record = _record(sample_id, sample, place, source)
        validate_record(record, sample.images)
        try:
            members = {"json": json.dumps(record, ensure_ascii=False).encode()}
        except UnicodeEncodeError as error:
            raise BadSample("bad_utf8", f"the record holds {error.object[error.start : error.end]!r}") from None
        for number, content in enumerate(sample.images):
            members[f"{number}.{look(content)}"] = content
        return sample_id, sample.split, members


def digest_of(members: dict[str, bytes]) -> bytes:
    """16 bytes that change when a member's name or content does."""
    return _digest(b"".join(name.encode() + b"=" + _digest(content) for name, content in members.items()))


def _record(sample_id: str, sample: Sample, place: Place, source: str) -> dict[str, Any]:
    record: dict[str, Any] = {"id": sample_id, "messages": sample.messages}
    if sample.question_type is not None:
        record["question_type"] = sample.question_type
    where = {"source": source, "file": place.file, "line": place.line, "index": place.index}
    known = {name: value for name, value in where.items() if value not in (None, "")}
    return {**record, "provenance": {**known, **sample.provenance}}


def _id(given: Any, place: Place) -> str:
    if given is None or given == "":
        return f"{place.index:08d}"
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise BadSample("wrong_type", f"id is {type_name(given)}; expected a string or a whole number")
    return str(given)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]
