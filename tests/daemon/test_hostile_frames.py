"""What a peer can do to the daemon by sending wrong bytes: lose its own connection, and nothing else."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import LAYOUT, ROOT, Daemon, Wire, hashes_of, settings
from tierd.errors import Busy, Gone, Invalid, TierdError
from tierd.layout import Layout
from tierd.wire.framing import LENGTH, encode

CHAIN = hashes_of(1, 8)
TIERS = ("gpu", "cpu", "nvme", "remote", "pending", "miss")


@pytest.fixture(scope="module")
def served() -> Iterator[Daemon]:
    """One daemon for all hostile peers: whatever they do, it must serve the next one."""
    folder = Path(tempfile.mkdtemp(prefix="tierd-", dir="/tmp"))
    flags = settings(cpu_bytes="16MiB", cpu_segment_bytes="2MiB", cpu_huge_pages="off", nvme_bytes=0)
    daemon = Daemon(folder, flags).start()
    yield daemon
    daemon.end()
    log = daemon.log
    shutil.rmtree(folder)
    assert "Traceback" not in log, log


@pytest.fixture(autouse=True)
def still_well(served: Daemon) -> Iterator[None]:
    """After each test another client is served, and nothing of the hostile one is left."""
    yield
    with served.peer(model="good") as good:
        good.store(CHAIN)
        assert good.load(CHAIN) == 8
    status = served.wait_until(lambda status: status["sessions"] == 0)
    (slots,) = [tier["slots"] for tier in status["tiers"].values()]
    assert (slots["filling"], slots["retired"], slots["quarantined"]) == (0, 0, 0)
    assert (served.process is not None) and served.process.poll() is None


def answer_to(served: Daemon, data: bytes, hello: bool = False) -> list[dict[str, Any]]:
    """All that the daemon says to these bytes until it closes or the peer has nothing more to say."""
    with Wire(served.socket) as wire:
        if hello:
            wire.hello()
        wire.socket.sendall(data)
        wire.socket.shutdown(socket.SHUT_WR)
        messages = []
        while True:
            try:
                messages.append(wire.receive())
            except (EOFError, ConnectionResetError):
                return messages


def framed(payload: bytes) -> bytes:
    """A frame of these bytes, MessagePack or not."""
    return LENGTH.pack(len(payload)) + payload


NOT_MESSAGES = {
    "a number": msgpack.packb(7),
    "a list": msgpack.packb(["verb", "hello"]),
    "nothing": b"",
    "no MessagePack": b"\xc1",
    "two messages in one frame": msgpack.packb({"verb": "bye"}) * 2,
    "a map that ends early": b"\x82\xa4verb\xa5hello\xa5model",
    "keys that are no strings": msgpack.packb({1: 2}),
    "an extension type": msgpack.packb({"verb": msgpack.ExtType(5, b"x")}),
    "text that is not UTF-8": b"\x81\xa4verb\xa3\xff\xfe\xfd",
    "an array that claims four billion items": b"\x81\xa4verb\xdd\xff\xff\xff\xff",
    "a map that claims four billion keys": b"\xdf\xff\xff\xff\xff",
    "bytes that claim four gigabytes": b"\x81\xa4verb\xc6\xff\xff\xff\xff",
    "ten thousand lists in each other": b"\x81\xa4verb" + b"\x91" * 10_000 + b"\xc0",
    "ten thousand maps in each other": b"\x81\xa4verb" + b"\x81\xa1a" * 10_000 + b"\xc0",
}


@pytest.mark.parametrize("hello", [False, True], ids=["before hello", "after hello"])
@pytest.mark.parametrize("payload", NOT_MESSAGES.values(), ids=NOT_MESSAGES.keys())
def test_a_frame_that_is_no_message_ends_its_connection_with_a_reason(served: Daemon, payload: bytes, hello: bool) -> None:
    """The error reply has id 0, says what was wrong, and the connection ends there."""
    last = answer_to(served, framed(payload) + encode({"id": 9, "verb": "stats"}), hello)[-1]
    assert (last["id"], last["ok"], last["error"]) == (0, False, "invalid")
    assert "frame" in last["message"] or "MessagePack" in last["message"]


@pytest.mark.parametrize(("hello", "most"), [(False, 64 << 10), (True, 4 << 20)])
def test_a_frame_that_is_too_long_is_refused_by_its_length_alone(served: Daemon, hello: bool, most: int) -> None:
    """Four bytes are enough to be refused: nothing is allocated, nothing is waited for."""
    for length in (most + 1, 0x7FFFFFFF, 0xFFFFFFFF):
        (reply,) = answer_to(served, LENGTH.pack(length), hello)
        assert (reply["id"], reply["error"]) == (0, "invalid")
        assert f"{length} bytes is over the maximum of {most} bytes" in reply["message"]


def test_the_longest_frame_that_is_allowed_is_read(served: Daemon) -> None:
    """A frame of exactly the maximum is taken; here one whose only fault is an unknown argument."""
    body = msgpack.packb({"id": 3, "verb": "stats", "padding": b""})
    padding = bytes((4 << 20) - len(body) - 3)
    (reply,) = answer_to(served, encode({"id": 3, "verb": "stats", "padding": padding}), hello=True)
    assert (reply["id"], reply["error"]) == (3, "invalid")
    assert "'padding' is unknown" in reply["message"]


@pytest.mark.parametrize("hello", [False, True])
def test_a_truncated_frame_is_no_request(served: Daemon, hello: bool) -> None:
    """Every way to stop in the middle of a frame ends the connection and does nothing."""
    whole = encode({"id": 1, "verb": "lookup", "hashes": CHAIN})
    for length in (1, 3, 4, 5, len(whole) - 1):
        assert answer_to(served, whole[:length], hello) == []


def test_a_frame_may_arrive_byte_by_byte(served: Daemon) -> None:
    """Where the stream is cut does not matter."""
    with served.peer() as wire:
        for byte in encode({"id": 5, "verb": "lookup", "hashes": CHAIN}):
            wire.socket.sendall(bytes([byte]))
        assert wire.reply(5)["tiers"]["miss"] == 8


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_are_refused(served: Daemon, seed: int) -> None:
    """Noise before hello, and valid requests with flipped bytes after it, get an error reply or none, and no crash."""
    random = Random(seed)
    for reply in answer_to(served, random.randbytes(2000)):
        assert reply["ok"] is False
    frame = bytearray(encode({"id": 1, "verb": "lookup", "hashes": CHAIN, "parent": ROOT, "deadline_ms": 50}))
    for _ in range(20):
        spoiled = bytearray(frame)
        for _ in range(random.randint(1, 4)):
            spoiled[random.randrange(4, len(frame))] = random.randrange(256)
        for reply in answer_to(served, bytes(spoiled), hello=True):
            assert reply["ok"] is True or reply["message"]


BAD_ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("lookup", {}, "'hashes' is missing"),
    ("lookup", {"hashes": b""}, "'hashes' must be bytes of length 32"),
    ("lookup", {"hashes": CHAIN[:-1]}, "in multiples of 32, not 255"),
    ("lookup", {"hashes": CHAIN + b"x"}, "in multiples of 32, not 257"),
    ("lookup", {"hashes": "text"}, "'hashes' must be bytes, not str"),
    ("lookup", {"hashes": [CHAIN[:32]]}, "'hashes' must be bytes, not list"),
    ("lookup", {"hashes": CHAIN, "parent": b"short"}, "'parent' must be bytes of length 32, not 5"),
    ("lookup", {"hashes": CHAIN, "depth": 1}, "'depth' is unknown"),
    ("lookup", {"hashes": bytes(32 * 32_769)}, "32769 blocks in a request, the maximum is 32768"),
    ("lookup", {"hashes": CHAIN, "deadline_ms": -1}, "'deadline_ms' must be an integer 0 to"),
    ("lookup", {"hashes": CHAIN, "deadline_ms": 1 << 40}, "'deadline_ms' must be an integer 0 to"),
    ("store", {"hashes": CHAIN[:31]}, "in multiples of 32, not 31"),
    ("store", {"hashes": bytes(32 * 32_769)}, "the maximum is 32768"),
    ("prefetch", {"hashes": None}, "'hashes' is missing"),
    ("load", {"lease": 1, "first": 0}, "'count' is missing"),
    ("load", {"lease": 1, "first": -1, "count": 1}, "'first' must be an integer 0 to"),
    ("load", {"lease": 1, "first": 0, "count": 0}, "'count' must be an integer 1 to"),
    ("load", {"lease": 1, "first": 1 << 32, "count": 1}, "'first' must be an integer 0 to"),
    ("load", {"lease": True, "first": 0, "count": 1}, "'lease' must be int, not bool"),
    ("load", {"lease": 1.0, "first": 0, "count": 1}, "'lease' must be int, not float"),
    ("commit", {"lease": -1}, "'lease' must be an integer 0 to"),
    ("commit", {"lease": 1, "count": 1 << 33}, "'count' must be an integer 0 to"),
    ("abort", {}, "'lease' is missing"),
    ("release", {"lease": "1"}, "'lease' must be int, not str"),
    ("detached", {"segments": []}, "'segments' must be of length 1"),
    ("steal", {}, "'steal' is unknown on this socket; known are hello"),
    ("status", {}, "'status' is unknown on this socket"),
    ("drain", {}, "'drain' is unknown on this socket"),
]


@pytest.mark.parametrize(("verb", "arguments", "says"), BAD_ARGUMENTS)
def test_a_wrong_argument_is_named_and_the_connection_goes_on(
    served: Daemon, verb: str, arguments: dict[str, Any], says: str
) -> None:
    """The message names verb, argument and both values; the next request is answered."""
    with served.peer() as wire:
        with pytest.raises(Invalid, match=f"(?s){verb}|blocks in a request") as refused:
            wire.ask(verb, **arguments)
        assert says in str(refused.value)
        assert wire.ask("stats")["blocks"] == 0


def test_a_verb_that_is_no_string_is_refused(served: Daemon) -> None:
    """Nor is one that is missing."""
    with served.peer() as wire:
        for verb in (None, 7, b"lookup", ["lookup"], {"lookup": 1}, "x" * 10_000):
            with pytest.raises(Invalid, match="is unknown on this socket") as refused:
                wire.ask(verb)  # type: ignore[arg-type]
            assert len(str(refused.value)) < 400


@pytest.mark.parametrize("number", [-1, 1 << 32, "1", 1.5, None, [1]])
def test_an_id_that_is_none_is_answered_under_zero(served: Daemon, number: Any) -> None:
    """A reply to a wrong id goes to the connection as such; None is `no reply wanted`."""
    with served.peer() as wire:
        wire.send(id=number, verb="stats")
        if number is not None:
            message = wire.receive()
            assert (message["id"], message["error"]) == (0, "invalid")
            assert "'id' must be" in message["message"]
        assert wire.ask("stats")["ok"] is True


@pytest.mark.parametrize(
    "verb", ["lookup", "load", "release", "store", "commit", "abort", "prefetch", "detached", "bye", "stats"]
)
def test_verbs_before_hello_are_refused(served: Daemon, verb: str) -> None:
    """The message says which verbs may come first."""
    arguments: dict[str, Any] = {
        "lookup": {"hashes": CHAIN},
        "store": {"hashes": CHAIN},
        "prefetch": {"hashes": CHAIN},
        "load": {"lease": 1, "first": 0, "count": 1},
        "detached": {"segments": [bytes(16)]},
        "bye": {},
        "stats": {},
    }.get(verb, {"lease": 1})
    with Wire(served.socket) as wire:
        with pytest.raises(Invalid, match="must be one of hello, resume, events"):
            wire.ask(verb, **arguments)
        wire.hello()


BAD_LAYOUTS: list[tuple[Any, str]] = [
    (LAYOUT.to_map() | {"layers": 2}, "is not that of the layout sent"),
    (LAYOUT.to_map() | {"dtype": "complex64"}, "dtype 'complex64' is not one of float32"),
    (LAYOUT.to_map() | {"layers": 0}, "layers must be an integer from 1"),
    (LAYOUT.to_map() | {"layers": 1 << 62}, "layers must be an integer from 1"),
    (LAYOUT.to_map() | {"layers": (1 << 31) - 1, "head_dim": (1 << 31) - 1}, "over the maximum of"),
    (LAYOUT.to_map() | {"layers": "1"}, "layers must be an integer from 1"),
    (LAYOUT.to_map() | {"colour": "red"}, "unknown key 'colour'"),
    ({"layers": 1}, "is missing"),
    ([1, 2, 3], "'layout' must be dict, not list"),
]


@pytest.mark.parametrize(("layout", "says"), BAD_LAYOUTS)
def test_a_layout_that_cannot_be_is_refused(served: Daemon, layout: Any, says: str) -> None:
    """Impossible, huge, or another than its fingerprint says: no session, no namespace."""
    before = len(served.status()["namespaces"])
    with Wire(served.socket) as wire:
        with pytest.raises(Invalid) as refused:
            wire.hello(layout=layout)
        assert says in str(refused.value)
    assert len(served.status()["namespaces"]) == before


def test_a_block_that_no_segment_can_hold_is_refused_with_the_remedy(served: Daemon) -> None:
    """The message has both sizes and says which setting to raise."""
    huge = Layout(layers=1000, kv_heads=64, head_dim=256, dtype="float16")
    before = len(served.status()["namespaces"])
    with Wire(served.socket) as wire, pytest.raises(Invalid, match=r"cannot hold one block of 1048576000 .*raise"):
        wire.hello(layout=huge.to_map(), fingerprint=huge.fingerprint)
    assert len(served.status()["namespaces"]) == before


BAD_HELLOS: list[tuple[dict[str, Any], str]] = [
    ({"version": 2}, "protocol version 2 is not 1"),
    ({"version": None}, "'version' is missing"),
    ({"model": ""}, "'model' must be a string of length 1"),
    ({"model": "m" * 1025}, "'model' must be a string of length 1 to 1024, not 1025"),
    ({"model": "\u00e4" * 1024}, "1 to 1,024 bytes"),
    ({"client": "c" * 2000}, "'client' must be a string"),
    ({"domain": ""}, "'domain' must be a string of length 1"),
    ({"fingerprint": b"short"}, "'fingerprint' must be bytes of length 16, not 5"),
]


@pytest.mark.parametrize(("changes", "says"), BAD_HELLOS)
def test_a_wrong_hello_opens_no_session(served: Daemon, changes: dict[str, Any], says: str) -> None:
    """The peer may try again on the same connection."""
    with Wire(served.socket) as wire:
        with pytest.raises(Invalid) as refused:
            wire.hello(**changes)
        assert says in str(refused.value)
        assert served.status()["sessions"] == 0
        wire.hello()


def test_a_second_hello_is_refused(served: Daemon) -> None:
    """A connection belongs to one session."""
    with served.peer() as wire, pytest.raises(Invalid, match="was opened by 'hello' before; open another one"):
        wire.hello(model="other")


def test_a_session_cannot_be_guessed(served: Daemon) -> None:
    """resume and events with a wrong session, token or namespace find nothing, and the session stays its owner's."""
    with served.peer() as owner:
        proof = {name: owner.welcome[name] for name in ("session", "token", "namespace")}
        for changed in ({"token": bytes(16)}, {"session": 1}, {"session": (1 << 64) - 1}, {"namespace": bytes(32)}):
            with Wire(served.socket) as thief, pytest.raises(Gone, match="say hello"):
                thief.ask("resume", version=1, held=b"", **(proof | changed))
        for changed in ({"token": bytes(16)}, {"session": 1}):
            with Wire(served.socket) as thief, pytest.raises(Gone, match="say hello first"):
                thief.ask("events", **{name: (proof | changed)[name] for name in ("session", "token")})
        assert owner.ask("stats")["ok"] is True


