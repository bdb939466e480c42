"""Who asks: connections and their sessions, from hello to the end of a process. What verbs about blocks do is in `verbs`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd import __version__, clock, systemd
from tierd.config import Config
from tierd.core.ladder import PAGED, kind_of
from tierd.devices import describe_device
from tierd.errors import Busy, Closed, Denied, Gone, Invalid, TierdError
from tierd.keeper import Keeper
from tierd.kept import Kept
from tierd.layout import Layout, Namespace
from tierd.log import get_logger
from tierd.metrics import Metrics
from tierd.pinboard import Pinboard
from tierd.recorder import Recorder
from tierd.removals import Removals
from tierd.server import Connection
from tierd.space import Attached, Slots, Space, give_segments
from tierd.verbs import BY_NAME, Verbs
from tierd.wire.messages import PROTOCOL_VERSION, WRITING, Answer, Answering, Reply, Request, unpack_held
from tierd.wire.peer import has_ended

log = get_logger("service")


class Service:
    """Serves the data socket. `space_of` gives a namespace's space, made if need be."""

    def __init__(
        self,
        config: Config,
        keeper: Keeper,
        metrics: Metrics,
        kept: Kept,
        recorder: Recorder,
        pinboard: Pinboard,
        space_of: Callable[[Namespace], Space],
    ) -> None:
        self.config = config
        """Replaced as a whole by a reload."""
        self._keeper, self._metrics, self._kept, self._space_of = keeper, metrics, kept, space_of
        self._incarnation = os.urandom(16)
        self._draining = False
        self._removals = Removals()
        self._verbs = Verbs(config.limits, keeper, recorder, pinboard)
        self._seconds = {verb: metrics.requests.labels(verb) for verb in (*_OPENING, *_SESSION, *BY_NAME)}

    # -- connections --------------------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        """A connection without a session yet."""

    def disconnected(self, connection: Connection) -> None:
        """The session stays, with all it was told, until it resumes or its process is gone; one that knows no segment was
        told nothing, perhaps not even its name, and ends.
        """
        session: Attached | None = connection.state
        if session is not None:
            if session.connection is connection:
                session.connection = None
            if session.events is connection:
                session.events, session.missed = None, True
            if session.connection is None and session.events is None and not session.known:
                self.end(session)

    def request(self, connection: Connection, request: Request) -> Answer:
        """Answer one checked request."""
        started = clock.monotonic_seconds()
        verb = request.verb
        session: Attached | None = connection.state
        try:
            if self._draining and verb in ("hello", "store", "reserve", "prefetch"):
                raise Closed("the daemon is stopping: go on without it")
            if verb in _OPENING:
                answer: Answer = _OPENING[verb](self, connection, request)
            elif session is None:
                raise Gone("the session of this connection has ended: open another one")
            elif (connection is session.events) != (verb == "detached"):
                raise Invalid("an event channel takes 'detached' and nothing else does")
            else:
                own = _SESSION.get(verb)
                answer = own(self, session, request) if own else BY_NAME[verb](self._verbs, session, request)
        except TierdError as error:
            self.refused(connection, request, error)
            raise
        if answer is not None and not isinstance(answer, dict):
            return partial(self._timed, verb, started, answer)
        self._seconds[verb].observe(clock.monotonic_seconds() - started)
        return answer

    def refused(self, connection: Connection, request: Request, error: TierdError) -> None:
        """Count it."""
        self._metrics.errors[request.verb, error.code] += 1

    async def _timed(self, verb: str, started: float, answering: Answering) -> Reply:
        try:
            return await answering()
        except TierdError as error:
            self._metrics.errors[verb, error.code] += 1
            raise
        except asyncio.CancelledError:  # by its deadline, or because its client has left
            self._metrics.errors[verb, "late"] += 1
            raise
        finally:
            self._seconds[verb].observe(clock.monotonic_seconds() - started)

    # -- sessions -----------------------------------------------------------------------------------------------------

    def hello(self, connection: Connection, arguments: Request) -> Answer:
        """Open a session in the namespace that the peer may use."""
        namespace = self._namespace(connection, arguments)
        self._check_namespace_limit(namespace)
        space = self._space_of(namespace)
        tier = _tier(space, arguments["tier"] or "cpu", arguments["device"] or b"")
        self._keeper.supply_ahead(space, tier)
        peer, most = connection.peer, self.config.limits.sessions_per_namespace_max
        pidfd = os.dup(peer.pidfd)
        try:
            session = space.attach(pidfd, peer.pid, arguments["client"], tier, most)
        except Busy:
            os.close(pidfd)
            raise
        self._metrics.sessions_total += 1
        if arguments["removed"]:
            self._removals.listen(session)
        self.watch(session)
        self._join(session, connection)
        log.info("session", client=session.name, pid=peer.pid, namespace=namespace.id, session=session.id)
        return partial(self._welcome_kept, session) if systemd.can_store() else self._welcome(session)

    async def _welcome_kept(self, session: Attached) -> Reply:
        """Welcome a session once the service manager has its process: the next life must know whose the slots are."""
        try:
            is_kept = await self._kept.store(session.stored_name, session.pidfd)
        except asyncio.CancelledError:  # its client was told that it is too late, or has left
            self.end(session)
            raise
        if not is_kept:
            self._metrics.sessions_not_kept += 1
            log.warning("the service manager does not keep a session", client=session.name, pid=session.pid)
        return self._welcome(session)

    def resume(self, connection: Connection, arguments: Request) -> Reply:
        """Go on with a session after a lost connection or a restart of the daemon; what it does not hold any more is free."""
        space = self._keeper.spaces.get(arguments["namespace"])
        session = space.sessions.get(arguments["session"]) if space else None
        if space is None or session is None or session.token != arguments["token"]:
            raise Gone("this session is not known: say hello")
        if connection.peer.pid != session.pid or has_ended(session.pidfd):
            raise Denied("resume: a session can be resumed only by the process that opened it")
        held, writing = _held_slots(session, arguments["held"])
        lease = space.cache.resume(session.id, held, writing)  # refuses what cannot be, before anything has changed
        if session.connection is not None:
            session.connection.close("the session was resumed on another connection")
        closing = session.arena.pool.closing  # not given again, and to be unmapped yet
        session.known = {ordinal: name for ordinal, name in session.known.items() if ordinal in closing}
        session.name = arguments["client"] or session.name
        if arguments["removed"] and not session.listens:  # the last life of the daemon has not noted what went since
            self._removals.listen(session, missed=True)
        self._join(session, connection)
        give_segments(session, [ordinal for ordinal in session.arena.segments if ordinal not in closing])
        return self._welcome(session) | {"lease": lease}

    def events(self, connection: Connection, arguments: Request) -> Reply:
        """Make the connection a session's event channel."""
        session = self._find(arguments["session"])
        if session is None or session.token != arguments["token"] or connection.peer.pid != session.pid:
            raise Gone("this session is not known: say hello first, on another connection")
        if session.events is not None:
            session.events.close("the session has a new event channel")
            session.missed = True  # what it did not read of the old one
        session.events = connection
        session.waiting_detach.clear()
        connection.state = session
        if session.listens and session.missed:
            self._removals.soon(session.space)
        return {}

    def detached(self, session: Attached, arguments: Request) -> Reply:
        """The client has unmapped segments that it was asked for."""
        gone = set(arguments["segments"]) & session.waiting_detach
        session.waiting_detach -= gone
        session.known = {ordinal: name for ordinal, name in session.known.items() if name not in gone}
        return {}

    def bye(self, session: Attached, arguments: Request) -> Reply:
        """End the session; everything it held is free."""
        self.end(session)
        return {}

    def end(self, session: Attached) -> None:
        """Free all that a session held, because it said so or its process is gone."""
        if session.id not in session.space.sessions:
            return
        with suppress(ValueError, OSError):
            asyncio.get_running_loop().remove_reader(session.pidfd)
        session.space.detach(session)
        if session.pidfd >= 0:
            os.close(session.pidfd)
        self._kept.remove(session.stored_name)
        for connection in (session.connection, session.events):
            if connection is not None:
                connection.state = None
        log.info("session ended", client=session.name, pid=session.pid, session=session.id)

    def watch(self, session: Attached) -> None:
        """End the session when its process is gone."""
        if session.pidfd >= 0:
            asyncio.get_running_loop().add_reader(session.pidfd, self._process_gone, session)

    def _process_gone(self, session: Attached) -> None:
        connections = [session.connection, session.events]
        self.end(session)
        for connection in connections:  # a forked child may hold them open
            if connection is not None:
                connection.close("the session's process is gone")

    def _check_namespace_limit(self, namespace: Namespace) -> None:
        spaces, most = self._keeper.spaces, self.config.limits.namespaces_max
        if namespace.id not in spaces and len(spaces) >= most:
            self._keeper.forget_empty()
            if len(spaces) >= most and self._keeper.give_up_one():
                raise Busy(f"of the maximum of {most} namespaces one that nobody uses is being given up: try again in a moment")
            if len(spaces) >= most:
                raise Busy(f"the daemon serves its maximum of {most} namespaces, all in use: raise limits.namespaces_max")

    def _join(self, session: Attached, connection: Connection) -> None:
        session.connection = connection
        connection.state = session

    def _find(self, session_id: int) -> Attached | None:
        found = (space.sessions.get(session_id) for space in self._keeper.spaces.values())
        return next((session for session in found if session is not None), None)

    def _namespace(self, connection: Connection, arguments: Request) -> Namespace:
        if arguments["version"] != PROTOCOL_VERSION:
            version = arguments["version"]
            raise Invalid(f"protocol version {version} is not {PROTOCOL_VERSION}: use a client of tierd {__version__}")
        layout = Layout.from_map(arguments["layout"])
        if layout.fingerprint != arguments["fingerprint"]:
            theirs, ours = arguments["fingerprint"].hex(), layout.fingerprint.hex()
            raise Invalid(f"layout fingerprint {theirs} is not that of the layout sent, {ours}: send the layout you use")
        own = self.config.server.domains.get(str(connection.peer.uid), f"uid:{connection.peer.uid}")
        domain = arguments["domain"] or own
        if domain != own and connection.peer.uid != 0:
            raise Denied(f"domain {domain!r} is not open to uid {connection.peer.uid}, whose domain is {own!r}")
        return Namespace(domain, arguments["model"], layout)

    def _welcome(self, session: Attached) -> dict[str, Any]:
        limits, geometry = self.config.limits, session.arena.geometry
        return {
            "version": PROTOCOL_VERSION,
            "session": session.id,
            "token": session.token,
            "incarnation": self._incarnation,
            "namespace": session.space.namespace.id,
            "block_bytes": geometry.payload_bytes,
            "slot_bytes": geometry.slot_bytes,
            "slots_per_segment": geometry.slot_count,
            "device": session.arena.device,
            "limits": {
                "frame_bytes_max": limits.frame_bytes_max,
                "blocks_per_request_max": limits.blocks_per_request_max,
                "leases_per_session_max": limits.leases_per_session_max,
                "wait_seconds_max": limits.wait_seconds_max,
            },
        }

    # -- drain --------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """From now on nothing new is taken."""
        self._draining = True


