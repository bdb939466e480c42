"""The segments that this process maps, and the copies in progress on them.

The rule that everything here serves: a slot that is being copied from or to is never given back before the copy has
ended, and a slot that was leased on a lost connection is never touched again. So a copy starts only on the connection
that its lease is from while that is the newest one, is registered while it runs, is named in `held` when the session
resumes, and nothing is unmapped under it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Condition, RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.client.connection import Connection
from tierd.client.mapping import Mapping
from tierd.client.pins import Pins
from tierd.client.transfer import Part, locate
from tierd.errors import Closed, Invalid
from tierd.layout import Layout
from tierd.wire.messages import ATTACHED, PUSHES, SEGMENT, check_values, pack_held

MAPPED_TIER = "cpu"
DETACHED_REMEMBERED = 1024


class Copy:
    """A copy in progress: its parts, and whether it reads or writes the slots (a kind of held records)."""

    def __init__(self, parts: list[Part], kind: int) -> None:
        self.parts = parts
        self.kind = kind

    def held(self) -> Iterator[tuple[bytes, int, int]]:
        """Its slots as held records."""
        for part in self.parts:
            for index in part.indexes.tolist():
                yield part.mapping.segment, index, self.kind


class Segments:
    """What is mapped and in use, over all connections of a client. Used by several threads."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._changed = Condition(RLock())
        """Guards everything here; notified when a copy has ended."""
        self._newest: Connection | None = None
        self._welcome: dict[str, Any] | None = None
        """The reply that opened `_newest`: None until it came, and then copies may start."""
        self._mappings: dict[bytes, Mapping] = {}
        self._ordinals: dict[int, Mapping] = {}
        self._detached: deque[bytes] = deque(maxlen=DETACHED_REMEMBERED)
        self._copies: set[Copy] = set()
        self._owed: tuple[int, set[Copy]] = (0, set())
        """The lease that a resume gave, and the copies that must end before it does."""
        self._pins: Pins | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Segments: {len(self._mappings)} mapped, {len(self._copies)} copies>"

    # Connections.

    def renew(self, connection: Connection) -> tuple[set[Copy], bytes]:
        """From now on only this connection counts, and no copy starts until `accept`.

        Returns the copies in progress, as they are and as held records.
        """
        with self._changed:
            self._newest, self._welcome, self._owed = connection, None, (0, set())
            self._ordinals.clear()
            self._detached.clear()
            copies = set(self._copies)
            return copies, pack_held(record for copy in copies for record in copy.held())

    def forget(self) -> None:
        """The session that these were attached to is gone; raises Closed while a copy still uses one."""
        with self._changed:
            if self._copies:
                raise Closed("a copy of the session that is gone has not ended yet")
            self._owed = (0, set())
            for mapping in list(self._mappings.values()):
                self._give_up(mapping)

    def accept(self, welcome: dict[str, Any], copies: set[Copy] | None = None) -> None:
        """Copies may start on the newest connection. A resumed lease is released when `copies` have ended.

        What was not attached on this connection is given up: the daemon may have forgotten that it is mapped here.
        """
        with self._changed:
            if self._closed:
                raise Closed("this client was closed")
            attached = list(self._ordinals.values())
            for mapping in list(self._mappings.values()):
                if mapping not in attached:
                    self._give_up(mapping)
                else:  # the attach came before the reply that names the namespace
                    check_namespace(mapping, welcome)
            self._welcome = welcome
            self._owed = (welcome.get("lease", 0), (copies or set()) & self._copies)
            release = self._take_owed()
            connection = self._newest
        if release and connection:
            connection.tell("release", {"lease": release})

    # Segments.

    def pin(self, pins: Pins) -> None:
        """From now on what is mapped is registered with a driver, in the background, and what is mapped already too."""
        with self._changed:
            self._pins = pins
            for mapping in self._mappings.values():
                self._pin(mapping)

    def pushed(self, connection: Connection, message: dict[str, Any], descriptors: deque[int]) -> None:
        """Map what is attached. It comes before the reply that names its slots, and is handled before that."""
        if message["push"] != "attach":
            raise Invalid(f"push {message['push']!r} is unknown on this connection")
        for segment in check_values("attach", message, PUSHES["attach"])["segments"]:
            if len(descriptors) < 2:
                raise Invalid(f"attach came with {len(descriptors)} descriptors for a segment, not 2")
            directory, slots = descriptors.popleft(), descriptors.popleft()
            try:
                self._attach(connection, check_values("attach", segment, ATTACHED), directory, slots)
            finally:
                os.close(directory)
                os.close(slots)

    def detach(self, segments: list[Any]) -> list[bytes]:
        """Give segments back to the daemon; returns their ids once no copy uses them. Unknown ones are back already."""
        names = [check_values("detach", segment, SEGMENT)["segment"] for segment in segments]
        with self._changed:
            self._detached.extend(names)
            mappings = [self._mappings[name] for name in names if name in self._mappings]
            for mapping in mappings:
                self._give_up(mapping)
            self._changed.wait_for(lambda: self._closed or not any(mapping.users for mapping in mappings))
            if any(mapping.users for mapping in mappings):
                raise Closed("this client was closed while a copy uses a segment")
        return names

    def close(self, seconds: float) -> bool:
        """No copy starts any more, and what none uses is unmapped; returns whether all ended within `seconds`."""
        with self._changed:
            self._closed, self._welcome = True, None
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: not self._copies, seconds)
            for mapping in list(self._mappings.values()):
                self._give_up(mapping)
            return ended

    def _attach(self, connection: Connection, attached: dict[str, Any], directory: int, slots: int) -> None:
        if attached["tier"] != MAPPED_TIER:
            raise Invalid(f"attach: this client maps tier {MAPPED_TIER!r}, not {attached['tier']!r}")
        with self._changed:
            if connection is not self._newest or self._closed or attached["segment"] in self._detached:
                return
            mapping = self._mappings.get(attached["segment"])
            if mapping is None:
                mapping = Mapping(attached, directory, slots, self._layout)
                self._mappings[mapping.segment] = mapping
                if self._welcome is not None:
                    check_namespace(mapping, self._welcome)
                self._pin(mapping)
            replaced = self._ordinals.get(attached["ordinal"], mapping)
            if replaced is not mapping:
                self._give_up(replaced)
            self._ordinals[attached["ordinal"]] = mapping

    def _pin(self, mapping: Mapping) -> None:
        """Being registered is a use: nothing is unmapped under it."""
        if self._pins is not None:
            mapping.users += 1
            self._pins.add(mapping, partial(self._end_use, [mapping]))

    def _end_use(self, mappings: list[Mapping]) -> None:
        with self._changed:
            for mapping in mappings:
                mapping.users -= 1
                if not mapping.users and not mapping.wanted:
                    mapping.close()
            self._changed.notify_all()

    def _give_up(self, mapping: Mapping) -> None:
        """Forget a mapping; it is unmapped now or when its last copy has ended."""
        mapping.wanted = False
        self._mappings.pop(mapping.segment, None)
        self._ordinals = {ordinal: other for ordinal, other in self._ordinals.items() if other is not mapping}
        if not mapping.users:
            mapping.close()

    # Copies.

    @contextmanager
    def copying(self, connection: Connection, slots: NDArray[np.int32], kind: int) -> Iterator[list[Part]]:
        """Where `slots`, leased on `connection`, are while one copy lasts; raises Closed when that lease is gone."""
        with self._changed:
            if connection is not self._newest or self._welcome is None:
                raise Closed("the connection was lost, and what was leased on it")
            copy = Copy(locate(slots, self._welcome["slots_per_segment"], self._ordinals), kind)
            self._copies.add(copy)
            for part in copy.parts:
                part.mapping.users += 1
        try:
            yield copy.parts
        finally:
            self._end(copy)

    def _end(self, copy: Copy) -> None:
        with self._changed:
            self._copies.discard(copy)
            self._end_use([part.mapping for part in copy.parts])
            release = self._take_owed()
            connection = self._newest
        if release and connection:
            connection.tell("release", {"lease": release})

    def _take_owed(self) -> int:
        """The resumed lease if it can be released now, else 0."""
        lease, copies = self._owed
        copies &= self._copies
        if not lease or copies:
            return 0
        self._owed = (0, set())
        return lease


def check_namespace(mapping: Mapping, welcome: dict[str, Any]) -> None:
    """Nothing of another namespace is ever used."""
    if mapping.namespace != welcome["namespace"]:
        theirs, ours = mapping.namespace.hex()[:16], welcome["namespace"].hex()[:16]
        raise Invalid(f"segment {mapping.segment.hex()} is of namespace {theirs}, ours is {ours}")
