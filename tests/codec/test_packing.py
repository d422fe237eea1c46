"""Records: unpacking returns what was packed, and any changed byte is an error."""

import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from random_teacher import J, T, V, hidden_and_head, pack_streams, random_order

from pipeline.codec import packing
from pipeline.codec.packing import (
    join_arrays,
    narrowest,
    pack_record,
    pack_skipped,
    raw_array,
    raw_stream,
    to_numpy,
    unpack_record,
)
from pipeline.codec.registry import CODECS, make_codec
from pipeline.errors import SampleError

STREAMS = {"ids": bytes(range(200)), "empty": b"", "long": bytes(5000)}
ROOM = 10_000
"""Bytes a token that any of these records needs."""


@pytest.mark.parametrize("largest", [0, 255, 256, 65_535, 65_536, 2**31 - 1])
def test_unpacking_returns_the_tokens_and_streams(largest):
    tokens, streams = unpack_record(pack_record(np.array([0, largest]), STREAMS), ROOM)
    assert tokens.dtype == np.int32 and tokens.tolist() == [0, largest]
    assert streams == STREAMS


def test_packing_is_deterministic():
    assert pack_record(np.arange(9), STREAMS, "a") == pack_record(np.arange(9), STREAMS, "a")


def test_a_record_unpacks_only_for_its_own_cache():
    record = pack_record(np.arange(3), STREAMS, "this cache")
    assert unpack_record(record, ROOM, "this cache")[1] == STREAMS
    with pytest.raises(ValueError, match=r"expected checksum \d+, found \d+: changed, or of another cache"):
        unpack_record(record, ROOM, "another")
    with pytest.raises(ValueError, match="of another cache"):
        unpack_record(pack_skipped("broken", "this cache"), ROOM, "another")


@pytest.mark.parametrize("name", CODECS)
def test_a_changed_byte_anywhere_is_an_error(name):
    """Flip every bit of every byte, including the framing and the names."""
    hidden, head = hidden_and_head(tokens=2)
    record = pack_record(np.arange(2), pack_streams(make_codec(name, order=random_order(V)), hidden, head), "this")
    for place in range(len(record)):
        for bit in range(8):
            changed = bytearray(record)
            changed[place] ^= 1 << bit
            with pytest.raises(ValueError):
                unpack_record(bytes(changed), ROOM, "this")


def test_a_truncated_record_is_an_error():
    record = pack_record(np.arange(3), STREAMS)
    for size in range(len(record)):
        with pytest.raises(ValueError):
            unpack_record(record[:size], ROOM)
    with pytest.raises(ValueError):
        unpack_record(record + b"\0", ROOM)


@pytest.mark.parametrize(
    "foreign", [b"\x80", b"\xc0", b"\x92\x01\x02", b"{}", b"\x93\x01\xc4\x00\x02", b"\x92\xc0\xc4\x00"]
)
def test_other_bytes_are_an_error(foreign):
    with pytest.raises(ValueError, match=r"it does not unpack|expected checksum"):
        unpack_record(foreign, ROOM)


@pytest.mark.parametrize("bombed", ["ids", "tokens.int32"])
def test_a_record_that_claims_more_than_its_tokens_can_be_is_refused_before_it_is_decompressed(bombed, monkeypatch):
    """Eight kilobytes that would become 256 MB, with a right checksum."""
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(2**28))
    assert len(bomb) < 10_000
    frames = {"tokens.int32": zstandard.ZstdCompressor().compress(bytes(8)), bombed: bomb}
    record = packing._with_checksum(frames, "this")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"its streams claim 268,435,456 bytes; expected at most [\d,]+"):
        unpack_record(record, ROOM, "this")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_frame_that_hides_its_size_is_refused():
    stream = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    frames = {"tokens.int32": zstandard.ZstdCompressor().compress(bytes(8)), "ids": stream}
    with pytest.raises(ValueError, match=r"claim 18,446,744,073,709,551,615 bytes; expected at most 20,000"):
        unpack_record(packing._with_checksum(frames, ""), ROOM)


