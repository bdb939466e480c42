"""Slots as pages: the slots of the daemon's gpu tier are the engine's pages, so neither a hit nor a store copies anything.

Behind the slots lie pages of the engine's own, for when tierd is away or all of its slots are held. A page belongs to its
users here (`Blocks`), whether it is a slot or not; slots that nobody here uses any more go back to the daemon, which keeps
what was named. What a lookup found is held by its lease instead, apart from that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as List
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tierd.block import HASH_BYTES, ROOT, split
from tierd.client.pages import PageClient
from tierd.clock import monotonic_seconds
from tierd.errors import Invalid
from tierd.layout import Layout
from tierd_engine.load import Speeds
from tierd_engine.memory import NAMED, NAMELESS, Commit, Lookup, Reservation
from tierd_engine.pages import Accounts, Blocks, dtype_of, page_shape
from tierd_engine.request import Hints

SLOTS_MAX = 1 << 16
"""Slots that the engine has addresses for; what the gpu tier has beyond is not used."""
GREETING_PAUSE_SECONDS = 0.005


T = TypeVar("T", "Found", "Reserving", "Committing")


class TierMemory:
    """The gpu tier as pages; owns the client, whose private pages are the `count` that a sequence can always have.

    Nothing waits but the construction: for the daemon's greeting, within the client's deadline. Poll also when idle: slots
    can change hands only then. Without a daemon everything goes on in the pages that are held and in the private ones.
    """

    def __init__(self, layout: Layout, client: PageClient) -> None:
        if not len(client.private):
            raise Invalid("pages: without private pages nothing runs while tierd is away; give the client at least 1")
        self.layout, self.client = layout, client
        self.count = len(client.private)
        numbers = tensor_over(client.memory).view(dtype_of(layout))
        shape = page_shape(layout)
        self.tensor = numbers[:, : int(np.prod(shape))].unflatten(1, shape)
        self.pool = Accounts(client.private)
        self.blocks = Blocks(self.pool)
        self.speeds = Speeds()
        self.hits: Counter[str] = Counter()
        self._asked: list[Found | Reserving | Committing] = []
        deadline = monotonic_seconds() + client.deadline_seconds
        while not client.alive and monotonic_seconds() < deadline:
            client.poll()
            client.wait(GREETING_PAUSE_SECONDS)

    def lookup(self, hashes: bytes) -> Lookup:
        """What is in use just now and, asked of the daemon, what is in its tiers: it comes to the gpu tier by itself."""
        return self._settled(Found(self, hashes))

    def reserve(self, count: int, urgent: bool = False) -> Reservation:
        """Slots; pages of our own when tierd is away, or has none and it is urgent: what is in them is in no tier."""
        return self._settled(Reserving(self, count, urgent))

    def commit(self, pages: List[int], parents: bytes, hashes: bytes) -> Commit:
        """Name slots, for everybody; and what the daemon does not take among ourselves."""
        return self._settled(Committing(self, pages, parents, hashes))

    def release(self, pages: List[int]) -> None:
        """End the caller's hold; the daemon is told of slots that nobody here uses any more."""
        if slots := [page for page in self.blocks.release(pages) if page not in self.pool.own]:
            self.client.release(slots)

    def ended(self, block: bytes, turn: str, hints: Hints) -> None:
        """Tell the daemon."""
        hints.tell(self.client, block, turn)

    def poll(self) -> None:
        """Take what has arrived; joins the daemon again when it is back."""
        self.client.poll()
        self._asked = [asked for asked in self._asked if not asked.settle()]

    def wait(self, seconds: float) -> None:
        """Sleep until the daemon says something."""
        self.client.wait(seconds)

    def check(self) -> None:
        """Nobody uses a page, none has a name here, no slot is held."""
        self.poll()
        assert not self._asked, f"{len(self._asked)} requests are not settled"
        self.pool.check_idle()
        self.blocks.check_empty()
        assert not self.client.held, f"{self.client!r} holds slots that nobody uses"

    def statistics(self) -> dict[str, int]:
        """Free pages of our own, and blocks looked up by where they were."""
        return {"pages_free": self.pool.free_count} | {f"hit_{tier}": blocks for tier, blocks in self.hits.items()}

    def close(self) -> None:
        """Give all slots back. The tensor must not be touched any more."""
        self.client.close()

    # For tickets.

    def private(self, count: int) -> list[int]:
        """Up to `count` pages of our own."""
        return self.pool.allocate(min(count, self.pool.free_count))

    def adopt(self, slots: list[int]) -> list[int]:
        """Slots that the daemon gave, made to hold finite numbers.

        Whatever was in a slot before is there still, perhaps the remains of a transfer that failed. Zeroing it costs some 12
        to 70 us for 720 KiB, a thousandth of what computing its tokens does.
        """
        self.pool.adopt(slots)
        for slot in slots:
            self.tensor[slot].zero_()
        return slots

    def name(self, page: int, name: bytes, told: int) -> int:
        """A full page is that block: the code for whoever filled it, after what the daemon has told."""
        if told == NAMELESS:  # it may be the first one here all the same
            twin = self.blocks.put(page, name)
            return NAMED if twin is None else twin
        if told >= 0 and self.pool.used(told):
            self.pool.share([told])
            self.client.release([told])  # held once for all users here
        elif told >= 0:
            self.pool.adopt([told])
        if self.blocks.get(name) is None:
            self.blocks.put(page if told == NAMED else told, name)
        return told

    def _settled(self, asked: T) -> T:
        if not asked.settle():
            self._asked.append(asked)
        return asked


