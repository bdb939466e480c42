"""One socket to the daemon, used by several threads at once, each waiting for its own reply.

There is no reader thread. Of the threads that wait, one reads and hands the others their replies; when it has its
own, the next one reads. Pushes and descriptors are handled by whoever reads, in the order in which they came. A
connection that failed once stays broken.
"""

from __future__ import annotations

import array
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Condition, Lock
from typing import Any

from tierd.clock import monotonic_seconds
from tierd.errors import Busy, Closed, Invalid, TierdError
from tierd.wire.framing import FrameReader, decode, frame
from tierd.wire.messages import REPLIES, U32_MAX, check_values, error_of

SOCKET_BUFFER_BYTES = 1 << 20
FRAME_BYTES_MAX = 64 << 20
DESCRIPTORS_PER_FRAME_MAX = 253
ANCILLARY_BYTES = socket.CMSG_SPACE(DESCRIPTORS_PER_FRAME_MAX * array.array("i").itemsize)
UNANSWERED_MAX = 1024
SPIN_SECONDS = 200e-6
"""Sleeping and being woken costs some 60 us on a virtual machine, half of a short lookup: so a wait begins by looking."""
DAEMON_SHARE = 0.9
"""The daemon's part of a request's deadline; the rest is for the way."""

OnPush = Callable[["Connection", dict[str, Any], deque[int]], None]


class NoAnswer(Busy):
    """The daemon is there and does not answer in time."""


class Ticket:
    """A request under way. `undo` is the verb that ends the lease in its reply if nobody waits for that any more."""

    __slots__ = ("abandoned", "id", "reply", "undo", "verb")

    def __init__(self, verb: str, undo: str | None) -> None:
        self.id = 0
        self.verb = verb
        self.undo = undo
        self.reply: dict[str, Any] | None = None
        self.abandoned = False