def test_held_records_that_cannot_be_are_refused(served: Daemon) -> None:
    """resume with slots of wrong kind, outside of the segment, or never told, changes nothing for the session."""
    with served.peer() as owner:
        lease, slots = owner.place(CHAIN)
        names = ("version", "session", "token", "namespace")
        proof = {name: owner.welcome[name] for name in names}
        never_told = max(slots.tolist()) + 1
        bad = {
            "must be 1 (reading) or 2 (writing), not 9": owner.held([slots[0]], 9),
            "is not in a segment": owner.segment_ids[0] + (1 << 31).to_bytes(4, "little") + (1).to_bytes(4, "little"),
            "never told": owner.held([never_told], 1),
            "in multiples of 24": b"x" * 25,
        }
        for says, held in bad.items():
            with Wire(served.socket) as again, pytest.raises(Invalid) as refused:
                again.ask("resume", **proof, held=held)
            assert says in str(refused.value)
        assert owner.ask("commit", lease=lease)["committed"] == 8


@pytest.mark.parametrize("verb", ["load", "release", "commit", "abort"])
def test_nobody_uses_a_lease_that_is_not_theirs(served: Daemon, verb: str) -> None:
    """Unknown leases, another session's and another namespace's are refused, and stay whole for their owner."""
    model = f"leases {verb}"
    with served.peer(model=model) as owner, served.peer(model=model) as same, served.peer(model="x") as other:
        owner.store(CHAIN)
        reading = owner.lookup(CHAIN)["lease"]
        writing, _ = owner.place(hashes_of(2, 4))
        more = {"first": 0, "count": 1} if verb == "load" else {}
        for wire in (same, other):
            for lease in (reading, writing, 0, 12345, (1 << 64) - 1):
                with pytest.raises((Invalid, Gone)) as refused:
                    wire.ask(verb, lease=lease, **more)
                assert str(lease) in str(refused.value)
        wrong_kind = writing if verb in ("load", "release") else reading
        with pytest.raises((Invalid, Gone)):
            owner.ask(verb, lease=wrong_kind, **more)
        assert len(owner.ask("load", lease=reading, first=0, count=8)["slots"]) == 32
        assert owner.ask("commit", lease=writing)["committed"] == 4
        owner.ask("release", lease=reading)
        for lease in (reading, writing):
            with pytest.raises((Invalid, Gone)):
                owner.ask(verb, lease=lease, **more)


