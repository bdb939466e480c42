"""What each verb does: from a checked message to its reply. Each method reads like the story of its verb.

The cache decides, the keeper finds room and moves; here is only who asks, what may be asked, and what is told. A verb that
never waits answers at once; one that may wait (store, load) is a coroutine then, which the server gives a deadline.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import numpy as np

from tierd import __version__, clock, systemd
from tierd.adopt import living_pid
from tierd.block import HASH_BYTES
from tierd.config import Config
from tierd.core.plan import Wait
from tierd.errors import Busy, Closed, Gone, Invalid, TierdError
from tierd.keeper import Keeper
from tierd.layout import Layout, Namespace
from tierd.log import get_logger
from tierd.metrics import Metrics
from tierd.server import Connection
from tierd.space import Attached, Slots, Space
from tierd.wire.messages import PROTOCOL_VERSION, SEGMENTS_PER_PUSH_MAX, Request, pack_slots, unpack_held

log = get_logger("service")
Reply = dict[str, Any] | None


class Service:
    """Serves the data socket. `space_of` gives a namespace's space, made if need be."""

    def __init__(self, config: Config, keeper: Keeper, metrics: Metrics, space_of: Callable[[Namespace], Space]) -> None:
        self._config, self._keeper, self._metrics, self._space_of = config, keeper, metrics, space_of
        self._incarnation = os.urandom(16)
        self._draining = False
        self._seconds = {verb: metrics.requests.labels(verb) for verb in (*_OPENING, *_VERBS)}

    # -- connections --------------------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        """A connection without a session yet."""

    def disconnected(self, connection: Connection) -> None:
        """The session stays, with all it was told, until it resumes or its process is gone."""
        session: Attached | None = connection.state
        if session is not None:
            if session.connection is connection:
                session.connection = None
            if session.events is connection:
                session.events = None

    def request(self, connection: Connection, request: Request) -> Reply | Awaitable[Reply]:
        """Answer one checked request."""
        started = clock.monotonic_seconds()
        verb = request.verb
        session: Attached | None = connection.state
        try:
            if self._draining and verb in ("hello", "store", "prefetch"):
                raise Closed("the daemon is stopping: go on without it")
            if verb in _OPENING:
                answer: Reply | Awaitable[Reply] = _OPENING[verb](self, connection, request)
            elif session is None:
                raise Gone("the session of this connection has ended: open another one")
            elif (connection is session.events) != (verb == "detached"):
                raise Invalid("an event channel takes 'detached' and nothing else does")
            else:
                answer = _VERBS[verb](self, session, request)
        except TierdError as error:
            self._metrics.errors[verb, error.code] += 1
            raise
        if answer is not None and not isinstance(answer, dict):
            return self._timed(verb, started, answer)
        self._seconds[verb].observe(clock.monotonic_seconds() - started)
        return answer

    async def _timed(self, verb: str, started: float, answer: Awaitable[Reply]) -> Reply:
        try:
            return await answer
        except TierdError as error:
            self._metrics.errors[verb, error.code] += 1
            raise
        except asyncio.CancelledError:  # by its deadline, or because its client has left
            self._metrics.errors[verb, "late"] += 1
            raise
        finally:
            self._seconds[verb].observe(clock.monotonic_seconds() - started)

    # -- sessions -----------------------------------------------------------------------------------------------------

    def hello(self, connection: Connection, arguments: Request) -> Reply:
        """Open a session in the namespace that the peer may use."""
        namespace = self._namespace(connection, arguments)
        self._check_namespace_limit(namespace)
        space = self._space_of(namespace)
        self._keeper.supply_ahead(space)
        peer = connection.peer
        pidfd = os.dup(peer.pidfd)
        try:
            session = space.attach(pidfd, peer.pid, arguments["client"], self._config.limits.sessions_per_namespace_max)
        except Busy:
            os.close(pidfd)
            raise
        if systemd.can_store():
            systemd.store(session.stored_name, [pidfd])
        self._metrics.sessions_total += 1
        self.watch(session)
        self._join(session, connection)
        log.info("session", client=session.name, pid=peer.pid, namespace=namespace.id, session=session.id)
        return self._welcome(session)

    def resume(self, connection: Connection, arguments: Request) -> Reply:
        """Go on with a session after a lost connection or a restart of the daemon; what it does not hold any more is free."""
        space = self._keeper.spaces.get(arguments["namespace"])
        session = space.sessions.get(arguments["session"]) if space else None
        if space is None or session is None or session.token != arguments["token"]:
            raise Gone("this session is not known: say hello")
        if connection.peer.pid != session.pid or not living_pid(session.pidfd):
            raise Invalid("resume: a session can be resumed only by the process that opened it")
        held = self._held_slots(session, arguments["held"])
        lease = space.cache.resume(session.id, held)  # refuses what cannot be, before anything has changed
        if session.connection is not None:
            session.connection.close("the session was resumed on another connection")
        closing = space.upper.pool.closing  # not given again, and to be unmapped yet
        session.known = {ordinal: name for ordinal, name in session.known.items() if ordinal in closing}
        session.name = arguments["client"] or session.name
        self._join(session, connection)
        self._give_segments(session, [o for o in space.upper.segments if o not in space.upper.pool.closing])
        return self._welcome(session) | {"lease": lease}

    def events(self, connection: Connection, arguments: Request) -> Reply:
        """Make the connection a session's event channel."""
        session = self._find(arguments["session"])
        if session is None or session.token != arguments["token"] or connection.peer.pid != session.pid:
            raise Gone("this session is not known: say hello first, on another connection")
        if session.events is not None:
            session.events.close("the session has a new event channel")
        session.events = connection
        session.waiting_detach.clear()
        connection.state = session
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
        if systemd.can_store():
            systemd.remove(session.stored_name)
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
        spaces, most = self._keeper.spaces, self._config.limits.namespaces_max
        if namespace.id not in spaces and len(spaces) >= most:
            self._keeper.forget_empty()
            if len(spaces) >= most:
                raise Busy(f"the daemon serves its maximum of {most} namespaces: raise limits.namespaces_max")

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
        own = self._config.server.domains.get(str(connection.peer.uid), f"uid:{connection.peer.uid}")
        domain = arguments["domain"] or own
        if domain != own and connection.peer.uid != 0:
            raise Invalid(f"domain {domain!r} is not open to uid {connection.peer.uid}, whose domain is {own!r}")
        return Namespace(domain, arguments["model"], layout)

    def _welcome(self, session: Attached) -> dict[str, Any]:
        limits, space = self._config.limits, session.space
        return {
            "version": PROTOCOL_VERSION,
            "session": session.id,
            "token": session.token,
            "incarnation": self._incarnation,
            "namespace": space.namespace.id,
            "block_bytes": space.upper.geometry.payload_bytes,
            "slot_bytes": space.upper.geometry.slot_bytes,
            "slots_per_segment": space.upper.geometry.slot_count,
            "limits": {
                "frame_bytes_max": limits.frame_bytes_max,
                "blocks_per_request_max": limits.blocks_per_request_max,
                "leases_per_session_max": limits.leases_per_session_max,
                "wait_seconds_max": limits.wait_seconds_max,
            },
        }

    def _held_slots(self, session: Attached, held: bytes) -> Slots:
        ordinals = {segment.segment_id: ordinal for ordinal, segment in session.space.upper.segments.items()}
        pool = session.space.upper.pool
        slots = []
        for segment, index, _ in unpack_held(held):
            ordinal = ordinals.get(segment)
            if ordinal is not None:  # of a segment that is gone nothing can be reused under the client
                if index >= pool.slots_per_segment:
                    raise Invalid(f"resume: slot {index} is not in a segment of {pool.slots_per_segment} slots")
                slots.append(ordinal * pool.slots_per_segment + index)
        return np.array(slots, np.int32)

    # -- blocks -------------------------------------------------------------------------------------------------------

    def lookup(self, session: Attached, arguments: Request) -> Reply | Awaitable[Reply]:
        """Lease the longest prefix, and name the slots of what can be read at once."""
        self._check_lease_limit(session)
        hashes = self._hashes(arguments)
        if not session.space.upper.pool.slots and session.space.cache.index.blocks:
            return self._lookup_later(session, hashes, arguments["parent"])
        return self._find_prefix(session, hashes, arguments["parent"])

    async def _lookup_later(self, session: Attached, hashes: bytes, parent: bytes) -> Reply:
        """All blocks are below, and the first segment to bring them up to is still being made."""
        with suppress(Busy):
            await self._keeper.supply(session.space, 1)
        self._check_attached(session)
        return self._find_prefix(session, hashes, parent)

    def _find_prefix(self, session: Attached, hashes: bytes, parent: bytes) -> Reply:
        cache = session.space.cache
        found = cache.lookup(session.id, hashes, parent, clock.unix_milliseconds())
        if cache.planned:
            self._keeper.pump(session.space)
            self._keeper.supply_ahead(session.space)
        self._introduce(session, found.slots)
        return {
            "lease": found.lease,
            "blocks": found.blocks,
            "told": found.told,
            "slots": pack_slots(found.slots),
            "tiers": found.tiers,
        }

    def load(self, session: Attached, arguments: Request) -> Reply | Awaitable[Reply]:
        """Name the slots of blocks that have to be brought up first."""
        first, count = arguments["first"], arguments["count"]
        upper = session.space.upper
        if upper.pool.free < count and self._keeper.can_grow(upper):
            return self._load_later(session, arguments["lease"], first, count, None)
        answer = self._try_load(session, arguments["lease"], first, count)
        return answer if isinstance(answer, dict) else self._load_later(session, arguments["lease"], first, count, answer)

    async def _load_later(self, session: Attached, lease: int, first: int, count: int, wait: Wait | None) -> Reply:
        """Grow rather than evict, then wait for the transfers that bring the blocks."""
        if wait is None:
            await self._keeper.supply(session.space, count)
        while True:
            if wait is not None:
                await self._ended(session.space, wait)
            self._check_attached(session)
            answer = self._try_load(session, lease, first, count)
            if isinstance(answer, dict):
                return answer
            wait = answer

    async def _ended(self, space: Space, wait: Wait) -> None:
        """Until one of the transfers has ended."""
        ended = [asyncio.ensure_future(space.ended(transfer).wait()) for transfer in wait.transfers]
        try:
            await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ended:
                task.cancel()

    def _check_attached(self, session: Attached) -> None:
        if session.id not in session.space.sessions:
            raise Gone("the session has ended")

    def _try_load(self, session: Attached, lease: int, first: int, count: int) -> dict[str, Any] | Wait:
        cache = session.space.cache
        slots = cache.load(session.id, lease, first, count, clock.unix_milliseconds())
        if cache.planned:
            self._keeper.pump(session.space)
        if isinstance(slots, Wait):
            return slots
        self._introduce(session, slots)
        return {"first": first, "count": len(slots), "slots": pack_slots(slots)}

    def release(self, session: Attached, arguments: Request) -> Reply:
        """End a lease, or a part of it."""
        session.space.cache.release(session.id, arguments["lease"], arguments["first"] or 0, arguments["count"])
        return {}

    def store(self, session: Attached, arguments: Request) -> Reply | Awaitable[Reply]:
        """Name slots for what is new; waits only while the namespace grows."""
        self._check_lease_limit(session)
        hashes = self._hashes(arguments)
        parent = arguments["parent"]
        pool = session.space.upper.pool
        if pool.free < len(hashes) // HASH_BYTES and (self._keeper.can_grow(session.space.upper) or not pool.slots):
            return self._store_later(session, hashes, parent)
        return self._place(session, hashes, parent)

    async def _store_later(self, session: Attached, hashes: bytes, parent: bytes) -> Reply:
        await self._keeper.supply(session.space, len(hashes) // HASH_BYTES)
        self._check_attached(session)
        return self._place(session, hashes, parent)

    def _place(self, session: Attached, hashes: bytes, parent: bytes) -> Reply:
        placed = session.space.cache.store(session.id, hashes, parent, clock.unix_milliseconds())
        self._introduce(session, placed.slots[placed.slots >= 0])
        self._keeper.supply_ahead(session.space)
        return {"lease": placed.lease, "slots": pack_slots(placed.slots)}

    def commit(self, session: Attached, arguments: Request) -> Reply:
        """Make written blocks visible, and start to write them back."""
        cache = session.space.cache
        done = cache.commit(session.id, arguments["lease"], arguments["count"], clock.unix_milliseconds())
        asyncio.get_running_loop().call_soon(self._keeper.pump, session.space)
        return {"committed": done.committed, "dropped": done.dropped}

    def abort(self, session: Attached, arguments: Request) -> Reply:
        """Give the slots of a store back."""
        session.space.cache.abort(session.id, arguments["lease"])
        return {}

    def prefetch(self, session: Attached, arguments: Request) -> Reply:
        """Start to bring a prefix up."""
        cache = session.space.cache
        hashes = self._hashes(arguments)
        blocks = cache.prefetch(hashes, arguments["parent"], clock.unix_milliseconds())
        self._keeper.pump(session.space)
        return {"blocks": blocks}

    def stats(self, session: Attached, arguments: Request) -> Reply:
        """Counters of the session's namespace."""
        space = session.space
        return {
            "counters": {".".join(name): number for name, number in space.cache.counters.items()},
            "slots": {arena.tier.name: arena.pool.counts() for arena in space.arenas},
            "blocks": space.cache.index.blocks,
        }

    def _hashes(self, arguments: Request) -> bytes:
        hashes: bytes = arguments["hashes"]
        if len(hashes) // HASH_BYTES > self._config.limits.blocks_per_request_max:
            most = self._config.limits.blocks_per_request_max
            raise Invalid(f"{len(hashes) // HASH_BYTES} blocks in a request, the maximum is {most}: ask in parts")
        return hashes

    def _check_lease_limit(self, session: Attached) -> None:
        leases = len(session.space.cache.sessions[session.id].leases)
        if leases >= self._config.limits.leases_per_session_max:
            raise Busy(f"the session holds its maximum of {leases} leases: release some")

    def _introduce(self, session: Attached, slots: Slots) -> None:
        """Send the segments of these slots that the client does not know yet, before it is told the slots."""
        if unknown := session.space.unknown(session, slots):
            self._give_segments(session, unknown)

    def _give_segments(self, session: Attached, ordinals: list[int]) -> None:
        for at in range(0, len(ordinals), SEGMENTS_PER_PUSH_MAX):
            batch = ordinals[at : at + SEGMENTS_PER_PUSH_MAX]
            entries, descriptors = [], []
            for ordinal in batch:
                segment = session.space.upper.segments[ordinal]
                shape = segment.header.geometry
                session.known[ordinal] = segment.segment_id
                descriptors += [segment.readonly_directory_fd(), os.dup(segment.slots_fd)]
                entries.append(
                    {
                        "tier": "cpu",
                        "ordinal": ordinal,
                        "segment": segment.segment_id,
                        "slots": shape.slot_count,
                        "slot_bytes": shape.slot_bytes,
                        "directory_bytes": shape.directory_bytes,
                        "slots_bytes": shape.slots_bytes,
                    }
                )
            session.connection.send({"id": 0, "push": "attach", "segments": entries}, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)

    # -- drain --------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """From now on nothing new is taken."""
        self._draining = True


_OPENING: dict[str, Callable[[Service, Connection, Request], Reply]] = {
    "hello": Service.hello,
    "resume": Service.resume,
    "events": Service.events,
}
_VERBS: dict[str, Callable[[Service, Attached, Request], Reply | Awaitable[Reply]]] = {
    "lookup": Service.lookup,
    "load": Service.load,
    "release": Service.release,
    "store": Service.store,
    "commit": Service.commit,
    "abort": Service.abort,
    "prefetch": Service.prefetch,
    "stats": Service.stats,
    "detached": Service.detached,
    "bye": Service.bye,
}