class Found:
    """A lookup: leading blocks that are live here, then what the daemon brings, then what is live behind that."""

    def __init__(self, memory: TierMemory, hashes: bytes) -> None:
        self._memory, self._hashes = memory, hashes
        self._live = memory.blocks.share_prefix(hashes)
        self._behind: list[int] = []
        first = len(self._live) * HASH_BYTES
        self._found = memory.client.lookup(hashes[first:], hashes[first - HASH_BYTES : first] if first else ROOT)
        self._medium = "memory"
        self._told = 0
        self._began = self._absent = -1.0
        """When the daemon answered, and when a poll last found something missing: it has taken at least that long."""
        self._settled = False
        memory.hits["live"] += len(self._live)

    @property
    def done(self) -> bool:
        """Whether the daemon has answered: blocks may be on their way still."""
        return self._found.answered

    @property
    def blocks(self) -> int:
        """How many leading blocks can be had."""
        return len(self._live) + self._found.blocks + len(self._behind)

    @property
    def ready(self) -> int:
        """How many of them are there."""
        return len(self._live) + self._found.ready + len(self._behind)

    @property
    def seconds(self) -> float:
        """How long the rest is expected to take."""
        return self._memory.speeds.estimate(self.blocks - self.ready, self._medium)

    @property
    def starved(self) -> bool:
        """Whether every slot that the rest could come to is held."""
        return self._found.starved

    @property
    def pages(self) -> List[int]:
        """The pages of the blocks that are ready."""
        return [*self._live, *self._found.pages.tolist(), *self._behind]

    def settle(self) -> bool:
        """Whether nothing more will come; measures how long it took."""
        found = self._found
        if self._settled or not found.answered:
            return self._settled
        now, speeds = monotonic_seconds(), self._memory.speeds
        if self._began < 0:
            self._memory.hits.update(found.tiers)
            self._medium = "disk" if found.tiers.get("nvme") else "memory"
            self._began, self._told = now, found.ready
        if not found.done:
            self._absent = now
            return False
        if self._absent > 0 and found.ready > self._told:
            speeds.measured(self._medium, found.ready - self._told, self._absent - self._began, whole=True)
        self._behind = self._memory.blocks.share_prefix(self._hashes[self.blocks * HASH_BYTES :])
        self._memory.hits["live"] += len(self._behind)
        self._settled = True
        return True

    def stop(self) -> None:
        """Be content with what is ready."""
        if self._settled:
            return
        speeds, missing = self._memory.speeds, self._found.blocks - self._told
        speeds.decline(self._medium)
        if self._began >= 0 and missing:
            speeds.measured(self._medium, missing, monotonic_seconds() - self._began, whole=False)
        self._settled = True
        self._found.stop()

    def release(self) -> None:
        """Give all pages back, and do not wait for more."""
        self._settled = True
        self._found.release()
        live, self._live, self._behind = [*self._live, *self._behind], [], []
        self._memory.release(live)


class Reserving:
    """Slots as soon as the daemon has answered, or pages of our own."""

    def __init__(self, memory: TierMemory, count: int, urgent: bool) -> None:
        self.done = False
        self.pages: List[int] = []
        self._memory, self._count, self._urgent = memory, count, urgent
        self._reserved = memory.client.reserve(count)

    def settle(self) -> bool:
        """Whether there is an answer; the pages are counted with it."""
        if self._reserved.done:
            memory, slots = self._memory, self._reserved.pages.tolist()
            if slots:
                self.pages = memory.adopt(slots)
            elif self._urgent or not memory.client.alive:
                self.pages = memory.private(self._count)
            self.done = True
        return self.done


class Committing:
    """Names for pages: the daemon's for slots, and ours for all."""

    def __init__(self, memory: TierMemory, pages: List[int], parents: bytes, hashes: bytes) -> None:
        self.done = False
        self.codes: NDArray[np.int32] = np.full(len(pages), NAMELESS, np.int32)
        if memory.tensor.is_cuda:  # a page that has a name is read by others, on streams of their own
            torch.cuda.current_stream(memory.tensor.device).synchronize()
        self._memory, self._pages, self._names = memory, pages, list(split(hashes))
        self._at = [at for at, page in enumerate(pages) if page not in memory.pool.own]
        slots = [pages[at] for at in self._at]
        above = list(split(parents))
        self._named = memory.client.commit(
            slots, b"".join(above[at] for at in self._at), b"".join(self._names[at] for at in self._at)
        )

    def settle(self) -> bool:
        """Whether the daemon has answered; then the pages are blocks."""
        if self._named.done and not self.done:
            self.codes[self._at] = self._named.codes
            told = zip(self._pages, self._names, self.codes.tolist(), strict=True)
            self.codes[:] = [self._memory.name(page, name, code) for page, name, code in told]
            self.done = True
        return self.done


def tensor_over(memory: Any) -> torch.Tensor:
    """A client's pages as uint8 `[pages, slot_bytes]`, on the GPU where they are, and not a copy.

    The device is named, because torch would ask the driver what the first address is, and no segment may be there yet.
    """
    if isinstance(memory, np.ndarray):
        return torch.from_numpy(memory)
    return torch.as_tensor(memory, device=f"cuda:{memory.device.number}")
