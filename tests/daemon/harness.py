"""A real daemon in a process of its own, and raw peers that say to it whatever they like."""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from http.client import HTTPConnection
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.block import ROOT, chain
from tierd.clock import monotonic_seconds
from tierd.errors import Gone
from tierd.layout import Layout
from tierd.tiers.segment import Geometry
from tierd.wire.framing import decode, encode
from tierd.wire.messages import error_of, unpack_slots

LAYOUT = Layout(layers=1, kv_heads=1, head_dim=64, dtype="float16")
SEGMENT_BYTES = 256 << 10
SLOTS = Geometry.fit(LAYOUT, SEGMENT_BYTES).slot_count
"""Of one segment, in either tier."""
GREETING = {
    "version": 1,
    "model": "model",
    "layout": LAYOUT.to_map(),
    "fingerprint": LAYOUT.fingerprint,
    "client": "test",
}
"""What a `hello` says."""
READY_SECONDS_MAX = 20.0
ANSWER_SECONDS_MAX = 20.0
POLL_SECONDS = 0.005
CAN_CONTAIN = subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True, check=False).returncode == 0
"""Whether a PID namespace can be made here."""


def settings(**values: Any) -> list[str]:
    """Flags that set configuration: `settings(cpu_bytes=1)` is `--set cpu.bytes=1`."""
    return [part for name, value in values.items() for part in ("--set", f"{name.replace('_', '.', 1)}={value}")]


def hashes_of(seed: int, blocks: int, parent: bytes = ROOT) -> bytes:
    """Packed hashes of a chain of blocks of one token each that no other seed has."""
    return chain([seed * 1_000_000 + at for at in range(blocks)], 1, parent)