@pytest.mark.parametrize("frame", [b"no frame", b"", 7, "text", None])
def test_what_is_no_frame_is_an_error(frame):
    frames = {"tokens.int32": zstandard.ZstdCompressor().compress(bytes(8)), "ids": frame}
    with pytest.raises(ValueError, match=r"it does not decompress|its streams claim"):
        unpack_record(packing._with_checksum(frames, ""), ROOM)
    with pytest.raises(ValueError, match="it has no tokens"):
        unpack_record(packing._with_checksum({"ids": b""}, ""), ROOM)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("name", CODECS)
def test_every_record_of_a_codec_has_room(name, tokens):
    hidden, head = hidden_and_head(tokens=tokens)
    for scale in (0.0, 1.0, 100.0):  # flat to certain
        codec = make_codec(name, order=random_order(V))
        streams = pack_streams(codec, scale * hidden, head)
        assert sum(map(len, streams.values())) <= tokens * codec.token_bytes(J)


def test_a_skipped_record_gives_its_reason():
    record = pack_skipped("the image is broken: 'x'", "this")
    with pytest.raises(SampleError, match="skipped when the teacher cache was made: the image is broken: 'x'"):
        unpack_record(record, ROOM, "this")
    for place in range(len(record)):
        with pytest.raises(ValueError):
            unpack_record(record[:place] + bytes([record[place] ^ 1]) + record[place + 1 :], ROOM, "this")


def test_raw_streams_are_little_endian_numbers():
    assert raw_stream(np.array([1, 258]), "uint16") == b"\1\0\2\1"
    assert raw_array(b"\1\0\2\1", "uint16", -1).tolist() == [1, 258]
    assert raw_array(b"\0\0\x80\x3f", "float32", 1)[0] == 1.0
    with pytest.raises(ValueError, match="numbers of type object; expected one of uint8, uint16, int32"):
        raw_array(b"", "object", -1)
    with pytest.raises(ValueError):
        raw_array(bytes(6), "uint16", 2, 2, -1)
    assert raw_array(bytes(4), "uint16", -1).flags.writeable, "torch warns about arrays that are not writable"


def test_bfloat16_keeps_its_bits():
    tensor = torch.tensor([1.0, -2.5, float("inf")], dtype=torch.bfloat16)
    array = raw_array(raw_stream(to_numpy(tensor), "bfloat16"), "bfloat16", -1)
    assert torch.equal(torch.from_numpy(array).view(torch.bfloat16), tensor)


@pytest.mark.parametrize(("largest", "dtype"), [(0, "uint8"), (255, "uint8"), (256, "uint16"), (65_536, "int32")])
def test_narrowest_is_the_smallest_dtype_that_holds_the_numbers(largest, dtype):
    assert narrowest(largest) == dtype


def test_joined_records_are_concatenated_and_padded_with_zeros():
    generator = np.random.default_rng(0)
    parts = [{"a": generator.integers(1, 9, (t, J, n)), "b": generator.random((t, J, 1))} for t, n in ((2, 3), (T, 7))]
    joined = join_arrays(parts)
    assert joined["a"].shape == (2 + T, J, 7) and joined["b"].shape == (2 + T, J, 1)
    assert np.array_equal(joined["a"][:2, :, :3], parts[0]["a"]) and not joined["a"][:2, :, 3:].any()
    assert np.array_equal(joined["a"][2:], parts[1]["a"])
    assert np.array_equal(joined["b"], np.concatenate([part["b"] for part in parts]))


def test_joined_records_take_the_widest_dtype():
    """The ids of one record fit into two bytes, those of another do not."""
    parts = [{"ids": np.full((1, 1, 2), number, dtype)} for number, dtype in ((7, "u1"), (70_000, "i4"), (300, "u2"))]
    assert join_arrays(parts)["ids"][:, 0, 0].tolist() == [7, 70_000, 300]
