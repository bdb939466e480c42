"""Frames: cut right however the stream is torn, refused before memory is spent, and never anything but a map."""

from __future__ import annotations

import random
import tracemalloc

import msgpack
import pytest

from tierd.errors import Invalid
from tierd.wire.framing import BUFFER_BYTES, BUFFER_BYTES_KEPT, LENGTH, FrameReader, decode, encode

MESSAGES = [{"verb": "bye"}, {"hashes": bytes(range(256)) * 1024}, {}, {"text": "x" * 70_000}, {"id": 7}]


def read(reader: FrameReader, data: bytes) -> list[dict[str, object]]:
    """Feed bytes as a socket would; returns the messages that came out."""
    messages = []
    while data:
        room = reader.buffer()
        taken = min(len(room), len(data))
        room[:taken] = data[:taken]
        data = data[taken:]
        reader.feed(taken)
        messages += [decode(payload) for payload in reader]
    return messages


def test_a_stream_cut_anywhere_gives_the_same_messages() -> None:
    """Frames arrive whole whatever pieces the socket delivers."""
    stream = b"".join(map(encode, MESSAGES))
    for seed in range(20):
        chooser = random.Random(seed)
        reader, messages, at = FrameReader(4 << 20), [], 0
        while at < len(stream):
            step = chooser.choice((1, 3, 4, 5, 100, 4096, 65_536, 300_000))
            messages += read(reader, stream[at : at + step])
            at += step
        assert messages == MESSAGES


def test_many_frames_in_one_buffer_come_out_in_order() -> None:
    """Pipelined small frames are all there after one read."""
    messages = [{"id": number} for number in range(1000)]
    assert read(FrameReader(1024), b"".join(map(encode, messages))) == messages


def test_a_length_over_the_limit_is_refused_as_soon_as_it_is_there() -> None:
    """Four bytes are enough to say no; one byte less is allowed."""
    reader = FrameReader(1000)
    assert read(reader, LENGTH.pack(1000)) == []
    with pytest.raises(Invalid, match="1001 bytes is over the maximum of 1000"):
        read(FrameReader(1000), LENGTH.pack(1001))


def test_an_announced_length_costs_no_memory_before_its_bytes_come() -> None:
    """A peer that announces 4 MiB and sends nothing has made nobody allocate that."""
    reader = FrameReader(4 << 20)
    tracemalloc.start()
    try:
        read(reader, LENGTH.pack(4 << 20) + b"x" * 100)
        reader.buffer()
        assert tracemalloc.get_traced_memory()[1] < 2 * BUFFER_BYTES
    finally:
        tracemalloc.stop()


def test_the_limit_can_be_raised_between_frames() -> None:
    """After hello larger frames are welcome."""
    reader = FrameReader(16)
    assert read(reader, encode({"id": 1})) == [{"id": 1}]
    reader.frame_bytes_max = 1 << 20
    assert read(reader, encode({"hashes": bytes(1000)})) == [{"hashes": bytes(1000)}]


def test_memory_of_a_large_frame_is_given_back() -> None:
    """One huge frame does not keep a huge buffer for the life of the connection."""
    reader = FrameReader(8 << 20)
    assert len(read(reader, encode({"hashes": bytes(5 << 20)}))) == 1
    assert len(reader.buffer()) <= BUFFER_BYTES < BUFFER_BYTES_KEPT


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"\x93\x01\x02\x03",
        b"\xa3abc",
        b"\x81\xc4\x01a\x01",
        b"\x81\x01\x01",
        b"\x81\x91\x01\x01",
        b"\x81\xa1a",
        b"\x80\x80",
        b"\x81\xa2\xff\xfe\x01",
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x81\xa1a\xdd\x00\x10\x00\x00",
        b"\x81\xa1t\xd6\xff\x00\x00\x00\x00",
        b"\x81\xa1e\xc7\x02\x05ab",
    ],
    ids=lambda payload: payload[:8].hex() or "empty",
)
def test_what_is_not_a_map_with_string_keys_is_invalid(payload: bytes) -> None:
    """Other types, wrong keys, lies about lengths, depth, extensions and bad text all end in Invalid."""
    with pytest.raises(Invalid):
        decode(payload)


def test_no_random_bytes_raise_anything_but_invalid() -> None:
    """Ten thousand random payloads, half of them damaged real ones."""
    chooser = random.Random(3)
    real = msgpack.packb({"id": 1, "verb": "lookup", "hashes": bytes(64), "tiers": {"cpu": 1}, "list": [1, "a", None]})
    refused = 0
    for number in range(10_000):
        payload = bytearray(real if number % 2 else chooser.randbytes(chooser.randrange(60)))
        if number % 2:
            for _ in range(chooser.randrange(1, 4)):
                payload[chooser.randrange(len(payload))] = chooser.randrange(256)
        try:
            assert type(decode(bytes(payload))) is dict
        except Invalid:
            refused += 1
    assert refused > 5000
