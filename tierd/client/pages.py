"""For engines that use the slots of the gpu tier as their own pages: a hit copies nothing, a store copies nothing.

Nothing here waits. Requests are tickets; `poll` takes what has arrived, and is to be called once in a while also when there
is nothing to do. Everything that goes wrong is an answer: nothing found, no pages, not named. A page that was given stays
mapped until it is released, whatever becomes of the daemon.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tierd.block import HASH_BYTES, ROOT
from tierd.client.client import check_hashes, default_socket, keeping, turn_ended
from tierd.client.connection import Connection, Ticket
from tierd.client.link import Link
from tierd.client.page_memory import PageMemory, Pages
from tierd.clock import monotonic_seconds
from tierd.cuda import Device
from tierd.devices import describe_device, gpu_number, host_id
from tierd.errors import Busy, Closed, Invalid, TierdError
from tierd.layout import Layout
from tierd.wire.messages import (
    ATTACHED,
    NAMED,
    PROTOCOL_VERSION,
    PUSHES,
    READING,
    UNNAMED,
    WRITING,
    check_values,
    pack_held,
    pack_slots,
    unpack_slots,
)

NO_PAGES: Pages = np.empty(0, np.int32)
RETRY_SECONDS = 0.01
"""How long a lookup that found no room for the rest of its blocks waits before it asks again."""


class Asked:
    """A request under way. `failed` says that the daemon is away, late or refused; `done` comes with either."""

    def __init__(self) -> None:
        self.done = False
        self.failed = False

    def fail(self) -> None:
        """There is no answer, or it was an error."""
        self.done = self.failed = True


class Reserved(Asked):
    """Pages to fill (int32): as many as were asked for, fewer, or none."""

    pages: Pages = NO_PAGES


class Named(Asked):
    """What became of each page (int32). NAMED (-1): it is that block now, and to be read only. A page number: the block is in
    that page, which is held now; the page that was to be named is still one's own. UNNAMED (-2): it is still one's own.

    A name whose answer got lost `failed` as NAMED: others may be reading the page, or nobody.
    """

    codes: Pages = NO_PAGES


class PageLookup(Asked):
    """The longest prefix that can be had: `blocks` of it, of which the first `ready` are in `pages` (int32) now.

    `done` when nothing more will come. Release it when its pages are not needed any more; before that it may be released at
    any time as well. `starved`: every page that the others could come to is held; they come when some are released.
    """

    def __init__(self, client: PageClient) -> None:
        super().__init__()
        self.blocks = 0
        self.pages: Pages = NO_PAGES
        self.tiers: dict[str, int] = {}
        self.life = 0
        """The connection that its lease is of."""
        self.lease = 0
        self.ticket: Ticket | None = None
        self.starved = False
        self._client = client

    @property
    def ready(self) -> int:
        """How many leading blocks are there now."""
        return len(self.pages)

    @property
    def answered(self) -> bool:
        """Whether `blocks` is known."""
        return self.done or self.lease != 0

    def fail(self) -> None:
        """What is there stays; more will not come."""
        super().fail()
        self.blocks, self.starved = self.ready, False

    def stop(self) -> None:
        """Be content with what is there."""
        self._client._stop_lookup(self)

    def release(self) -> None:
        """Let go of its pages, and of what was still to come."""
        self._client._end_lookup(self)


class PageClient:
    """Pages of one model and layout, for one thread. `memory` is uint8 `[pages_max + private_pages, slot_bytes]`.

    Numbers from `private` are memory of this process alone, for when there is no daemon: they are the engine's to keep
    account of. `deadline_seconds` is how long an answer may take; then the daemon counts as away. `device` ("cuda:0", by this
    process's numbers) must be a GPU that the daemon has a gpu tier on; then `memory` is a DeviceArray.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        model: str,
        layout: Layout,
        pages_max: int,
        private_pages: int = 0,
        deadline_seconds: float = 1.0,
        domain: str | None = None,
        name: str = "",
        device: str = "cpu",
    ) -> None:
        if pages_max < 1 or private_pages < 0:
            raise Invalid(f"pages_max must be at least 1 and private_pages 0, not {pages_max} and {private_pages}")
        hello = {
            "version": PROTOCOL_VERSION,
            "model": model,
            "layout": layout.to_map(),
            "fingerprint": layout.fingerprint,
            "client": name,
            "tier": "gpu",
            **({"domain": domain} if domain else {}),
        }
        self.deadline_seconds = deadline_seconds
        gpu = None if (number := gpu_number(device)) is None else Device(number)
        self._device = gpu.uuid if gpu else host_id(device)
        if self._device:
            hello["device"] = self._device
        self._memory = PageMemory(layout, pages_max, private_pages, gpu)
        self._reserved: NDArray[np.bool_] = np.zeros(pages_max, np.bool_)
        self._resuming = self._memory.held.copy()
        """What was held when a session was resumed last."""
        self._asked: deque[tuple[Ticket, Asked, Any, float]] = deque()
        """Requests without an answer, in order: with their arguments, and since when."""
        self._starved: list[tuple[PageLookup, bytes, float]] = []
        """Lookups that found no room, with their hashes, and when to ask again (monotonic seconds)."""
        self._link = Link(
            Path(path) if path else default_socket(),
            hello,
            deadline_seconds,
            on_push=self._pushed,
            held=self._held,
            greeted=self._greeted,
            lost=self._lost,
            detach=self._memory.give_back,
        )

    def __repr__(self) -> str:
        held = int((self._memory.held > 0).sum())
        return f"<PageClient of {self._link.path}: {held} pages held, {len(self._asked)} requests unanswered>"

    @property
    def memory(self) -> Any:
        """All pages: a numpy array, or a DeviceArray on a GPU. One that is not held must not be touched."""
        return self._memory.pages

    @property
    def private(self) -> range:
        """Numbers of the private pages."""
        return self._memory.private

    @property
    def alive(self) -> bool:
        """Whether the daemon is there."""
        return self._link.alive

    @property
    def trouble(self) -> str:
        """Why the connection was lost or refused the last time; empty if it never was."""
        return self._link.trouble

    @property
    def held(self) -> int:
        """Holds on slots, each page as often as it is held."""
        return int(self._memory.held.sum())

    def lookup(self, hashes: bytes, parent: bytes = ROOT) -> PageLookup:
        """Ask for the longest prefix of `hashes` (32 bytes each) behind `parent`, to be read in place."""
        found = PageLookup(self)
        found.life = self._link.life
        if check_hashes(hashes, parent):
            found.ticket = self._ask("lookup", {"hashes": hashes, "parent": parent}, found, hashes, undo="release")
        else:
            found.done = True
        return found

    def reserve(self, count: int) -> Reserved:
        """Ask for `count` pages to fill."""
        asked = Reserved()
        self._ask("reserve", {"count": count}, asked, None)
        return asked

    def commit(self, pages: ArrayLike, parents: bytes, hashes: bytes) -> Named:
        """Ask for full pages to be named, a parent and a hash (32 bytes) for each. They must not be written to any more: on a
        GPU, whatever writes to them has ended, since others read them on streams of their own.

        Pages of a session that is gone are not, whatever the daemon says: a new one may have slots of the same numbers.
        """
        slots = self._own(pages)
        if not len(slots) == check_hashes(hashes, ROOT) == check_hashes(parents, ROOT):
            raise Invalid(f"{len(slots)} pages, {len(hashes)} bytes of hashes and {len(parents)} of parents: 32 for each page")
        asked = Named()
        asked.codes = np.full(len(slots), UNNAMED, np.int32)
        if len(at := np.flatnonzero(np.isin(slots, self._memory.of_session(slots)))):
            named = {"slots": pack_slots(slots[at]), "parents": _pick(parents, at), "hashes": _pick(hashes, at)}
            self._ask("commit_pages", named, asked, (slots, at))
        else:
            asked.done = True
        return asked

    def release(self, pages: ArrayLike) -> None:
        """Let go of pages of `reserve` and `commit`, once for each time that they were given."""
        slots = self._own(pages)
        np.subtract.at(self._memory.held, slots, 1)
        if (self._memory.held[slots] < 0).any():
            np.add.at(self._memory.held, slots, 1)
            raise Invalid("a page was released more often than it was given")
        known = self._memory.of_session(slots)
        self._reserved[slots[self._memory.held[slots] == 0]] = False
        if len(known):
            self._tell("release_pages", {"slots": pack_slots(known)})
        self._memory.settle()

    def ended(self, block: bytes, turn: str, conversation: str | None = None) -> None:
        """Say why a turn ended (see `Client.ended`)."""
        self._tell("ended", turn_ended(block, turn, conversation))

    def keep(self, block: bytes, seconds: float, priority: int = 0) -> None:
        """Ask that a chain is not evicted for so long (see `Client.keep`)."""
        self._tell("keep", keeping(block, seconds, priority))

    def poll(self) -> None:
        """Take what has arrived, never waiting; connects again when it is time to."""
        self._link.poll()
        now = monotonic_seconds()
        for _ in range(len(self._asked)):
            if not self._asked:
                break
            ticket, asked, about, since = self._asked.popleft()
            if not self._take(ticket, asked, about):
                self._asked.append((ticket, asked, about, since))
                if now > since + self.deadline_seconds and self._link.connection is not None:
                    self._link.drop(f"{ticket.verb} was not answered within {self.deadline_seconds:g} s")
        waiting, self._starved = self._starved, []
        for found, hashes, again in waiting:
            if now < again:
                self._starved.append((found, hashes, again))
            elif not found.done:
                self._ask_for_rest(found, hashes)

    def wait(self, seconds: float) -> None:
        """Sleep until something has arrived: for an engine that has nothing else to do."""
        self._link.wait(seconds)

    def close(self) -> None:
        """Give everything back. Nothing may use the memory any more."""
        self._link.close()
        self._fail_all()
        self._memory.held[:] = 0
        self._memory.close()

    # -- requests and their answers -----------------------------------------------------------------------------------

    def _ask(self, verb: str, arguments: dict[str, Any], asked: Asked, about: Any, undo: str | None = None) -> Ticket | None:
        """Send a request, or fail it at once."""
        try:
            if not self._link.alive or self._link.connection is None:
                raise Closed("there is no daemon")
            ticket = self._link.connection.ask(verb, arguments, self.deadline_seconds, undo)
        except TierdError:
            asked.fail()
            return None
        self._asked.append((ticket, asked, about, monotonic_seconds()))
        return ticket

    def _tell(self, verb: str, arguments: dict[str, Any]) -> None:
        """Send what wants no answer. While there is no daemon nothing needs to be said: `resume` says what is held."""
        if self._link.alive and self._link.connection is not None:
            self._link.connection.tell(verb, arguments, self.deadline_seconds)

    def _take(self, ticket: Ticket, asked: Asked, about: Any) -> bool:
        """Act on the answer to a request, if it is there."""
        connection = self._link.connection
        if ticket.abandoned or asked.done:
            return True
        if connection is None:
            return False
        try:
            reply = connection.answer(ticket)
        except Busy:
            if isinstance(asked, PageLookup) and ticket.verb == "load":
                asked.starved, asked.ticket = True, None
                self._starved.append((asked, about, monotonic_seconds() + RETRY_SECONDS))
            else:
                asked.fail()
            return True
        except TierdError:
            asked.fail()
            return True
        if reply is None:
            return False
        try:
            match asked:
                case Reserved():
                    asked.pages, asked.done = self._given(unpack_slots(reply["slots"])), True
                    self._reserved[asked.pages] = True
                case Named():
                    slots, at = about
                    asked.codes[at], asked.done = self._named(slots[at], unpack_slots(reply["codes"])), True
                case PageLookup():
                    self._found(asked, about, ticket.verb, reply)
        except TierdError as error:
            asked.fail()
            self._link.drop(str(error))
        return True

    def _given(self, slots: Pages) -> Pages:
        """Hold slots that the daemon has named; those that have no page here go back at once."""
        usable = self._memory.usable(slots)
        if not usable.all():
            self._tell("release_pages", {"slots": pack_slots(slots[~usable])})
            slots = slots[usable]
        np.add.at(self._memory.held, slots, 1)
        return slots.copy()

    def _named(self, slots: Pages, codes: Pages) -> Pages:
        if len(codes) != len(slots) or (codes < UNNAMED).any():
            raise Closed(f"commit_pages of {len(slots)} pages was answered with {len(codes)} codes")
        self._reserved[slots[codes == NAMED]] = False
        held = self._given(codes[codes >= 0])
        return np.where((codes >= 0) & ~np.isin(codes, held), UNNAMED, codes).astype(np.int32)

    def _found(self, found: PageLookup, hashes: bytes, verb: str, reply: dict[str, Any]) -> None:
        """Take over what a lookup or load has named, and ask for what is still to come."""
        if verb == "lookup":
            found.lease, found.blocks, found.tiers = reply["lease"], reply["blocks"], reply["tiers"]
        slots = unpack_slots(reply["slots"])
        usable = self._memory.usable(slots)
        if not usable.all():  # their places are not free yet
            slots = slots[: int(usable.argmin())]
            found.blocks = found.ready + len(slots)
        if found.ready + len(slots) > min(found.blocks, len(hashes) // HASH_BYTES):
            raise Closed(f"{verb} of {len(hashes) // HASH_BYTES} blocks was answered with {len(slots)} slots")
        self._memory.held[slots] += 1
        found.pages = np.concatenate((found.pages, slots))
        found.starved = False
        if found.ready == found.blocks:
            found.done = True
        else:
            self._ask_for_rest(found, hashes)

    def _ask_for_rest(self, found: PageLookup, hashes: bytes) -> None:
        """Ask for the blocks that are not there yet."""
        arguments = {"lease": found.lease, "first": found.ready, "count": found.blocks - found.ready}
        found.ticket = self._ask("load", arguments, found, hashes)

    def _stop_lookup(self, found: PageLookup) -> None:
        """Do not wait for more; what comes all the same goes with the lease."""
        if found.ticket is not None and self._link.connection is not None and not found.done:
            self._link.connection.abandon(found.ticket)
        found.blocks, found.done, found.starved = found.ready, True, False

    def _end_lookup(self, found: PageLookup) -> None:
        """Give a lookup's pages back: with its lease, or one by one if its connection is gone."""
        self._stop_lookup(found)
        pages, found.pages, found.blocks = found.pages, NO_PAGES, 0
        self._memory.held[pages] -= 1
        if found.life == self._link.life:
            if found.lease:
                self._tell("release", {"lease": found.lease})
        elif len(known := self._memory.of_session(pages)):
            self._tell("release_pages", {"slots": pack_slots(known)})
        found.lease = 0
        self._memory.settle()

    def _own(self, pages: ArrayLike) -> Pages:
        slots = np.asarray(pages, np.int32).reshape(-1)
        if len(slots) and not ((slots >= 0) & (slots < self._memory.pages_max)).all():
            raise Invalid(f"pages must be from 0 to {self._memory.pages_max - 1}: private ones are nobody else's business")
        return slots

    # -- the connection's life ----------------------------------------------------------------------------------------

    def _pushed(self, connection: Connection, message: dict[str, Any], descriptors: deque[int]) -> None:
        """Map what is attached, before the reply that names its slots is looked at."""
        if message["push"] != "attach":
            raise Invalid(f"push {message['push']!r} is unknown on this connection")
        for segment in check_values("attach", message, PUSHES["attach"])["segments"]:
            attached = check_values("attach", segment, ATTACHED)
            if len(descriptors) < 2:
                raise Invalid(f"attach came with {len(descriptors)} descriptors for a segment, not 2")
            directory, slots = descriptors.popleft(), descriptors.popleft()
            try:
                self._memory.attach(attached, directory, slots)
            finally:
                os.close(directory)
                os.close(slots)
        if self._link.welcome:
            self._memory.check_namespace(self._link.welcome["namespace"])

    def _held(self) -> bytes:
        """Everything that is held, for `resume`."""
        self._resuming = self._memory.held.copy()
        records = self._memory.records()
        return pack_held((segment, at, WRITING if self._reserved[page] else READING) for segment, at, page in records)

    def _greeted(self, resumed: bool) -> None:
        theirs, ours = self._link.welcome.get("device", b""), self._device
        if theirs != ours:
            there, here = map(describe_device, (theirs, ours))
            raise Invalid(f"the daemon's gpu tier is in {there}, this client's pages are in {here}: give both the same device")
        self._memory.check_namespace(self._link.welcome["namespace"])
        if not resumed:
            self._memory.orphan()
            return
        released = np.flatnonzero(self._resuming > self._memory.held)  # while the daemon was not listening
        pages = np.repeat(released, (self._resuming - self._memory.held)[released]).astype(np.int32)
        if len(known := self._memory.of_session(pages)):
            self._tell("release_pages", {"slots": pack_slots(known)})

    def _lost(self) -> None:
        self._fail_all()
        self._memory.give_back()

    def _fail_all(self) -> None:
        """Nothing that was asked will be answered."""
        while self._asked:
            _, asked, about, _ = self._asked.popleft()
            if asked.done:
                continue
            asked.fail()
            if isinstance(asked, Named):
                slots, at = about
                asked.codes[at] = NAMED
                self._reserved[slots[at]] = False
        waiting, self._starved = self._starved, []
        for found, _, _ in waiting:
            if not found.done:
                found.fail()


def _pick(hashes: bytes, at: NDArray[np.intp]) -> bytes:
    return np.frombuffer(hashes, f"V{HASH_BYTES}")[at].tobytes()
