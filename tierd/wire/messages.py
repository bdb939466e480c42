"""The messages of `docs/protocol.md`: what each verb, reply and push carries, as tables, and how they are checked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from struct import Struct
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tierd.block import HASH_BYTES, ROOT
from tierd.errors import ERRORS, Closed, Invalid, TierdError

PROTOCOL_VERSION = 1
STORED, PENDING, NO_ROOM = -1, -2, -3
"""Instead of a slot number in the reply to `store`."""
READING, WRITING = 1, 2
"""Kinds of held records."""
NAMED, UNNAMED = -1, -2
"""Instead of a slot number in the reply to `commit_pages`."""
TURN_ENDS = ("tool_use", "end_turn", "stop", "length", "abort")
PRIORITY_MAX = 100
KEEP_MS_MAX = 7 * 24 * 3600 * 1000
"""A week: what is wanted for longer is an operator's to pin."""
SEGMENTS_PER_PUSH_MAX = 64
SLOT_BYTES = 4
U32_MAX, U64_MAX = (1 << 32) - 1, (1 << 64) - 1
REQUIRED: Any = object()
Reply = dict[str, Any] | None
"""A reply's own fields, where it has any."""
Answering = Callable[[], Awaitable[Reply]]
"""What begins to answer a request when it is called: one that is refused before has begun nothing."""
Answer = Reply | Answering


class Argument(NamedTuple):
    """What a value must be: its type, the range of the integer or of the length, and what divides a length."""

    type: type
    least: int
    most: int
    multiple: int = 1
    default: Any = REQUIRED


def optional(argument: Argument, default: Any = None) -> Argument:
    return argument._replace(default=default)


U32, U64 = Argument(int, 0, U32_MAX), Argument(int, 0, U64_MAX)
BIN16, BIN32 = Argument(bytes, 16, 16), Argument(bytes, 32, 32)
TEXT = Argument(str, 0, 1024)
NAME = Argument(str, 1, 1024)
COUNT = Argument(int, 1, U32_MAX)
BINARY = Argument(bytes, 0, U32_MAX)
MAP = Argument(dict, 0, U32_MAX)
HASHES = Argument(bytes, HASH_BYTES, U32_MAX, HASH_BYTES)
PARENT = optional(BIN32, ROOT)
SLOTS = Argument(bytes, 0, U32_MAX, SLOT_BYTES)
SEGMENTS = Argument(list, 1, SEGMENTS_PER_PUSH_MAX)

PAGES = Argument(bytes, SLOT_BYTES, U32_MAX, SLOT_BYTES)
LABEL = Argument(str, 1, 128)
HEX = Argument(str, 4, 64)
FLAG = Argument(bool, 0, 1)

HELLO = {
    "model": NAME,
    "layout": MAP,
    "fingerprint": BIN16,
    "client": TEXT,
    "domain": optional(NAME),
    "tier": optional(NAME),
    "device": optional(BIN16),
    "removed": optional(FLAG, False),
}
HELD = Struct("<16sII")
ENVELOPE = {"id": optional(U32, 0), "deadline_ms": optional(U32)}
"""May come with every request."""

