"""Records: named streams of numbers, compressed, in one msgpack map with one checksum.

T response tokens, J teacher layers. Nothing is pickled:

- A stream is raw little-endian numbers, or a codec's own encoding of them. It is compressed into a zstd frame.
- The content of a record is a msgpack map {stream name: frame}.
- A record is the msgpack pair (CRC-32, content).

The checksum covers the whole content, names and frames included; zstd's own checksum would not. It starts from the
hash of the cache's identity, so a record of another cache fails the check too.
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

TOKENS, SKIPPED, PLACES = "tokens", "skipped", "places"
MOST_TOKENS = 2**20
"""Response tokens of a record. No more are unpacked, whatever a damaged or hostile record claims."""
LEVEL = 6
"""zstd compression level. Higher levels cost time and gain nothing, because the streams are nearly random."""

_DTYPES = {name: np.dtype(f"<{code}") for name, code in {"uint8": "u1", "uint16": "u2", "int32": "i4"}.items()}
_DTYPES |= {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
_DTYPES["bfloat16"] = np.dtype("<u2")  # numpy has no bfloat16: store its bits as unsigned integers


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as a CPU array. bfloat16 becomes its bits in uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_device(array: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """A CPU array as a tensor on a device. The copy does not wait for a GPU: its source is page-locked."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def raw_stream(array: np.ndarray, dtype: str) -> bytes:
    """An array -> raw little-endian numbers of one of the known dtypes."""
    return array.astype(_DTYPES[dtype], copy=False).tobytes()


def raw_array(stream: bytes, dtype: str, *shape: int) -> np.ndarray:
    """A raw stream -> an array. Raises ValueError for an unknown dtype or a size that does not fit the shape."""
    if dtype not in _DTYPES:
        raise ValueError(f"numbers of type {dtype}; expected one of {', '.join(_DTYPES)}")
    return np.frombuffer(bytearray(stream), _DTYPES[dtype]).reshape(*shape)  # bytearray: torch wants writable memory


def raw_arrays(streams: Mapping[str, bytes], tokens: int, layers: int) -> dict[str, np.ndarray]:
    """Raw streams {"NAME.DTYPE": bytes} -> arrays {NAME: [T, J, n]}. Raises ValueError where the sizes do not fit."""
    split = {name.partition(".")[0]: (name.partition(".")[2], stream) for name, stream in streams.items()}
    return {name: raw_array(stream, dtype, tokens, layers, -1) for name, (dtype, stream) in split.items()}


def narrowest(largest: int) -> str:
    """The smallest integer dtype that holds 0..largest."""
    return "uint8" if largest < 2**8 else "uint16" if largest < 2**16 else "int32"


def pack_record(
    tokens: np.ndarray, streams: Mapping[str, bytes], made_for: str = "", places: np.ndarray | None = None
) -> bytes:
    """Response token ids [T] and a codec's streams -> the bytes of one record.

    places: [T + 1], where not all of a sample's response tokens have distributions: the numbers of those that do, from
    0, and the number of all. made_for: the hash of the cache's identity (CacheIdentity.made_for). `unpack_record` must
    get the same one.
    """
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    raw = {**_integers(TOKENS, tokens), **({} if places is None else _integers(PLACES, places)), **streams}
    return _with_checksum({name: compressor.compress(stream) for name, stream in raw.items()}, made_for)


def pack_skipped(reason: str, made_for: str = "") -> bytes:
    """The bytes of a record for a sample that could not be used: the reason, and no tokens."""
    return _with_checksum({SKIPPED: reason}, made_for)


def unpack_record(data: bytes, token_bytes: int, made_for: str = "") -> tuple[np.ndarray, dict[str, bytes]]:
    """The bytes of one record -> its response token ids [T] int32 and its codec's streams.

    token_bytes: the most bytes that one token's distributions can take (Codec.token_bytes). A record that claims more
    is refused before it is decompressed.

    Raises SampleError where the sample was skipped. Raises ValueError where any byte changed, where the record belongs
    to another cache, or where it would be larger than its tokens can be.
    """
    record = _verified_content(data, made_for)
    if SKIPPED in record:
        raise SampleError(f"skipped when the teacher cache was made: {record[SKIPPED]}")
    tokens = _take_integers(record, TOKENS)
    if tokens is None:
        raise ValueError("it has no tokens")
    _take_integers(record, PLACES)
    return tokens, _decompress(record, token_bytes * len(tokens))


def unpack_places(data: bytes, made_for: str = "") -> np.ndarray:
    """The places [T + 1] int32 of a record that has them. Raises ValueError as `unpack_record`, and where it has none.

    They are increasing: T numbers of tokens and, above them, how many there are.
    """
    places = _take_integers(_verified_content(data, made_for), PLACES)
    if places is None or not len(places) or (np.diff(places) <= 0).any() or places[0] < 0:
        raise ValueError("it does not say which response tokens it is for")
    return places


def _integers(name: str, values: np.ndarray) -> dict[str, bytes]:
    dtype = narrowest(int(values.max(initial=0)))
    return {f"{name}.{dtype}": raw_stream(values, dtype)}


def _take_integers(record: dict[str, Any], name: str) -> np.ndarray | None:
    """Remove the integers of a name from a record: [n] int32, or None where it has none."""
    whole = next((key for key in record if key.startswith(f"{name}.")), None)
    if whole is None:
        return None
    stream = _decompress({whole: record.pop(whole)}, 4 * MOST_TOKENS)[whole]
    return raw_array(stream, whole.partition(".")[2], -1).astype(np.int32)


def _decompress(frames: Mapping[str, bytes], most: int) -> dict[str, bytes]:
    """{name: frame} -> {name: stream}. Raises ValueError where the streams together are larger than `most` bytes."""
    try:
        claimed = sum(zstandard.get_frame_parameters(frame).content_size for frame in frames.values())
        if claimed > most:  # an unknown size claims 2^64 - 1
            raise ValueError(f"its streams claim {claimed:,} bytes; expected at most {most:,}")
        decompressor = zstandard.ZstdDecompressor()
        return {name: decompressor.decompress(frame) for name, frame in frames.items()}
    except (zstandard.ZstdError, TypeError) as error:
        raise ValueError(f"it does not decompress: {error}") from None


def join_arrays(arrays: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate records' arrays [T, J, n] over T. Where n differs, the shorter ones are padded with zeros."""
    joined = {}
    for name, first in arrays[0].items():
        parts = [one[name] for one in arrays]
        shape = (sum(map(len, parts)), first.shape[1], max(part.shape[2] for part in parts))
        whole = np.zeros(shape, np.result_type(*parts))  # dtypes may differ: each record has its narrowest
        start = 0
        for part in parts:
            whole[start : start + len(part), :, : part.shape[2]] = part
            start += len(part)
        joined[name] = whole
    return joined


def _with_checksum(content: Mapping[str, bytes | str], made_for: str) -> bytes:
    packed = msgpack.packb(content)
    return msgpack.packb((_checksum(packed, made_for), packed))


def _verified_content(data: bytes, made_for: str) -> dict[str, Any]:
    try:
        expected, packed = msgpack.unpackb(data)
        found = _checksum(packed, made_for)
        content = msgpack.unpackb(packed) if found == expected else None
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        raise ValueError(f"it does not unpack: {error!r}") from None
    if found != expected:
        raise ValueError(f"expected checksum {expected}, found {found}: changed, or of another cache")
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}; expected a map of streams")
    return content


def _checksum(packed: bytes, made_for: str) -> int:
    return zlib.crc32(packed, zlib.crc32(made_for.encode()))
