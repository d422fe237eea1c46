"""Ways in which a file may be wrong, by accident or by intent. All are drawn from a seeded generator."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CANARY = "VLSI_FUZZ_CANARY"
"""Environment variable: a file that hostile code would make, if it ran."""

HOSTILE_NAMES = (
    "../escaped.tar", "/tmp/vlsi_fuzz_escaped.tar", "a/../../escaped.tar", "..", ".", "", "000000.tar\0.json",
    "~/escaped.tar", "C:\\escaped.tar", "000000.tar/", "-rf.tar", "é" * 200 + ".tar", "x" * 5000, "$(touch x).tar",
)  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e308, float("inf"), float("nan"), "",
    "x" * 10_000, [], {}, [[]], {"a": {}}, "../../etc/passwd", [None], [1e400], {"__class__": "os.system"},
)  # fmt: skip


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        import os

        return os.system, (f'touch "${CANARY}"',)


def pickles() -> list[bytes]:
    """Pickles that run a command, plainly and as torch.save writes them."""
    import torch

    saved = io.BytesIO()
    torch.save({"weight": Evil()}, saved)
    return [pickle.dumps(Evil()), pickle.dumps(Evil(), 0), saved.getvalue()]


def damaged(content: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """What disks and copies do to any file."""
    size = max(1, len(content))
    yield "empty", b""
    for _ in range(3):
        yield "truncated", content[: draw.randrange(size)]
    for bits in (1, 1, 1, 1, 3, 16):
        flipped = bytearray(content)
        for _ in range(bits):
            flipped[draw.randrange(size)] ^= 1 << draw.randrange(8)
        yield f"{bits} bits flipped", bytes(flipped)
    start = draw.randrange(size)
    yield "zeroed from somewhere", content[:start] + bytes(size - start)
    yield "random", draw.randbytes(min(size, 4096))
    yield "twice", content * 2
    yield "a page swapped", content[512:1024] + content[:512] + content[1024:]


def hostile_json(values: Any, draw: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """A JSON document with one value replaced or taken away, and documents that are none."""
    for _ in range(count):
        copy = json.loads(json.dumps(values))
        where = _replace_somewhere(copy, draw)
        yield f"json: {where}", json.dumps(copy).encode()
    yield "json: deep", b"[" * 200_000
    yield "json: deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield "json: huge integer", b'{"version": ' + b"9" * 10_000 + b"}"
    yield "json: a key twice", b'{"format": "x", "format": 1, "version": 1}'
    yield "json: other encoding", json.dumps(values).encode("utf-16")
    yield "json: not a number", b'{"version": NaN, "shards": [Infinity]}'


def _replace_somewhere(node: Any, draw: random.Random) -> str:
    """Replace one value, at a random depth, by a hostile one or by nothing; returns where and by what."""
    path = []
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw.choice(list(keys))
        path.append(str(key))
        if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.7:
            node = node[key]
            continue
        if draw.random() < 0.2:
            del node[key]
            return f"{'.'.join(path)} taken away"
        text = isinstance(node[key], str) and draw.random() < 0.5
        node[key] = draw.choice(HOSTILE_NAMES) if text else draw.choice(HOSTILE_VALUES)
        return f"{'.'.join(path)} = {str(node[key])[:40]!r}"


def hostile_tars(key: str, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Tars whose members lead out, are no files, or claim more than there is."""
    for name in HOSTILE_NAMES:
        if name and "\0" not in name:
            yield f"tar: member {name[:30]!r}", _tar([_member(name, b"{}")])
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
        link = _member(f"{key}.json", b"")
        link[0].type, link[0].linkname = kind, "/etc/passwd"
        yield f"tar: member of type {kind!r}", _tar([link])
    for claimed in (2**20, 2**32, 2**33 - 1):
        tar = bytearray(_tar([_member(f"{key}.json", b"{}")]))
        tar[124:136] = b"%011o\0" % claimed
        yield f"tar: claims {claimed} bytes", _checksummed(tar)
    tar = bytearray(_tar([_member(f"{key}.json", b"{}")]))
    tar[124:136] = b"\x80" + b"\xff" * 11
    yield "tar: claims 2^88 bytes", _checksummed(tar)
    tar[124:136] = b"\xff" * 12
    yield "tar: claims -1 bytes", _checksummed(tar)
    pax = tarfile.TarInfo(f"{key}.json")
    pax.pax_headers = {"path": "../escaped", "size": "99999999999", "GNU.sparse.size": str(2**50)}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as writer:
        writer.addfile(pax, io.BytesIO(b""))
    yield "tar: pax headers", out.getvalue()
    yield "tar: ten thousand members", _tar([_member(f"{key}.{number}.png", b"") for number in range(10_000)])
    yield "tar: deep JSON", _tar([_member(f"{key}.json", b"[" * 200_000)])
    yield "tar: huge number", _tar([_member(f"{key}.json", b"9" * 100_000)])
    for hostile in pickles():
        yield "tar: a pickle as JSON", _tar([_member(f"{key}.json", hostile)])
        record = _member(f"{key}.json", b'{"messages": []}')
        yield "tar: a pickle as picture", _tar([record, _member(f"{key}.0.png", hostile)])


def _member(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member, content


def _tar(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as writer:
        for member, content in members:
            writer.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _checksummed(tar: bytearray) -> bytes:
    tar[148:156] = b" " * 8
    tar[148:156] = b"%06o\0 " % sum(tar[:512])
    return bytes(tar)


def hostile_yaml() -> Iterator[tuple[str, bytes]]:
    """Recipes that would run code, grow without end, or are none."""
    tag = "!!python/object/apply"
    yield "yaml: python object", f"run: {tag}:os.system ['touch \"${CANARY}\"']".encode()
    yield "yaml: python module", b"run: !!python/module:os"
    yield "yaml: python new", f"? {tag}:subprocess.check_output [['touch', 'x']]\n: 1".encode()
    bomb = "\n".join([f"a0: &a0 [{', '.join(['x'] * 10)}]"] + [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)])  # fmt: skip
    yield "yaml: aliases, 10^12 values", bomb.encode()
    yield "yaml: aliases as a section", (bomb + "\ndata: *a11\nteacher: *a11").encode()
    yield "yaml: itself", b"data: &a {train: *a}\nteacher: *a"
    yield "yaml: deep", b"run: " + b"[" * 5_000
    yield "yaml: deep blocks", "\n".join(" " * n + "a:" for n in range(2_000)).encode()
    yield "yaml: huge integer", b"seed: " + b"9" * 10_000
    yield "yaml: base 60", b"seed: " + b":".join([b"59"] * 3_000)
    yield "yaml: a control character", b"run: \x00\x01"
    yield "yaml: no text", b"\xff\xfe\x00"
    yield "yaml: a list", b"- 1\n- 2"
    yield "yaml: two documents", b"a: 1\n---\nb: 2"
    yield "yaml: a key that is a list", b"? [1, 2]\n: 3"
    yield "yaml: merge keys", b"x: &x {a: 1}\n<<: [*x, *x]\nrun: 5"
    yield "yaml: a date", b"run: 2020-01-01\nseed: 0x7fffffffffffffffffff"


def write(path: Path, content: bytes) -> None:
    """In place of what is there, also where that is a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