def test_ranges_outside_of_a_lease_are_refused(served: Daemon) -> None:
    """load, release and commit with counts beyond the lease say how long it is; nothing is lost by it."""
    with served.peer(model="ranges") as wire:
        wire.store(CHAIN)
        reading = wire.lookup(CHAIN)["lease"]
        with pytest.raises(Invalid, match="not in a lease of 8"):
            wire.ask("load", lease=reading, first=8, count=1)
        with pytest.raises(Invalid, match="not in a lease of 8"):
            wire.ask("release", lease=reading, first=9, count=2)
        wire.ask("release", lease=reading, first=0, count=4)
        with pytest.raises(Invalid, match="released before"):
            wire.ask("load", lease=reading, first=2, count=1)
        writing, _ = wire.place(hashes_of(3, 4))
        with pytest.raises(Invalid, match="5 blocks of a lease of 4"):
            wire.ask("commit", lease=writing, count=5)
        assert wire.ask("commit", lease=writing, count=4) | {"id": 0} == {
            "id": 0,
            "ok": True,
            "committed": 4,
            "dropped": 0,
        }
        wire.ask("release", lease=reading)


def test_an_unknown_parent_is_gone(served: Daemon) -> None:
    """A store in the middle of a chain that is not here says to store it from its root."""
    with served.peer() as wire:
        with pytest.raises(Gone, match="store the chain from its root"):
            wire.ask("store", hashes=CHAIN, parent=hashes_of(99, 1))
        assert wire.lookup(CHAIN, hashes_of(99, 1))["tiers"]["miss"] == 8
        assert wire.ask("prefetch", hashes=CHAIN, parent=hashes_of(99, 1))["blocks"] == 0


