"""Messages: every argument of every verb is checked, and the error says which was wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierd.block import ROOT
from tierd.errors import Busy, Closed, Gone, Invalid
from tierd.wire.messages import (
    ADMIN,
    DATA,
    NO_ROOM,
    PENDING,
    READING,
    REPLIES,
    REQUIRED,
    STORED,
    WRITING,
    Argument,
    check,
    check_values,
    error_of,
    failure,
    pack_held,
    pack_slots,
    unpack_held,
    unpack_slots,
)


def sample(argument: Argument) -> Any:
    """A small value that the argument allows."""
    size = max(argument.least, argument.multiple if argument.type is bytes and argument.least else argument.least)
    return {int: size, bool: False, bytes: bytes(size), str: "x" * size, dict: {}, list: [b"x" * 16] * size}[argument.type]


def full(verb: str, verbs: Any = DATA) -> dict[str, Any]:
    """A request with every argument."""
    return {"id": 1, "verb": verb, **{name: sample(argument) for name, argument in verbs[verb].items()}}


ARGUMENTS = [(verb, name) for verb, arguments in DATA.items() for name in arguments]


@pytest.mark.parametrize("verb", DATA)
def test_a_full_request_of_every_verb_is_accepted(verb: str) -> None:
    """The tables allow what they describe, with id, verb and deadline beside the arguments."""
    request = check({**full(verb), "deadline_ms": 250})
    assert (request.verb, request.id, request.deadline_seconds) == (verb, 1, 0.25)
    assert set(request) == set(DATA[verb])


@pytest.mark.parametrize(("verb", "name"), ARGUMENTS)
def test_a_missing_argument_is_named_or_gets_its_default(verb: str, name: str) -> None:
    """What is required is asked for; what is optional has its default."""
    message = full(verb)
    del message[name]
    default = DATA[verb][name].default
    if default is REQUIRED:
        with pytest.raises(Invalid, match=f"{verb}: argument '{name}' is missing"):
            check(message)
    else:
        assert check(message)[name] == default


@pytest.mark.parametrize(("verb", "name"), ARGUMENTS)
def test_an_argument_of_another_type_is_named(verb: str, name: str) -> None:
    """No type passes for another: not True for 1, not text for bytes, not a float for an integer."""
    wrong: list[Any] = [True, 1.0, "text", b"bytes", [1], {"a": 1}, -1]
    for value in wrong:
        if type(value) is DATA[verb][name].type and value != -1:
            continue
        with pytest.raises(Invalid, match=f"{verb}: '{name}' must be"):
            check({**full(verb), name: value})


@pytest.mark.parametrize("length", [0, 1, 31, 33, 63])
def test_hashes_of_wrong_length_are_invalid(length: int) -> None:
    """Hashes come in multiples of 32 bytes, at least one."""
    with pytest.raises(Invalid, match=rf"lookup: 'hashes' must be bytes of length 32 .* multiples of 32, not {length}"):
        check({"verb": "lookup", "hashes": bytes(length)})


def test_a_lookup_without_parent_starts_at_the_root() -> None:
    """The default parent is 32 zero bytes."""
    assert check({"verb": "lookup", "hashes": bytes(32)})["parent"] == ROOT


def test_integers_beyond_their_width_are_invalid() -> None:
    """A u32 is at most 2^32 - 1; ids and deadlines too."""
    for change in (
        {"first": 1 << 32},
        {"count": 0},
        {"lease": 1 << 64},
        {"id": 1 << 32},
        {"id": -1},
        {"deadline_ms": -1},
    ):
        with pytest.raises(Invalid, match=next(iter(change))):
            check({**full("load"), **change})


def test_unknown_verbs_and_arguments_are_refused_by_name() -> None:
    """A typing error is not silence; long names are cut."""
    with pytest.raises(Invalid, match=r"verb 'lokup' is unknown.*lookup"):
        check({"verb": "lokup"})
    with pytest.raises(Invalid, match="release: argument 'bogus' is unknown; known are lease, first, count"):
        check({"verb": "release", "lease": 1, "bogus": 2})
    for verb in (None, 7, b"lookup", ["lookup"], "x" * 100_000):
        with pytest.raises(Invalid, match="is unknown") as caught:
            check({"verb": verb})
        assert len(str(caught.value)) < 400


def test_admin_verbs_are_unknown_on_the_data_socket() -> None:
    """And the other way round."""
    with pytest.raises(Invalid, match="verb 'drain' is unknown"):
        check({"verb": "drain"})
    with pytest.raises(Invalid, match="verb 'lookup' is unknown"):
        check(full("lookup"), ADMIN)
    assert check({"verb": "drain", "id": 3}, ADMIN).id == 3


def test_replies_may_grow_but_not_shrink() -> None:
    """A client ignores fields that it does not know and insists on those that it needs."""
    reply = {"committed": 1, "dropped": 0, "news": "x"}
    assert check_values("reply", reply, REPLIES["commit"]) == {"committed": 1, "dropped": 0}
    with pytest.raises(Invalid, match="'dropped' is missing"):
        check_values("reply", {"committed": 1}, REPLIES["commit"])


def test_errors_travel_by_name() -> None:
    """Each error class arrives as itself; a name from the future counts as closed."""
    for error in (Invalid("a"), Busy("b"), Gone("c"), Closed("d")):
        reply = failure(9, error)
        back = error_of(reply)
        assert (reply["id"], reply["ok"], type(back), str(back)) == (9, False, type(error), str(error))
    assert type(error_of({"error": "tired"})) is Closed


def test_slots_are_little_endian_int32() -> None:
    """Numbers and codes survive; the view is read-only."""
    slots = np.array([0, 1, 70_000, STORED, PENDING, NO_ROOM])
    packed = pack_slots(slots)
    assert packed[:8] == b"\0\0\0\0\1\0\0\0" and packed[-4:] == b"\xfd\xff\xff\xff"
    assert unpack_slots(packed).tolist() == slots.tolist()
    assert not unpack_slots(packed).flags.writeable


def test_held_records_keep_segment_ids_with_trailing_zeros() -> None:
    """24 bytes a record; an unknown kind is invalid."""
    records = [(b"a" * 15 + b"\0", 7, READING), (bytes(16), 1 << 31, WRITING)]
    assert len(pack_held(records)) == 48
    assert unpack_held(pack_held(records)) == records
    with pytest.raises(Invalid, match="kind of slot 7 must be"):
        unpack_held(pack_held([(bytes(16), 7, 3)]))


def test_every_verb_and_argument_is_in_the_protocol_document() -> None:
    """What the tables know, `docs/protocol.md` describes."""
    text = Path(__file__).parents[2].joinpath("docs/protocol.md").read_text()
    for verb, arguments in {**DATA, **ADMIN}.items():
        assert re.search(rf"^    {verb} \{{|`{verb} \{{|request `{verb}`|`{verb}`", text, re.M), verb
        for name in arguments:
            assert re.search(rf"\b{name}\b", text), name
