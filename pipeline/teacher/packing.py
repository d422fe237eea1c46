"""Numbers to bytes and back: compressed streams with checksums, and a record as one map of them.

T response tokens, J teacher layers. There is no pickle anywhere: a stream is raw little-endian numbers, or what a codec
makes of them, in a zstd frame that carries a checksum; a record is a msgpack map {stream name: frame}.
"""

from __future__ import annotations

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
    return np.frombuffer(stream, _DTYPES[dtype]).reshape(*shape)


def raw_arrays(streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
    """Plain streams {"NAME.DTYPE": bytes} to arrays {NAME: [T, J, n]}. Raises ValueError where they do not fit."""
    split = {name.partition(".")[0]: (name.partition(".")[2], stream) for name, stream in streams.items()}
    return {name: raw_array(stream, dtype, tokens, layers, -1) for name, (dtype, stream) in split.items()}


def narrowest(largest: int) -> str:
    """The smallest integer type that holds 0..largest."""
    return "uint8" if largest < 2**8 else "uint16" if largest < 2**16 else "int32"


def pack_record(tokens: np.ndarray, streams: Mapping[str, bytes]) -> bytes:
    """Response token ids [T] and a codec's streams to the bytes of one record."""
    dtype = narrowest(int(tokens.max(initial=0)))
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    framed = {f"{TOKENS}.{dtype}": raw_stream(tokens, dtype), **streams}
    return msgpack.packb({name: compressor.compress(stream) for name, stream in framed.items()})


def pack_skipped(reason: str) -> bytes:
    """A record of no token: the sample could not be used."""
    return msgpack.packb({SKIPPED: reason})


def unpack_record(data: bytes) -> tuple[np.ndarray, dict[str, bytes]]:
    """A record's response token ids [T] int32 and its codec's streams.

    Raises SampleError where it was skipped, ValueError where a byte of it is not what was written.
    """
    try:
        record: dict[str, Any] = msgpack.unpackb(data)
        if SKIPPED in record:
            raise SampleError(f"skipped when the teacher cache was made: {record[SKIPPED]}")
        decompressor = zstandard.ZstdDecompressor()
        streams = {name: decompressor.decompress(framed) for name, framed in record.items()}
    except (msgpack.UnpackException, zstandard.ZstdError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"it does not unpack: {error!r}") from None
    name = next((name for name in streams if name.startswith(f"{TOKENS}.")), None)
    if name is None:
        raise ValueError(f"it has no {TOKENS}, only {', '.join(map(str, streams))}")
    tokens = raw_array(streams.pop(name), name.partition(".")[2], -1).astype(np.int32)
    return tokens, streams


def join_arrays(arrays: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Records' arrays [T, J, n] one after the other; where n differs, the shorter are padded with zeros."""
    joined = {}
    for name, first in arrays[0].items():
        parts = [one[name] for one in arrays]
        width = max(part.shape[2] for part in parts)
        whole = np.zeros((sum(map(len, parts)), first.shape[1], width), first.dtype)
        start = 0
        for part in parts:
            whole[start : start + len(part), :, : part.shape[2]] = part
            start += len(part)
        joined[name] = whole
    return joined