def test_a_hash_that_is_there_twice_is_refused(served: Daemon) -> None:
    """A chain cannot contain a block twice, nor the root itself."""
    with served.peer(model="twice") as wire:
        for nonsense in (CHAIN[:32] * 4, CHAIN + CHAIN, CHAIN[:64] + CHAIN[:32], CHAIN[:32] + ROOT):
            with pytest.raises(Invalid, match="is there twice, or is all zeros"):
                wire.ask("store", hashes=nonsense)
        assert wire.store(CHAIN) == 8
        assert wire.lookup(CHAIN + CHAIN)["tiers"] | {"cpu": 0} == dict.fromkeys(TIERS, 0) | {"miss": 8}


def test_the_admin_socket_is_as_hard(served: Daemon) -> None:
    """Garbage and data verbs on it are refused; status goes on."""
    with Wire(served.admin) as admin:
        for verb in ("hello", "lookup", "store", "bye"):
            with pytest.raises(Invalid, match="known are status, sync, drain"):
                admin.ask(verb)
        with pytest.raises(Invalid, match="'deadline_ms' must be"):
            admin.ask("sync", deadline_ms="soon")
        admin.socket.sendall(framed(b"\xc1"))
        assert admin.receive()["error"] == "invalid"
    assert served.status()["ok"] is True


