"""What an engine calls. Misuse raises Invalid; everything else that goes wrong is a miss, counted in `statistics`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tierd.block import HASH_BYTES, ROOT
from tierd.client.context import Context
from tierd.client.lookup import LookingUp, Lookup
from tierd.client.pins import Pins
from tierd.client.removals import Removed
from tierd.client.session import Session
from tierd.client.store import Stored, Storing
from tierd.client.transfer import Copier, Pool, as_pages, as_pool
from tierd.errors import Invalid, TierdError
from tierd.layout import Layout
from tierd.wire.messages import DATA, KEEP_MS_MAX, PRIORITY_MAX, PROTOCOL_VERSION, TURN_ENDS, check_values

COPY_THREADS_MAX = 64
KEEP_SECONDS_MIN, KEEP_SECONDS_MAX, KEEP_PRIORITY_MAX = 0.001, KEEP_MS_MAX / 1000, PRIORITY_MAX


class Client:
    """Loads and stores blocks of one model and layout. Threads may share it; a forked child needs one of its own.

    Connects when first used and again whenever it must; until then every call is a miss at once. `deadline_seconds`
    bounds each wait for the daemon; the time to copy is on top. `copy_threads` copy the blocks of one call. `name` is
    what the daemon calls this client. With `removals` it is told which blocks tierd has no more.
    """

    def __init__(
        self,
        socket: str | Path | None = None,
        *,
        model: str,
        layout: Layout,
        domain: str | None = None,
        deadline_seconds: float = 1.0,
        copy_threads: int = 1,
        name: str = "",
        removals: bool = False,
    ) -> None:
        if not 0 < deadline_seconds <= 600:
            raise Invalid(f"deadline_seconds must be over 0 and at most 600, not {deadline_seconds}")
        if not 1 <= copy_threads <= COPY_THREADS_MAX:
            raise Invalid(f"copy_threads must be from 1 to {COPY_THREADS_MAX}, not {copy_threads}")
        self.layout = layout
        self.deadline_seconds = deadline_seconds
        hello = {
            "version": PROTOCOL_VERSION,
            "model": model,
            "layout": layout.to_map(),
            "fingerprint": layout.fingerprint,
            "client": name,
            **({"domain": domain} if domain else {}),
            **({"removed": True} if removals else {}),
        }
        self.session = Session(Path(socket) if socket else default_socket(), hello, layout, deadline_seconds)
        self.copier = Copier(layout.block_bytes, copy_threads)
        self._pins: Pins | None = None
        self._context = Context(self.session, self.copier, layout, deadline_seconds)

    def __repr__(self) -> str:
        return f"<Client of {self.session.path}: {self.statistics}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, hashes: bytes, pool: Pool | NDArray[np.generic], pages: ArrayLike, parent: bytes = ROOT) -> int:
        """Copy the longest prefix that tierd has into `pages` of `pool`; returns its length in blocks, 0 for a miss.

        hashes: 32 bytes a block, head first, behind `parent`. pool: C-contiguous `[pages, ...]` with one block a page, or
        a Pool that knows where its pages are. pages: one page number a block. Pages behind the prefix may have been
        written to.
        """
        self._context.check_process()
        blocks = check_hashes(hashes, parent)
        rows = as_pool(pool, self.layout.block_bytes, writable=True)
        targets = as_pages(pages, rows)
        check_length(blocks, len(targets))
        done = 0
        while done < blocks:
            asked = min(blocks - done, self.session.blocks_max)
            with self._lookup(hashes[done * HASH_BYTES : (done + asked) * HASH_BYTES], parent).wait() as found:
                copied = found.copy_into(rows, targets[done : done + found.blocks])
            done += copied
            if copied < asked:
                break
            parent = hashes[(done - 1) * HASH_BYTES : done * HASH_BYTES]
        return done

    def store(self, hashes: bytes, pool: Pool | NDArray[np.generic], pages: ArrayLike, parent: bytes = ROOT) -> Stored:
        """Copy `pages` of `pool` into tierd where it does not have the block already; arguments as for `load`.

        Returns counts that sum to the blocks asked. Returns once what was written can be found by others.
        """
        self._context.check_process()
        blocks = check_hashes(hashes, parent)
        rows = as_pool(pool, self.layout.block_bytes, writable=False)
        sources = as_pages(pages, rows)
        check_length(blocks, len(sources))
        if not blocks:
            return Stored()
        self._context.count(requests=1)
        stored = Stored(refused=blocks)
        with self._context.missing("store"):
            connection = self.session.connection()
            stored = Storing(self._context, hashes, parent, rows, sources).run(connection)
        return stored

    def lookup(self, hashes: bytes, parent: bytes = ROOT) -> Lookup:
        """Lease the longest prefix that tierd has (of as many blocks as a request may name); release it when done."""
        self._context.check_process()
        check_hashes(hashes, parent)
        return self._lookup(hashes, parent).wait()

    def lookup_nowait(self, hashes: bytes, parent: bytes = ROOT) -> LookingUp:
        """As `lookup`, and `wait` gives what it would: who has several clients asks all of them before waiting for any."""
        self._context.check_process()
        check_hashes(hashes, parent)
        return self._lookup(hashes, parent)

    def prefetch(self, hashes: bytes, parent: bytes = ROOT) -> int:
        """Ask for the head of a prefix to be brought to memory; returns how many blocks are or will be there."""
        self._context.check_process()
        if not check_hashes(hashes, parent):
            return 0
        self._context.count(requests=1)
        blocks = 0
        with self._context.missing("prefetch"):
            connection = self.session.connection()
            arguments = {"hashes": hashes[: self.session.blocks_max * HASH_BYTES], "parent": parent}
            reply = connection.request("prefetch", arguments, self.deadline_seconds)
            self.session.absence.answered()
            blocks = int(reply["blocks"])
        return blocks

    def pin(self, pins: Pins) -> None:
        """Have segments registered with a GPU's driver in the background, now and when they come; closed with the client."""
        self._pins = pins
        self.session.segments.pin(pins)

    def ended(self, block: bytes, turn: str, conversation: str | None = None) -> None:
        """Say why a turn ended, for policies: a result of a tool call is awaited sooner than a next question.

        block: the hash (32 bytes) of the turn's last full block, ROOT if it has none. turn: "tool_use", "end_turn", "stop",
        "length" or "abort". conversation: up to 128 characters.
        """
        self._context.check_process()
        arguments = turn_ended(block, turn, conversation)
        with self._context.missing("ended"):
            self.session.connection().tell("ended", arguments, self.deadline_seconds)

    def keep(self, block: bytes, seconds: float, priority: int = 0) -> None:
        """Ask that a chain that is stored is not evicted for so long; `tierd pin` lists what is. Never waits.

        block: the hash (32 bytes) of the chain's last block. seconds: from 0.001 to 604,800, a week. priority: 0 to 100; where
        what is kept has no room in `policy.pinned_share`, lower ones go first, then those that end sooner.
        """
        self._context.check_process()
        arguments = keeping(block, seconds, priority)
        with self._context.missing("keep"):
            self.session.connection().tell("keep", arguments, self.deadline_seconds)

    def removed(self) -> Removed:
        """Which blocks of its namespace tierd has no more, as far as it was told since the last call (see `removals`).

        What is stored after this call, and goes, is told by a later one: a client that is not connected yet connects.
        """
        self._context.check_process()
        with suppress(TierdError):
            self.session.connection()
        return self.session.removals.take()

    @property
    def statistics(self) -> dict[str, Any]:
        """Counts since the start, among them `failures` by kind and `tiers`: blocks looked up by where they were."""
        return self._context.statistics() | (self._pins.statistics() if self._pins else {})

    def close(self) -> None:
        """Give everything back and disconnect; copies of other threads are waited for, at most the deadline."""
        if not self._context.is_ours:
            return  # the parent's connection, mappings and threads are none of this child's business
        self.session.close()
        self.copier.close()
        if self._pins:
            self._pins.close(self.deadline_seconds)

    def _lookup(self, hashes: bytes, parent: bytes) -> LookingUp:
        return LookingUp(self._context, hashes[: self.session.blocks_max * HASH_BYTES], parent)


