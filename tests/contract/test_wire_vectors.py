"""Golden frames of protocol version 1: one of each message, byte for byte, in both directions.

A vector is a file of hex in `vectors/`. They change only with the protocol's version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tierd.errors import Gone
from tierd.wire.framing import LENGTH, FrameReader, decode, encode
from tierd.wire.messages import (
    ADMIN,
    ATTACHED,
    DATA,
    PUSHES,
    REPLIES,
    SEGMENT,
    check,
    check_values,
    failure,
    pack_held,
    pack_slots,
)

VECTORS = Path(__file__).parent / "vectors"
LAYOUT = {
    "layers": 2,
    "kv_heads": 2,
    "head_dim": 16,
    "dtype": "float32",
    "block_tokens": 16,
    "kv_parts": 2,
    "scale_bytes": 0,
    "shards": 1,
}
HASHES = bytes(range(64))
PARENT = b"\xaa" * 32
TOKEN, SEGMENT_ID, INCARNATION = b"t" * 16, b"s" * 16, b"i" * 16
HELLO = {"version": 1, "model": "m", "layout": LAYOUT, "fingerprint": b"f" * 16, "client": "c"}
WELCOME = {
    "version": 1,
    "session": 1 << 40,
    "token": TOKEN,
    "incarnation": INCARNATION,
    "namespace": b"n" * 32,
    "block_bytes": 8192,
    "slot_bytes": 8192,
    "slots_per_segment": 100,
    "limits": {"frame_bytes_max": 4 << 20, "blocks_per_request_max": 32768},
}
NAMES = {"session": 1 << 40, "token": TOKEN}
HELD = pack_held([(SEGMENT_ID, 3, 1), (SEGMENT_ID, 4, 2)])
TIERS = {"gpu": 0, "cpu": 1, "nvme": 1, "remote": 0, "pending": 0, "miss": 0}
SEGMENT_NAMES = {"tier": "cpu", "ordinal": 0, "segment": SEGMENT_ID}
SIZES = {"slots": 100, "slot_bytes": 8192, "directory_bytes": 24576, "slots_bytes": 819200}

REQUESTS: dict[str, dict[str, Any]] = {
    "hello": HELLO,
    "resume": {**HELLO, **NAMES, "namespace": b"n" * 32, "held": HELD, "domain": "d"},
    "events": NAMES,
    "lookup": {"hashes": HASHES, "parent": PARENT, "deadline_ms": 900},
    "load": {"lease": 5, "first": 1, "count": 1},
    "release": {"lease": 5, "first": 0, "count": 1},
    "store": {"hashes": HASHES},
    "commit": {"lease": 6, "count": 1},
    "abort": {"lease": 6},
    "reserve": {"count": 4},
    "commit_pages": {"slots": pack_slots([3, 4]), "parents": PARENT + HASHES[:32], "hashes": HASHES},
    "release_pages": {"slots": pack_slots([3])},
    "ended": {"block": PARENT, "turn": "tool_use", "conversation": "c"},
    "keep": {"block": PARENT, "ttl_ms": 300_000, "priority": 7},
    "prefetch": {"hashes": HASHES},
    "detached": {"segments": [SEGMENT_ID]},
    "bye": {},
    "stats": {},
    "status": {},
    "sync": {"deadline_ms": 5000},
    "drain": {},
    "reload": {},
    "record": {"namespace": b"n" * 8},
    "purge": {"namespace": "0123abcd", "shred": True},
    "scrub": {"action": "start"},
    "pin": {"namespace": "0123abcd", "block": PARENT},
    "unpin": {"namespace": "0123abcd", "block": PARENT},
    "quota": {"namespace": "0123abcd", "tier": "cpu", "min": 1 << 30, "max": 0},
}
ANSWERS: dict[str, dict[str, Any]] = {
    "hello": WELCOME,
    "resume": {**WELCOME, "lease": 9},
    "events": {},
    "lookup": {"lease": 5, "blocks": 2, "told": 1, "slots": pack_slots([7]), "tiers": TIERS},
    "load": {"first": 1, "count": 1, "slots": pack_slots([8])},
    "release": {},
    "store": {"lease": 6, "slots": pack_slots([9, -1])},
    "commit": {"committed": 1, "dropped": 0},
    "abort": {},
    "reserve": {"slots": pack_slots([3, 4])},
    "commit_pages": {"codes": pack_slots([-1, 7])},
    "release_pages": {},
    "ended": {},
    "keep": {"kept": 3},
    "prefetch": {"blocks": 2},
    "detached": {},
    "bye": {},
}
FRAMES: dict[str, dict[str, Any]] = {
    **{f"request-{verb}": {"id": 1, "verb": verb, **arguments} for verb, arguments in REQUESTS.items()},
    **{f"reply-{verb}": {"id": 1, "ok": True, **fields} for verb, fields in ANSWERS.items()},
    "request-hello_gpu": {"id": 1, "verb": "hello", **HELLO, "tier": "gpu"},
    "request-hello_removed": {"id": 1, "verb": "hello", **HELLO, "removed": True},
    "request-hello_device": {"id": 1, "verb": "hello", **HELLO, "tier": "gpu", "device": b"u" * 16},
    "reply-hello_gpu": {"id": 1, "ok": True, **WELCOME, "device": b"u" * 16},
    "request-commit_pin": {"id": 1, "verb": "commit", "lease": 6, "pin": True},
    "reply-commit_pin": {"id": 1, "ok": True, "committed": 1, "dropped": 0, "pinned": 2},
    "reply-error": failure(1, Gone("no lease 5")),
    "push-attach": {"id": 0, "push": "attach", "segments": [{**SEGMENT_NAMES, **SIZES}]},
    "push-detach": {"id": 0, "push": "detach", "segments": [SEGMENT_NAMES]},
    "push-removed": {"id": 0, "push": "removed", "hashes": HASHES, "everything": False},
}


def test_there_is_a_vector_for_every_verb_reply_and_push() -> None:
    """Nothing of the protocol is without its golden frame, and no file without its message."""
    assert set(REQUESTS) == set(DATA) | set(ADMIN)
    assert set(ANSWERS) == set(REPLIES)
    assert {f"push-{push}" for push in PUSHES} <= set(FRAMES)
    assert {path.stem for path in VECTORS.glob("*.hex")} == set(FRAMES)


@pytest.mark.parametrize("name", FRAMES)
def test_a_message_is_written_as_its_vector(name: str) -> None:
    """What this release sends is what version 1 is."""
    assert encode(FRAMES[name]).hex() == VECTORS.joinpath(f"{name}.hex").read_text().strip()


@pytest.mark.parametrize("name", FRAMES)
def test_a_vector_is_read_as_its_message(name: str) -> None:
    """What version 1 sends is what this release reads, and accepts."""
    data = bytes.fromhex(VECTORS.joinpath(f"{name}.hex").read_text())
    reader = FrameReader(1 << 20)
    reader.buffer()[: len(data)] = data
    reader.feed(len(data))
    (message,) = [decode(payload) for payload in reader]
    assert message == FRAMES[name]
    kind, _, what = name.partition("-")
    if kind == "request":
        request = check(message, {**DATA, **ADMIN})
        assert all(request[name] == value for name, value in message.items() if name in request)
    elif kind == "push":
        for segment in check_values(what, message, PUSHES[what]).get("segments", ()):
            check_values(what, segment, ATTACHED if what == "attach" else SEGMENT)
    elif what != "error":
        check_values(what, message, REPLIES[what.removesuffix("_gpu").removesuffix("_pin")])


def test_a_frame_is_made_as_the_document_says() -> None:
    """The smallest request by hand: length, map of two, two pairs of short strings and numbers."""
    body = b"\x82\xa2id\x01\xa4verb\xa3bye"
    assert encode({"id": 1, "verb": "bye"}) == LENGTH.pack(len(body)) + body == b"\x0e\x00\x00\x00" + body
