"""The daemon's end of the sockets: accepts peers, cuts frames, asks the handler, sends replies and descriptors.

One callback per wake-up reads what is there and answers every complete frame at once; only an answer that has to be
waited for costs a task. Rule of this file: a peer can end its own connection by what it sends or does not read, and can do
nothing to the others.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from tierd import audit
from tierd.errors import Busy, Closed, Denied, Invalid, TierdError
from tierd.linger import Linger
from tierd.listening import BACKLOG, listen, taken_over
from tierd.log import get_logger
from tierd.wire.framing import FrameReader, after, decode, frame
from tierd.wire.messages import ADMIN, DATA, OPENING, Answer, Answering, Reply, Request, check, failure, request_id
from tierd.wire.peer import Peer, peer_of

SOCKET_BUFFER_BYTES = 1 << 20
ACCEPT_PAUSE_SECONDS = 1.0
REQUESTS_WAITING_MAX = 256
"""Requests of one connection that wait for something; one more is answered busy."""
CONNECTIONS_PER_SESSION = 2
FRAMES_PER_TURN = 64
"""Frames of one connection that are answered before other connections get their turn."""
DESCRIPTORS_PER_FRAME_MAX = 253

log = get_logger("server")


class Limits(Protocol):
    """The part of `config.Limits` that the server keeps to."""

    @property
    def frame_bytes_max(self) -> int: ...
    @property
    def hello_frame_bytes_max(self) -> int: ...
    @property
    def sessions_max(self) -> int: ...
    @property
    def wait_seconds_max(self) -> float: ...


class Handler(Protocol):
    """What answers requests. All methods are called on the event loop and must not block it."""

    def connected(self, connection: Connection) -> None:
        """A peer is there; raise a TierdError to refuse it (then `disconnected` is not called)."""

    def request(self, connection: Connection, request: Request) -> Answer:
        """Answer a checked request: the reply's fields (None: none) or what begins to find them; a TierdError refuses it.

        What was begun is cancelled when its deadline passes or its connection ends: shield what must not be.
        """

    def refused(self, connection: Connection, request: Request, error: TierdError) -> None:
        """What `request` would have begun is not begun: too much of this connection waits. Note it; the peer is told."""

    def disconnected(self, connection: Connection) -> None:
        """The connection has ended, whoever ended it. Called once, never from within `send` or `close`."""


class Server:
    """Listens on a Unix socket until `close`; with `admin` for the admin verbs, of root and the daemon's own user.

    `inherited` is a socket that the service manager listens with and that is its own to remove; None: one is made at `path`.
    """

    def __init__(
        self,
        path: Path,
        mode: int,
        handler: Handler,
        limits: Limits,
        admin: bool = False,
        inherited: socket.socket | None = None,
    ) -> None:
        self.path = path
        self.mode = mode
        self.handler = handler
        self.limits = limits
        self.admin = admin
        self.verbs = ADMIN if admin else DATA
        self.connections_max = CONNECTIONS_PER_SESSION * limits.sessions_max
        self.connections: set[Connection] = set()
        self._ids = count(1)
        self._listener: socket.socket | None = None
        self._inherited = inherited

    def __repr__(self) -> str:
        return f"<Server {self.path}: {len(self.connections)} of {self.connections_max} connections>"

    async def start(self) -> None:
        """Listen. Raises Invalid when the path cannot be used or another daemon listens there."""
        self._loop = asyncio.get_running_loop()
        self.linger = Linger(self._loop)
        self._listener = taken_over(self._inherited, self.path) if self._inherited else listen(self.path, self.mode)
        self._inode = os.stat(self.path).st_ino
        self._loop.add_reader(self._listener, self._accept)
        log.info("listening", socket=self.path)

    def leave_queue(self) -> None:
        """Accept nobody any more where the socket outlives us: whoever connects from now on waits for the next life."""
        if self._listener is not None and self._inherited:
            self._loop.remove_reader(self._listener)

    async def close(self) -> None:
        """Stop listening, end all connections and wait for their requests; removes the socket if it is still ours."""
        if self._listener is None:
            return
        self._loop.remove_reader(self._listener)
        with suppress(FileNotFoundError):
            if not self._inherited and os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        self._listener.close()
        self._listener = None
        tasks = [task for connection in self.connections for task in connection.tasks]
        for connection in list(self.connections):
            connection.close("the daemon is stopping")
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # what `disconnected` was scheduled for has happened after this

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(BACKLOG):
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause_accepting(error)
                return
            self._admit(accepted)

    def _admit(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            accepted.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        peer = None
        try:
            if len(self.connections) >= self.connections_max:
                raise Busy(f"{len(self.connections)} connections are open, the maximum: raise limits.sessions_max")
            peer = peer_of(accepted)
            if self.admin and peer.uid not in (0, os.geteuid()):
                raise Denied(f"only root and uid {os.geteuid()} may use the admin socket, not uid {peer.uid}")
            connection = Connection(self, next(self._ids), accepted, peer)
            self.handler.connected(connection)
        except Exception as error:
            if isinstance(error, Denied) and peer:
                audit.denied(peer, error)
            elif isinstance(error, TierdError):
                log.warning("peer refused", socket=self.path, reason=error)
            else:
                log.exception("bug: connected", socket=self.path)
            with suppress(OSError):
                accepted.sendmsg(frame(failure(0, known(error))))
            accepted.close()
            if peer:
                os.close(peer.pidfd)
            return
        if not connection.closed:
            connection.open()

    def _pause_accepting(self, error: OSError) -> None:
        """Too few descriptors or too little memory: the peers that wait are taken when some came back."""
        assert self._listener is not None
        log.error("cannot accept", socket=self.path, reason=error, retry_seconds=ACCEPT_PAUSE_SECONDS)
        self._loop.remove_reader(self._listener)
        self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)


class Connection:
    """One connected peer. `id` is unique in the server's life; `state` belongs to the handler."""

    def __init__(self, server: Server, connection_id: int, connected: socket.socket, peer: Peer) -> None:
        self.id = connection_id
        self.peer = peer
        self.state: Any = None
        self.closed = False
        self.tasks: set[asyncio.Task[None]] = set()
        """Requests that wait for something."""
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._socket = connected
        self._reader = FrameReader(server.limits.hello_frame_bytes_max)
        self._unsent: deque[Unsent] = deque()
        self._unsent_bytes = 0
        self._turn: list[memoryview] | None = None
        """Answers of the present turn, sent together when it ends; None between turns."""
        self._behind = False
        """Whether complete frames wait for another turn."""
        self._hello: str | None = "" if server.admin else None
        """The verb that opened this connection: None until it came."""
        self._hello_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        who = f"pid {self.peer.pid} uid {self.peer.uid}"
        return f"<Connection {self.id}: {who}, {len(self.tasks)} waiting, {self._unsent_bytes} bytes unsent>"

    @property
    def is_read(self) -> bool:
        """Whether the peer has taken all that it was sent."""
        return not self._unsent

    def open(self) -> None:
        """Start to read; called by the server once the handler knows the connection."""
        self._server.connections.add(self)
        if self._hello is None:
            seconds = self._server.limits.wait_seconds_max
            reason = f"no hello within {seconds:g} s"
            self._hello_timer = self._loop.call_later(seconds, self._refuse, Busy(reason))
        self._loop.add_reader(self._socket, self._readable)

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a push or a reply, never blocking. What the peer does not take is kept; over a limit it is disconnected.

        Descriptors (at most 253) arrive with the frame's first byte; they are the caller's own again when this returns.
        Raises OSError, with nothing sent, when they have to be kept and cannot be copied.
        """
        assert len(descriptors) <= DESCRIPTORS_PER_FRAME_MAX
        if self.closed:
            return
        parts = [memoryview(part) for part in frame(message)]
        if self._turn is not None and not descriptors:
            self._turn += parts
            return
        self._send_turn()
        self._send(parts, descriptors)

    def _send_turn(self) -> None:
        """Send what the present turn has answered so far: one system call, and one wake-up of the peer."""
        if self._turn:
            parts, self._turn = self._turn, []
            self._send(parts, ())

    def _send(self, parts: list[memoryview], descriptors: Sequence[int]) -> None:
        if self.closed:
            return
        if not self._unsent:
            try:
                parts = after(parts, send_now(self._socket, parts, descriptors))
                descriptors = ()
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self.close(f"send failed: {error}")
                return
            if not parts:
                return
        self._unsent.append(Unsent(parts, copies(descriptors)))
        self._loop.add_writer(self._socket, self._writable)
        self._unsent_bytes += sum(map(len, parts))
        if self._unsent_bytes > 2 * self._server.limits.frame_bytes_max:
            self.close(f"{self._unsent_bytes} bytes unsent: the peer does not read")

    def close(self, reason: str) -> None:
        """End the connection, and cancel what it waits for; what the peer does not take at once is dropped."""
        self._send_turn()
        if self.closed:
            return
        self.closed = True
        log.debug("connection closed", id=self.id, pid=self.peer.pid, reason=reason)
        if self._hello_timer:
            self._hello_timer.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for unsent in self._unsent:
            unsent.close()
        self._unsent.clear()
        for task in self.tasks:
            task.cancel()
        self._server.connections.discard(self)
        self._loop.call_soon(self._say_disconnected)

    def _say_disconnected(self) -> None:
        try:
            self._server.handler.disconnected(self)
        except Exception:
            log.exception("bug: disconnected", id=self.id)
        os.close(self.peer.pidfd)

    def _readable(self) -> None:
        if self._behind:
            return
        try:
            received = self._socket.recv_into(self._reader.buffer())
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"receive failed: {error}")
            return
        if not received:
            self.close("the peer closed")
            return
        self._reader.feed(received)
        self._take_turn()

    def _take_turn(self) -> None:
        """Answer what was received, but let the others have their turn after a while."""
        self._behind = False
        self._turn = []
        try:
            for taken, payload in enumerate(self._reader, 1):
                self._take(decode(payload))
                if self.closed:
                    return
                if taken == FRAMES_PER_TURN:
                    self._behind = True
                    self._loop.call_soon(self._take_next_turn)
                    return
        except Invalid as error:
            self._refuse(error)
        finally:
            self._send_turn()
            self._turn = None
            self._server.linger.longer()

    def _take_next_turn(self) -> None:
        if not self.closed:
            self._take_turn()

    def _take(self, message: dict[str, Any]) -> None:
        """Answer one message, or start a task that will."""
        number = 0
        try:
            number = request_id(message)
            request = check(message, self._server.verbs)
            self._check_opening(request.verb)
            answer = self._server.handler.request(self, request)
            if answer is None or isinstance(answer, dict):
                self._reply(request, answer)
            elif len(self.tasks) < REQUESTS_WAITING_MAX:
                self._start(request, answer)
            else:
                crowd = Busy(f"{len(self.tasks)} requests of this connection wait, the maximum: wait for some of them")
                self._server.handler.refused(self, request, crowd)
                raise crowd
        except Exception as error:
            self._fail(number, error)

    def _check_opening(self, verb: str) -> None:
        """The first verb, and only the first, is one of those that open a connection."""
        if self._hello is None:
            if verb not in OPENING:
                raise Invalid(f"{verb}: the first request on a connection must be one of {', '.join(OPENING)}")
            if self.tasks:
                raise Invalid(f"{verb}: an opening request of this connection waits for its answer: wait for it too")
        elif verb in OPENING:
            raise Invalid(f"{verb}: this connection was opened by {self._hello!r} before; open another one")

    def _start(self, request: Request, answering: Answering) -> None:
        task = self._loop.create_task(self._answer(request, answering))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self, request: Request, answering: Answering) -> None:
        longest = self._server.limits.wait_seconds_max
        seconds = longest if request.deadline_seconds is None else min(request.deadline_seconds, longest)
        try:
            async with asyncio.timeout(seconds) as timeout:
                fields = await answering()
            self._reply(request, fields)
        except TimeoutError as error:
            late = Busy(f"{request.verb}: no answer within {seconds:g} s; go on without") if timeout.expired() else error
            self._fail(request.id, late)
        except Exception as error:
            self._fail(request.id, error)

    def _reply(self, request: Request, fields: Reply) -> None:
        if request.verb in OPENING and self._hello is None:
            self._hello = request.verb
            self._reader.frame_bytes_max = self._server.limits.frame_bytes_max
            if self._hello_timer:
                self._hello_timer.cancel()
        if request.id:
            self.send({"id": request.id, "ok": True, **(fields or {})})

    def _fail(self, number: int, error: Exception) -> None:
        self.send(failure(number, known(error)))
        if isinstance(error, Denied):
            audit.denied(self.peer, error)
        if not isinstance(error, TierdError):
            log.exception("bug: request", id=self.id, pid=self.peer.pid)
            self.close("internal error")

    def _refuse(self, error: TierdError) -> None:
        """Say why, and end the connection."""
        log.warning("connection refused", id=self.id, pid=self.peer.pid, uid=self.peer.uid, reason=error)
        self.send(failure(0, error))
        self.close(str(error))

    def _writable(self) -> None:
        try:
            while self._unsent:
                unsent = self._unsent[0]
                sent = send_now(self._socket, unsent.parts, unsent.descriptors)
                unsent.close()
                unsent.parts = after(unsent.parts, sent)
                self._unsent_bytes -= sent
                if unsent.parts:
                    return
                self._unsent.popleft()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"send failed: {error}")
            return
        self._loop.remove_writer(self._socket)


class Unsent:
    """The rest of a frame that the peer had no room for, and copies of the descriptors that go with it."""

    __slots__ = ("descriptors", "parts")

    def __init__(self, parts: list[memoryview], descriptors: list[int]) -> None:
        self.parts = parts
        self.descriptors = descriptors

    def close(self) -> None:
        """Close the copies, sent or not."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def copies(descriptors: Sequence[int]) -> list[int]:
    """Duplicates of all of them; raises OSError, and leaves none, when there are too few numbers."""
    made: list[int] = []
    try:
        made.extend(os.dup(descriptor) for descriptor in descriptors)
    except OSError:
        for descriptor in made:
            os.close(descriptor)
        raise
    return made


def known(error: Exception) -> TierdError:
    """What the peer is told of an error: of a bug, only that there is one."""
    return error if isinstance(error, TierdError) else Closed("internal error; the daemon's log has it")


def send_now(connected: socket.socket, parts: list[memoryview], descriptors: Sequence[int]) -> int:
    """Send what fits, the descriptors with its first byte; returns the bytes sent."""
    if not descriptors:
        return connected.sendmsg(parts)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    return connected.sendmsg(parts, [rights])