def test_a_peer_that_never_reads_is_closed(served: Daemon) -> None:
    """Answers that nobody takes are kept up to a limit, and then the connection ends; memory does not grow."""
    with served.peer(model="deaf") as deaf:
        deaf.store(hashes_of(5, 2000))
        request = encode({"id": 1, "verb": "lookup", "hashes": hashes_of(5, 2000)})
        deaf.socket.settimeout(10)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(20_000):
                deaf.socket.sendall(request)
        again, lease = deaf.resume()
        assert lease == 0
        again.close()


def test_too_many_requests_that_wait_are_busy(start: Start) -> None:
    """A connection has at most 256 requests under way that wait for something; more are refused at once."""
    daemon = start(nvme_bytes=0, cpu_bytes="256KiB", limits_wait_seconds_max=30)
    with daemon.peer(model="a") as first, daemon.peer(model="b") as second:
        first.place(hashes_of(1, 50))
        numbers = [second.request("store", hashes=hashes_of(2, 1)) for _ in range(300)]
        with pytest.raises(Busy, match="256 requests of this connection wait"):
            second.reply(numbers[-1])


def test_errors_are_counted_by_verb_and_kind(served: Daemon) -> None:
    """A client that sends nonsense shows in the metrics."""
    name = 'tierd_request_errors_total{error="gone",verb="store"}'
    before = served.metrics().get(name, 0)
    with served.peer() as wire, pytest.raises(TierdError):
        wire.ask("store", hashes=CHAIN, parent=hashes_of(98, 1))
    assert served.metrics()[name] == before + 1