def default_socket() -> Path:
    """Where the daemon of this user, or for root the system's, listens; $TIERD_SOCKET overrides it."""
    if given := os.environ.get("TIERD_SOCKET"):
        return Path(given)
    if os.getuid() == 0:
        return Path("/run/tierd/tierd.sock")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "tierd/tierd.sock")
    return Path(f"/tmp/tierd-{os.getuid()}/tierd.sock")


def check_hashes(hashes: bytes, parent: bytes) -> int:
    """The number of blocks in `hashes`; raises Invalid when it or `parent` cannot be what it should."""
    if not isinstance(hashes, bytes) or len(hashes) % HASH_BYTES:
        what = f"{len(hashes)} bytes" if isinstance(hashes, bytes) else type(hashes).__name__
        raise Invalid(f"hashes must be bytes in multiples of {HASH_BYTES}, not {what}")
    if not isinstance(parent, bytes) or len(parent) != HASH_BYTES:
        raise Invalid(f"parent must be {HASH_BYTES} bytes (ROOT for the start of a chain), not {parent!r:.80}")
    return len(hashes) // HASH_BYTES


def turn_ended(block: bytes, turn: str, conversation: str | None) -> dict[str, Any]:
    """Arguments of `ended`; raises Invalid when the daemon would refuse them."""
    check_hashes(b"", block)
    if turn not in TURN_ENDS:
        raise Invalid(f"turn {turn!r} is not one of {', '.join(TURN_ENDS)}")
    return check_values("ended", {"block": block, "turn": turn, "conversation": conversation}, DATA["ended"])


def keeping(block: bytes, seconds: float, priority: int) -> dict[str, Any]:
    """Arguments of `keep`; raises Invalid when the daemon would refuse them."""
    check_hashes(b"", block)
    if type(seconds) not in (int, float) or not KEEP_SECONDS_MIN <= seconds <= KEEP_SECONDS_MAX:
        raise Invalid(f"keep: seconds must be a number from {KEEP_SECONDS_MIN} to {KEEP_SECONDS_MAX:.0f}, not {seconds!r:.80}")
    return check_values("keep", {"block": block, "ttl_ms": round(seconds * 1000), "priority": priority}, DATA["keep"])


def check_length(blocks: int, pages: int) -> None:
    if blocks != pages:
        raise Invalid(f"{blocks} hashes and {pages} pages: one page a block")