OPENING = {
    "hello": {"version": U32, **HELLO},
    "resume": {
        "version": U32,
        "session": U64,
        "token": BIN16,
        "namespace": BIN32,
        "held": Argument(bytes, 0, U32_MAX, HELD.size),
        **{name: optional(argument) for name, argument in HELLO.items()},
    },
    "events": {"session": U64, "token": BIN16},
}
"""One of these comes first on a connection to the data socket."""
DATA = {
    **OPENING,
    "lookup": {"hashes": HASHES, "parent": PARENT},
    "load": {"lease": U64, "first": U32, "count": COUNT},
    "release": {"lease": U64, "first": optional(U32), "count": optional(COUNT)},
    "store": {"hashes": HASHES, "parent": PARENT},
    "commit": {"lease": U64, "count": optional(U32), "pin": optional(FLAG, False)},
    "abort": {"lease": U64},
    "reserve": {"count": COUNT},
    "commit_pages": {"slots": PAGES, "parents": HASHES, "hashes": HASHES},
    "release_pages": {"slots": PAGES},
    "ended": {"block": BIN32, "turn": LABEL, "conversation": optional(LABEL)},
    "keep": {"block": BIN32, "ttl_ms": Argument(int, 1, KEEP_MS_MAX), "priority": optional(Argument(int, 0, PRIORITY_MAX), 0)},
    "prefetch": {"hashes": HASHES, "parent": PARENT},
    "detached": {"segments": SEGMENTS},
    "bye": {},
    "stats": {},
}
ADMIN: dict[str, dict[str, Argument]] = {
    "status": {},
    "sync": {},
    "drain": {},
    "reload": {},
    "record": {"namespace": optional(Argument(bytes, 0, 32), b"")},
    "purge": {"namespace": HEX, "shred": optional(FLAG, False)},
    "scrub": {"action": NAME},
    "pin": {"namespace": HEX, "block": optional(BIN32)},
    "unpin": {"namespace": HEX, "block": BIN32},
    "quota": {"namespace": optional(HEX, ""), "tier": optional(NAME), "min": optional(U64), "max": optional(U64)},
}


WELCOME = {
    "version": U32,
    "session": U64,
    "token": BIN16,
    "incarnation": BIN16,
    "namespace": BIN32,
    "block_bytes": U64,
    "slot_bytes": U64,
    "slots_per_segment": COUNT,
    "device": optional(Argument(bytes, 0, 16, 16), b""),
    "limits": MAP,
}
REPLIES = {
    "hello": WELCOME,
    "resume": {**WELCOME, "lease": U64},
    "events": {},
    "lookup": {"lease": U64, "blocks": U32, "told": U32, "slots": SLOTS, "tiers": MAP},
    "load": {"first": U32, "count": COUNT, "slots": SLOTS},
    "release": {},
    "store": {"lease": U64, "slots": SLOTS},
    "commit": {"committed": U32, "dropped": U32},
    "abort": {},
    "reserve": {"slots": PAGES},
    "commit_pages": {"codes": PAGES},
    "release_pages": {},
    "ended": {},
    "keep": {"kept": U32},
    "prefetch": {"blocks": U32},
    "detached": {},
    "bye": {},
}
SEGMENT = {"tier": NAME, "ordinal": U32, "segment": BIN16}
ATTACHED = {**SEGMENT, "slots": COUNT, "slot_bytes": U64, "directory_bytes": U64, "slots_bytes": U64}
PUSHES = {
    "attach": {"segments": SEGMENTS},
    "detach": {"segments": SEGMENTS},
    "removed": {"hashes": Argument(bytes, 0, U32_MAX, HASH_BYTES), "everything": FLAG},
}


class Request(dict[str, Any]):
    """A checked request: its arguments by name, those left out with their default (None where there is none)."""

    __slots__ = ("deadline_seconds", "id", "verb")

    def __init__(self, arguments: Mapping[str, Any], verb: str, request_id: int, deadline_seconds: float | None) -> None:
        super().__init__(arguments)
        self.verb = verb
        self.id = request_id
        self.deadline_seconds = deadline_seconds
        """None: the daemon's own limit applies."""


def check(message: Mapping[str, Any], verbs: Mapping[str, Mapping[str, Argument]] = DATA) -> Request:
    """Read a decoded request of one of `verbs`; raises Invalid naming the verb and the argument that is wrong."""
    verb = message.get("verb")
    if type(verb) is not str or verb not in verbs:
        raise Invalid(f"verb {shown(verb)} is unknown on this socket; known are {', '.join(verbs)}")
    if unknown := message.keys() - verbs[verb].keys() - ENVELOPE.keys() - {"verb"}:
        known = ", ".join(verbs[verb]) or "none"
        raise Invalid(f"{verb}: argument {shown(min(unknown))} is unknown; known are {known}")
    envelope = check_values(verb, message, ENVELOPE)
    milliseconds = envelope["deadline_ms"]
    seconds = None if milliseconds is None else milliseconds / 1000
    return Request(check_values(verb, message, verbs[verb]), verb, envelope["id"], seconds)