def payload_of(block: bytes, model: str = "model") -> NDArray[np.uint8]:
    """The bytes that tests store under a hash: they follow from it and the model, so a wrong byte shows anywhere."""
    word = sha256(block + model.encode()).digest()
    return np.frombuffer(word * (LAYOUT.block_bytes // len(word)), np.uint8)


class Daemon:
    """`tierd serve` in `folder`, whose runtime and state directories stay there from one life to the next."""

    serve: Sequence[str] = ("tierd", "serve")
    """Module and arguments."""

    def __init__(self, folder: Path, flags: Sequence[str] = (), held: bool = False, **environ: str) -> None:
        self.folder, self.flags, self.held = folder, list(flags), held
        self.runtime, self.state = folder / "run", folder / "state"
        self.socket, self.admin = self.runtime / "tierd.sock", self.runtime / "admin.sock"
        self.log_file = folder / "log"
        self._environ = os.environ | environ
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process that was started: the holder where there is one."""
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """What all lives have logged so far."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def command(self) -> list[str]:
        """The command line."""
        serve = [
            sys.executable,
            "-m",
            *self.serve,
            "--runtime-dir",
            f"{self.runtime}",
            "--state-dir",
            f"{self.state}",
        ]
        serve += ["--set", "metrics.listen=127.0.0.1:0", *self.flags]
        return [sys.executable, "-m", "tierd", "hold", "--", *serve] if self.held else serve

    def spawn(self) -> None:
        """Start the process, and do not wait for it."""
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(self.command(), env=self._environ, stdout=log, stderr=log)

    def start(self) -> Daemon:
        """Start it, and wait until it serves."""
        self.spawn()
        self.wait_ready()
        return self

    def wait_ready(self, not_pid: int = 0) -> None:
        """Wait until a daemon (of another pid than `not_pid`) serves."""
        deadline = monotonic_seconds() + READY_SECONDS_MAX
        assert self.process is not None
        death = os.pidfd_open(self.process.pid)
        try:
            while not self._serves(not_pid):
                assert monotonic_seconds() < deadline, f"not ready in {READY_SECONDS_MAX} s:\n{self.log}"
                assert not readable(death, POLL_SECONDS), f"the daemon has ended:\n{self.log}"
        finally:
            os.close(death)

    def _serves(self, not_pid: int) -> bool:
        try:
            with Wire(self.admin) as admin:
                if admin.ask("status")["pid"] == not_pid:
                    return False
            Wire(self.socket).close()
        except OSError:
            return False
        return True

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(READY_SECONDS_MAX)

    def kill(self) -> None:
        """kill -9; with a holder, the daemon alone, and wait for the next one."""
        if not self.held:
            self.stop(signal.SIGKILL)
            return
        pid = self.status()["pid"]
        os.kill(pid, signal.SIGKILL)
        self.wait_ready(not_pid=pid)

    def end(self) -> None:
        """Make sure that nothing is left of it."""
        if self.process is not None and self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.stop(signal.SIGKILL)

    def peer(self, **hello: Any) -> Wire:
        """A connection that said hello."""
        wire = Wire(self.socket)
        wire.hello(**hello)
        return wire

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """One admin request."""
        with Wire(self.admin) as admin:
            return admin.ask(verb, **arguments)

    def status(self) -> dict[str, Any]:
        """The admin socket's `status`."""
        return self.ask("status")

    def slots(self, tier: str) -> dict[str, int]:
        """Slots of a tier by state."""
        found: dict[str, int] = self.status()["tiers"][tier]["slots"]
        return found

    def wait_until(self, so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until a condition on `status` is true; returns that status."""
        deadline = monotonic_seconds() + ANSWER_SECONDS_MAX
        while not so(status := self.status()):
            assert monotonic_seconds() < deadline, f"it is still not so: {json.dumps(status, indent=1)}"
            select.select([], [], [], POLL_SECONDS)
        return status

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an HTTP request to the exporter."""
        host, _, port = self.status()["metrics"].rpartition(":")
        return http_get(host, int(port), path)

    def metrics(self) -> dict[str, float]:
        """Every sample of `/metrics` by its name with labels, as Prometheus prints it."""
        _, text = self.get("/metrics")
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A tierd command for this daemon."""
        command = [sys.executable, "-m", "tierd", *arguments, "--runtime-dir", str(self.runtime)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)


class Wire:
    """One raw connection. Pushes are noted as they come; segments that come with them are mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(ANSWER_SECONDS_MAX)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.model = ""
        self.welcome: dict[str, Any] = {}
        self.segments: dict[int, mmap.mmap] = {}
        self.segment_ids: dict[int, bytes] = {}
        self.pushed: list[dict[str, Any]] = []
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._ids = 0

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the session, in whatever state the connection is, and close."""
        self.close()
        if self.welcome:
            with suppress(Gone, OSError, EOFError):
                again, _ = self.resume()
                again.ask("bye")
                again.close()

    def close(self) -> None:
        """Lose the connection; the session is not ended by that."""
        self.socket.close()

    def send(self, **message: Any) -> None:
        """Send one frame."""
        self.socket.sendall(encode(message))

    def receive(self) -> dict[str, Any]:
        """The next message that is no push; raises EOFError when the connection ended."""
        while True:
            message = self._frame()
            if "push" not in message:
                return message
            self.pushed.append(message)
            if message["push"] == "attach":
                for entry in message["segments"]:
                    self._map(entry)

    def reply(self, number: int) -> dict[str, Any]:
        """The reply to a request, whatever else arrives before it; raises the error that it carries."""
        while True:
            message = self.receive()
            if message["id"] in (number, 0):
                break
        if message["ok"] is not True:
            raise error_of(message)
        return message

    def request(self, verb: str, **arguments: Any) -> int:
        """Send a request; returns its id."""
        self._ids += 1
        self.send(id=self._ids, verb=verb, **arguments)
        return self._ids

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Request and reply."""
        return self.reply(self.request(verb, **arguments))

    def hello(self, **changes: Any) -> dict[str, Any]:
        """Say hello as LAYOUT's client, with some arguments changed (None: left out)."""
        arguments = GREETING | changes
        self.model = arguments["model"]
        self.welcome = self.ask("hello", **{name: value for name, value in arguments.items() if value is not None})
        return self.welcome

    def resume(self, held: bytes = b"") -> tuple[Wire, int]:
        """The session on a new connection, and the lease on what it still holds."""
        wire = Wire(self.path)
        names = ("version", "session", "token", "namespace")
        welcome = wire.ask("resume", **{name: self.welcome[name] for name in names}, held=held, client="resumed")
        wire.welcome, wire.model = welcome, self.model
        return wire, welcome["lease"]

    # -- blocks: what a client does -----------------------------------------------------------------------------------

    def place(self, hashes: bytes, parent: bytes = ROOT) -> tuple[int, NDArray[np.int32]]:
        """`store`, and write the payloads; returns the lease and the answer per block."""
        reply = self.ask("store", hashes=hashes, parent=parent)
        slots = unpack_slots(reply["slots"])
        for at, slot in enumerate(slots.tolist()):
            if slot >= 0:
                self.slot(slot)[:] = payload_of(hashes[at * 32 : at * 32 + 32], self.model)
        return reply["lease"], slots

    def store(self, hashes: bytes, parent: bytes = ROOT) -> int:
        """Store blocks; returns how many were new and are committed."""
        lease, _ = self.place(hashes, parent)
        return int(self.ask("commit", lease=lease)["committed"]) if lease else 0

    def lookup(self, hashes: bytes, parent: bytes = ROOT) -> dict[str, Any]:
        """`lookup`, whose attribution must sum to the blocks asked for."""
        reply = self.ask("lookup", hashes=hashes, parent=parent)
        assert sum(reply["tiers"].values()) == len(hashes) // 32
        assert len(reply["slots"]) == 4 * reply["told"] <= 4 * reply["blocks"]
        return reply

    def load(self, hashes: bytes, parent: bytes = ROOT) -> int:
        """Look up and read in windows, each released when it was read; returns how many blocks had their bytes."""
        reply = self.lookup(hashes, parent)
        if not reply["lease"]:
            return 0
        at = self.read(hashes, 0, reply["slots"])
        while at < reply["blocks"]:
            if at:
                self.send(verb="release", lease=reply["lease"], first=0, count=at)
            window = self.ask("load", lease=reply["lease"], first=at, count=reply["blocks"] - at)
            assert window["first"] == at
            at += self.read(hashes, at, window["slots"])
        self.ask("release", lease=reply["lease"])
        return at

    def read(self, hashes: bytes, first: int, slots: bytes) -> int:
        """Check the bytes in the slots of the blocks from `first`; returns how many slots there are."""
        for at, slot in enumerate(unpack_slots(slots).tolist(), first):
            assert (self.slot(slot) == payload_of(hashes[at * 32 : at * 32 + 32], self.model)).all(), (
                f"wrong bytes in block {at}"
            )
        return len(slots) // 4

    def slot(self, number: int) -> NDArray[np.uint8]:
        """The payload of a slot, to read and to write."""
        ordinal, index = divmod(number, self.welcome["slots_per_segment"])
        start = index * self.welcome["slot_bytes"]
        return np.frombuffer(self.segments[ordinal], np.uint8)[start : start + self.welcome["block_bytes"]]

    def held(self, slots: Sequence[int], kind: int) -> bytes:
        """Records of `resume`'s `held` for slot numbers."""
        records = (divmod(slot, self.welcome["slots_per_segment"]) for slot in slots)
        return b"".join(pack("<16sII", self.segment_ids[ordinal], index, kind) for ordinal, index in records)

    # -- bytes --------------------------------------------------------------------------------------------------------

    def _frame(self) -> dict[str, Any]:
        length = int.from_bytes(self._take(4), "little")
        return decode(self._take(length))

    def _take(self, count: int) -> bytes:
        while len(self._received) < count:
            data, descriptors, flags, _ = socket.recv_fds(self.socket, 1 << 18, 253)
            self._descriptors.extend(descriptors)
            assert not flags & socket.MSG_CTRUNC
            if not data:
                raise EOFError("the daemon closed the connection")
            self._received += data
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken

    def _map(self, entry: dict[str, Any]) -> None:
        directory, slots = self._descriptors.popleft(), self._descriptors.popleft()
        os.close(directory)
        self.segments[entry["ordinal"]] = mmap.mmap(slots, entry["slots_bytes"])
        self.segment_ids[entry["ordinal"]] = entry["segment"]
        os.close(slots)


def readable(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read within that time."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def http_get(host: str, port: int, path: str) -> tuple[int, str]:
    """Status and body of one HTTP request."""
    connection = HTTPConnection(host, port, timeout=ANSWER_SECONDS_MAX)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