class Connection:
    """A connected socket. `on_push(connection, message, descriptors)` gets pushes and takes their descriptors."""

    def __init__(self, connected: socket.socket, on_push: OnPush) -> None:
        connected.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connected.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        self._socket = connected
        self._on_push = on_push
        self._reader = FrameReader(FRAME_BYTES_MAX)
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)
        self._descriptors: deque[int] = deque()
        self._tickets: dict[int, Ticket] = {}
        self._last_id = 0
        self._reading = False
        self._broken: str | None = None
        self._refusal: str | None = None
        self._sending = Lock()
        self._unsent: list[bytes] = []
        """Frames that go with the next one; guarded by `_sending`."""
        self._changed = Condition(Lock())
        """Guards tickets, `_reading` and `_broken`; notified when one of them changed."""

    def __repr__(self) -> str:
        state = f"broken: {self._broken}" if self._broken else f"{len(self._tickets)} requests unanswered"
        return f"<Connection {state}>"

    @classmethod
    def open(cls, path: Path, on_push: OnPush, seconds: float) -> Connection:
        """Connect; raises Closed when nobody listens."""
        try:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise Closed(f"no socket can be made: {error.strerror or error}") from error
        connected.settimeout(seconds)
        try:
            connected.connect(str(path))
        except OSError as error:
            connected.close()
            raise Closed(f"no daemon on {path}: {error.strerror or error}") from error
        return cls(connected, on_push)

    @property
    def alive(self) -> bool:
        """False once it failed or was closed."""
        return self._broken is None

    def request(self, verb: str, arguments: dict[str, Any], seconds: float, undo: str | None = None) -> dict[str, Any]:
        """Ask and wait; returns the checked reply or raises the error it carries, NoAnswer or Closed."""
        return self.wait(self.ask(verb, arguments, seconds, undo), seconds)

    def ask(self, verb: str, arguments: dict[str, Any], seconds: float, undo: str | None = None, later: bool = False) -> Ticket:
        """Send a request, to be waited for or abandoned later; `later` means with the next one, or when it is waited for.

        Waking the daemon costs a system call that may take as long as copying a block.
        """
        ticket = Ticket(verb, undo)
        with self._changed:
            if len(self._tickets) >= UNANSWERED_MAX:
                raise NoAnswer(f"{verb}: {UNANSWERED_MAX} requests were not answered yet")
            ticket.id = self._last_id = self._last_id % U32_MAX + 1
            self._tickets[ticket.id] = ticket
        milliseconds = int(seconds * DAEMON_SHARE * 1000)
        try:
            self._send({"id": ticket.id, "verb": verb, "deadline_ms": milliseconds, **arguments}, seconds, later)
        except TierdError:
            with self._changed:
                self._tickets.pop(ticket.id, None)
            raise
        return ticket

    def wait(self, ticket: Ticket, seconds: float) -> dict[str, Any]:
        """The checked reply; raises the error it carries, NoAnswer after `seconds`, Closed without a connection."""
        deadline = monotonic_seconds() + seconds
        if self._unsent and ticket.reply is None:
            self.listen(0)  # as long as answers are there, what was kept can wait for the next request
            if ticket.reply is None:
                self.flush(seconds)
        while self._my_turn(ticket, deadline):
            self._read(deadline - monotonic_seconds())
        if ticket.reply is None:
            self.abandon(ticket)
            raise NoAnswer(f"{ticket.verb}: the daemon did not answer within {round(seconds, 3):g} s")
        return self._checked(ticket)

    def answer(self, ticket: Ticket) -> dict[str, Any] | None:
        """The checked reply if it has come (see `listen`), else None; raises the error it carries."""
        return self._checked(ticket) if ticket.reply is not None else None

    def _my_turn(self, ticket: Ticket, deadline: float) -> bool:
        """Wait until this thread should read; False when the reply is there, or nothing until the deadline."""
        with self._changed:
            while ticket.reply is None:
                if self._broken is not None:
                    raise Closed(self._broken)
                left = deadline - monotonic_seconds()
                if left <= 0:
                    return False
                if not self._reading:
                    self._reading = True
                    return True
                self._changed.wait(left)
            return False

    def abandon(self, ticket: Ticket) -> None:
        """Nobody waits for this reply any more; a lease in it is ended when it comes."""
        with self._changed:
            ticket.abandoned = True
            reply = ticket.reply
        if reply is not None:
            self._undo(ticket, reply)

    def flush(self, seconds: float) -> None:
        """Send what was kept for later; raises as `ask` does."""
        if self._unsent:
            self._send(None, seconds)

    def tell(self, verb: str, arguments: dict[str, Any], seconds: float = 1.0) -> None:
        """Send a request that wants no reply. Never raises: a connection that cannot take it is closed instead."""
        try:
            self._send({"verb": verb, **arguments}, seconds)
        except NoAnswer as error:
            self.close(str(error))
        except TierdError:
            pass

    def listen(self, seconds: float) -> bool:
        """Read what comes unasked, for at most `seconds`, unless another thread reads; returns whether anything came, but
        perhaps not all that did: what comes with descriptors ends a read. Raises Closed when lost.
        """
        came = False
        with self._changed:
            reads = not self._reading and self._broken is None
            self._reading = self._reading or reads
        if reads:
            came = self._read(seconds)
        if self._broken is not None:
            raise Closed(self._broken)
        return came

    def close(self, reason: str = "closed by this client") -> None:
        """Break the connection; whoever waits on it is told."""
        with self._changed:
            if self._broken is None:
                self._broken = reason
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()
        self._dispose()

    def _dispose(self) -> None:
        """Close what a broken connection has, as soon as no thread uses it."""
        with self._changed:
            if self._broken is None or self._reading or not self._sending.acquire(blocking=False):
                return
            self._socket.close()
            while self._descriptors:
                os.close(self._descriptors.popleft())
            self._sending.release()

    def _send(self, message: dict[str, Any] | None, seconds: float, later: bool = False) -> None:
        """Send a message behind those that were kept for later, or keep it too; None: only those."""
        if not self._sending.acquire(timeout=max(seconds, 0)):
            raise NoAnswer(f"the daemon took nothing for {seconds:g} s")
        kept = self._unsent
        parts = [*kept, *frame(message)] if message is not None else kept
        self._unsent = parts if later else []
        if later:
            self._sending.release()
            return
        lost = None
        try:
            if self._broken is not None:
                raise Closed(self._broken)
            sent = send_some(self._socket, parts)
            if sent < sum(map(len, parts)):
                self._send_rest(b"".join(parts), sent, seconds)
        except NoAnswer:
            self._unsent = kept  # nothing of it was sent
            raise
        except OSError as error:
            lost = f"lost the daemon: {error.strerror or error}"
        finally:
            self._sending.release()
            if lost or self._broken is not None:
                self.close(lost or "")
        if lost:
            raise Closed(lost)

    def _send_rest(self, data: bytes, sent: int, seconds: float) -> None:
        deadline = monotonic_seconds() + seconds
        room = select.poll()
        room.register(self._socket, select.POLLOUT)
        while sent < len(data):
            if not room.poll(max(0.0, deadline - monotonic_seconds()) * 1000):
                if sent:  # the rest can never follow, so nothing else can
                    raise TimeoutError(f"{sent} of {len(data)} bytes sent in {seconds:g} s")
                raise NoAnswer(f"the daemon took nothing for {seconds:g} s")
            sent += send_some(self._socket, [memoryview(data)[sent:]])

    def _read(self, seconds: float) -> bool:
        """Read once, as the only thread that does; leaves with `_reading` cleared and everybody told."""
        lost, came = None, False
        try:
            came = self._spin(seconds) or bool(self._poll.poll(max(seconds, 0) * 1000) and self._receive())
        except (OSError, TierdError) as error:
            lost = str(error) or repr(error)
        finally:
            with self._changed:
                self._reading = False
                self._changed.notify_all()
            if lost or self._broken is not None:
                self.close(lost or "")
        return came

    def _spin(self, seconds: float) -> bool:
        """Look for an answer again and again for as long as waking up would take; returns whether there was one."""
        end = monotonic_seconds() + min(seconds, SPIN_SECONDS)
        while not self._receive():
            if monotonic_seconds() >= end:
                return False
            os.sched_yield()
        return True

    def _receive(self) -> bool:
        """Take what has arrived; returns whether that was anything."""
        try:
            received, ancillary, flags, _ = self._socket.recvmsg_into(
                [self._reader.buffer()], ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return False
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors.extend(array.array("i", data[: len(data) // 4 * 4]))
        if flags & socket.MSG_CTRUNC:
            raise Closed("descriptors were lost on the way: raise this process's limit of open files")
        if not received:
            raise Closed(self._refusal or "the daemon closed the connection")
        self._reader.feed(received)
        for payload in self._reader:
            self._dispatch(decode(payload))
        return True

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "push" in message:
            self._on_push(self, message, self._descriptors)
            return
        with self._changed:
            ticket = self._tickets.pop(message.get("id") or 0, None)
            if ticket is not None:
                ticket.reply = message
        if ticket is None:
            self._refusal = str(error_of(message))  # of the connection, which ends then, or of what was told and not asked
        elif ticket.abandoned:
            self._undo(ticket, message)

    def _undo(self, ticket: Ticket, reply: dict[str, Any]) -> None:
        if ticket.undo and reply.get("lease"):
            self.tell(ticket.undo, {"lease": reply["lease"]})

    def _checked(self, ticket: Ticket) -> dict[str, Any]:
        assert ticket.reply is not None
        if ticket.reply.get("ok") is not True:
            raise error_of(ticket.reply)
        try:
            check_values(f"reply to {ticket.verb}", ticket.reply, REPLIES.get(ticket.verb, {}))
        except Invalid as error:
            self.close(str(error))
            raise Closed(f"the daemon does not speak this protocol: {error}") from error
        return ticket.reply


def send_some(connected: socket.socket, parts: Any) -> int:
    """Send what fits now; 0 when nothing does."""
    try:
        return connected.sendmsg(parts)
    except (BlockingIOError, InterruptedError):
        return 0