def only_reads(request: Request) -> bool:
    """Whether a request on the admin socket changes nothing."""
    match request.verb:
        case "quota":
            return request["min"] is None and request["max"] is None
        case "pin":
            return request["block"] is None
    return request.verb in ("status", "record") or request.get("action") == "status"


def request_id(message: Mapping[str, Any]) -> int:
    """The id of a request, checked first so that every other error can be answered under it; raises Invalid."""
    value: int = check_values("request", message, {"id": ENVELOPE["id"]})["id"]
    return value


def check_values(where: str, values: Any, arguments: Mapping[str, Argument]) -> dict[str, Any]:
    """The values named in `arguments`, defaults filled in; raises Invalid for a missing or wrong one."""
    if type(values) is not dict:
        raise Invalid(f"{where} must be a map, not {type(values).__name__}")
    checked = {}
    for name, argument in arguments.items():
        value = values.get(name)
        if value is not None:
            check_value(where, name, value, argument)
        elif argument.default is REQUIRED:
            raise Invalid(f"{where}: argument {name!r} is missing")
        checked[name] = argument.default if value is None else value
    return checked


def check_value(where: str, name: str, value: Any, argument: Argument) -> None:
    kind: Any = argument.type
    _, least, most, multiple, _ = argument
    if type(value) is not kind:
        raise Invalid(f"{where}: {name!r} must be {kind.__name__}, not {type(value).__name__}")
    size: int = value if kind in (int, bool) else len(value)
    if not least <= size <= most or size % multiple:
        refuse_size(where, name, size, argument)


def refuse_size(where: str, name: str, size: int, argument: Argument) -> NoReturn:
    kind, least, most, multiple, _ = argument
    what = {int: "an integer", bytes: "bytes of length", str: "a string of length"}.get(kind, "of length")
    span = f"{least}" if least == most else f"{least} to {most}"
    steps = f" in multiples of {multiple}" if multiple > 1 else ""
    raise Invalid(f"{where}: {name!r} must be {what} {span}{steps}, not {size}")


def shown(value: Any) -> str:
    """A value from outside, short enough for a message."""
    text = repr(value[:64] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def failure(request_id: int, error: TierdError) -> dict[str, Any]:
    """The error reply to a request (0: to the connection as such)."""
    return {"id": request_id, "ok": False, "error": error.code, "message": str(error)}


def error_of(reply: Mapping[str, Any]) -> TierdError:
    """The exception that an error reply stands for; Closed when this side does not know its name."""
    return ERRORS.get(str(reply.get("error")), Closed)(str(reply.get("message", "no reason given")))


def pack_slots(slots: ArrayLike) -> bytes:
    """Slot numbers and codes as they travel: int32 little-endian."""
    return np.asarray(slots, "<i4").tobytes()


def unpack_slots(data: bytes) -> NDArray[np.int32]:
    """A read-only int32 view of packed slot numbers."""
    return np.frombuffer(data, "<i4")


def pack_held(records: Iterable[tuple[bytes, int, int]]) -> bytes:
    """Held records of `(segment id, slot index, READING or WRITING)` as they travel in `resume`."""
    return b"".join(HELD.pack(*record) for record in records)


def unpack_held(data: bytes) -> list[tuple[bytes, int, int]]:
    """The records of `pack_held`; raises Invalid when a kind is unknown."""
    records = list(HELD.iter_unpack(data))
    for _, index, kind in records:
        if kind not in (READING, WRITING):
            raise Invalid(f"held: kind of slot {index} must be {READING} (reading) or {WRITING} (writing), not {kind}")
    return records