def _tier(space: Space, kind: str, device: bytes) -> int:
    """The place of the tier in memory that a client asks to live in; of one on each of several devices, that on `device`."""
    kinds = space.cache.ladder.kinds[: len(space.mapped)]
    if kind not in kinds:
        remedy = "set gpu.bytes, or use cpu" if kind == PAGED else f"it is one of {', '.join(dict.fromkeys(kinds))}"
        raise Invalid(f"hello: this daemon has no {kind!r:.64} tier in memory: {remedy}")
    if kinds.count(kind) == 1:
        return kinds.index(kind)
    devices = [arena.device for arena in space.mapped if kind_of(arena.tier.name) == kind]
    if device not in devices:
        here, there = describe_device(device), ", ".join(map(describe_device, devices))
        raise Invalid(f"hello: no {kind} tier of this daemon is in {here}, they are in {there}: see gpu.device")
    return devices.index(device)


def _held_slots(session: Attached, held: bytes) -> tuple[Slots, NDArray[np.bool_]]:
    """Slot numbers of held records, and which of them are written to."""
    arena = session.arena
    ordinals = {segment.segment_id: ordinal for ordinal, segment in arena.segments.items()}
    slots, writing = [], []
    for segment, index, kind in unpack_held(held):
        ordinal = ordinals.get(segment)
        if ordinal is not None:  # of a segment that is gone nothing can be reused under the client
            if index >= arena.pool.slots_per_segment:
                raise Invalid(f"resume: slot {index} is not in a segment of {arena.pool.slots_per_segment} slots")
            slots.append(ordinal * arena.pool.slots_per_segment + index)
            writing.append(kind == WRITING)
    return np.array(slots, np.int32), np.array(writing, np.bool_)


_OPENING: dict[str, Callable[[Service, Connection, Request], Answer]] = {
    "hello": Service.hello,
    "resume": Service.resume,
    "events": Service.events,
}
_SESSION: dict[str, Callable[[Service, Attached, Request], Reply]] = {"detached": Service.detached, "bye": Service.bye}
