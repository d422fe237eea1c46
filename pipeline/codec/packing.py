"""Numbers to bytes and back: compressed streams, and a record as one map of them under one checksum.

T response tokens, J teacher layers. There is no pickle anywhere: a stream is raw little-endian numbers, or what a codec
makes of them, in a zstd frame; a record's content is a msgpack map {stream name: frame}; a record is the msgpack pair
(CRC-32, content). The checksum covers all of the content, names and frames included, which zstd's own would not, and
it begins with the hash of what the cache is made of: a record of another cache does not open either.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
import torch
import zstandard
from torch import Tensor

from pipeline.errors import SampleError

TOKENS, SKIPPED = "tokens", "skipped"
LEVEL = 6
"""zstd's level: higher ones cost time and gain nothing on streams that are nearly noise."""

_DTYPES = {name: np.dtype(f"<{code}") for name, code in {"uint8": "u1", "uint16": "u2", "int32": "i4"}.items()}
_DTYPES |= {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
_DTYPES["bfloat16"] = np.dtype("<u2")  # numpy has none: the same bits as unsigned integers


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers on the CPU; bfloat16 as its bits in uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def raw_stream(array: np.ndarray, dtype: str) -> bytes:
    """Plain numbers of one of the known dtypes."""
    return array.astype(_DTYPES[dtype], copy=False).tobytes()


def raw_array(stream: bytes, dtype: str, *shape: int) -> np.ndarray:
    """A plain stream's numbers as an array. Raises ValueError where they do not fit the shape or dtype."""
    if dtype not in _DTYPES:
        raise ValueError(f"numbers of type {dtype}; expected one of {', '.join(_DTYPES)}")
    return np.frombuffer(bytearray(stream), _DTYPES[dtype]).reshape(*shape)  # writable, as torch wants it


def raw_arrays(streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
    """Plain streams {"NAME.DTYPE": bytes} to arrays {NAME: [T, J, n]}. Raises ValueError where they do not fit."""
    split = {name.partition(".")[0]: (name.partition(".")[2], stream) for name, stream in streams.items()}
    return {name: raw_array(stream, dtype, tokens, layers, -1) for name, (dtype, stream) in split.items()}


def narrowest(largest: int) -> str:
    """The smallest integer type that holds 0..largest."""
    return "uint8" if largest < 2**8 else "uint16" if largest < 2**16 else "int32"


def pack_record(tokens: np.ndarray, streams: Mapping[str, bytes], made_for: str = "") -> bytes:
    """Response token ids [T] and a codec's streams to the bytes of one record.

    made_for: what the cache is made of (CacheIdentity.made_for); the record opens for nothing else.
    """
    dtype = narrowest(int(tokens.max(initial=0)))
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    plain = {f"{TOKENS}.{dtype}": raw_stream(tokens, dtype), **streams}
    return _seal({name: compressor.compress(stream) for name, stream in plain.items()}, made_for)


def pack_skipped(reason: str, made_for: str = "") -> bytes:
    """A record of no token: the sample could not be used."""
    return _seal({SKIPPED: reason}, made_for)


def unpack_record(data: bytes, made_for: str = "") -> tuple[np.ndarray, dict[str, bytes]]:
    """A record's response token ids [T] int32 and its codec's streams.

    Raises SampleError where it was skipped, ValueError where a byte of it is not what was written for this cache.
    """
    record = _open(data, made_for)
    if SKIPPED in record:
        raise SampleError(f"skipped when the teacher cache was made: {record[SKIPPED]}")
    decompressor = zstandard.ZstdDecompressor()
    streams = {name: decompressor.decompress(frame) for name, frame in record.items()}
    name = next(name for name in streams if name.startswith(f"{TOKENS}."))
    tokens = raw_array(streams.pop(name), name.partition(".")[2], -1).astype(np.int32)
    return tokens, streams


def join_arrays(arrays: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Records' arrays [T, J, n] one after the other; where n differs, the shorter are padded with zeros."""
    joined = {}
    for name, first in arrays[0].items():
        parts = [one[name] for one in arrays]
        shape = (sum(map(len, parts)), first.shape[1], max(part.shape[2] for part in parts))
        whole = np.zeros(shape, np.result_type(*parts))  # of each record the narrowest type may be another
        start = 0
        for part in parts:
            whole[start : start + len(part), :, : part.shape[2]] = part
            start += len(part)
        joined[name] = whole
    return joined


def _seal(content: Mapping[str, bytes | str], made_for: str) -> bytes:
    packed = msgpack.packb(content)
    return msgpack.packb((_checksum(packed, made_for), packed))


def _open(data: bytes, made_for: str) -> dict[str, Any]:
    try:
        expected, packed = msgpack.unpackb(data)
        found = _checksum(packed, made_for)
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        raise ValueError(f"it does not unpack: {error!r}") from None
    if found != expected:
        raise ValueError(f"expected checksum {expected}, found {found}: changed, or of another cache")
    return msgpack.unpackb(packed)


def _checksum(packed: bytes, made_for: str) -> int:
    return zlib.crc32(packed, zlib.crc32(made_for.encode()))
