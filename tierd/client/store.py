"""Storing a run of blocks: batch by batch, where the next one is asked for while this one is copied.

A batch may follow blocks that are still being written, as long as they are committed before it; so commits go out in
order, each with the next request.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES
from tierd.client.connection import Connection, Ticket
from tierd.client.context import Context
from tierd.client.transfer import Pages, Pool
from tierd.errors import Closed, Gone, TierdError
from tierd.wire.messages import NO_ROOM, WRITING, unpack_slots

BATCH_BLOCKS = 32
BATCH_BYTES = 8 << 20
"""A batch has BATCH_BLOCKS, or as many smaller ones as make this: milliseconds of copying for each round trip."""


COMMITS_UNANSWERED = 2
"""A commit travels with the next request but one, and its answer comes with that one's: looking for it earlier costs a
system call."""


@dataclass(frozen=True)
class Stored:
    """What became of the blocks of one store: written now, there already (or being written by others), and neither.

    `parent_unknown` says why blocks were refused: tierd does not have the one before them, so nobody could find them.
    """

    stored: int = 0
    present: int = 0
    refused: int = 0
    parent_unknown: bool = False


@dataclass(frozen=True)
class Batch:
    """Blocks `first` to `last`, and the request for their slots; `ahead` of the commit of those before them."""

    first: int
    last: int
    ticket: Ticket
    ahead: bool


class Storing:
    """One call of `Client.store`."""

    def __init__(self, context: Context, hashes: bytes, parent: bytes, pool: Pool, pages: Pages) -> None:
        self._context = context
        self._hashes = hashes
        self._parent = parent
        self._pool = pool
        self._pages = pages
        self._blocks = len(pages)
        self._batch_blocks = min(max(BATCH_BLOCKS, BATCH_BYTES // context.layout.block_bytes), context.session.blocks_max)
        self._commits: deque[Ticket] = deque()
        self._stored = self._present = 0
        self._parent_unknown = False

    def run(self, connection: Connection) -> Stored:
        """Store what there is room for; whatever else happens, the rest is refused."""
        self._connection = connection
        batch: Batch | None = None
        try:
            batch = self._ask(0)
            while batch is not None:
                batch = self._store(batch)
        except TierdError as error:
            self._context.failed("store", error)
        finally:
            self._collect(0)
        self._context.count(blocks_stored=self._stored, bytes_stored=self._stored * self._context.layout.block_bytes)
        refused = max(0, self._blocks - self._stored - self._present)
        return Stored(self._stored, self._present, refused, self._parent_unknown)

    def _store(self, batch: Batch) -> Batch | None:
        """Take a batch's answer, ask for the next, copy and commit; returns the next, or None at the end."""
        try:
            lease, codes = self._placed(batch)
        except Gone:
            if not batch.ahead:
                self._parent_unknown = True
                raise
            return self._again(batch.first)
        done = len(codes)
        if codes.min() < 0:  # some are stored already, or there was no room
            full = codes == NO_ROOM
            done = int(full.argmax()) if full.any() else done
            self._present += int((codes[:done] < 0).sum())
        following = None
        if done == len(codes) and batch.last < self._blocks:
            following = self._ask(batch.last, ahead=True)
        else:
            self._connection.flush(self._context.deadline_seconds)
        try:
            self._write(lease, codes, batch.first, more=following is not None)
        except BaseException:
            if following is not None:
                self._connection.abandon(following.ticket)
            raise
        if done == len(codes):
            return following
        return self._again(batch.first + done) if done or batch.ahead else None

    def _ask(self, first: int, ahead: bool = False) -> Batch:
        last = min(first + self._batch_blocks, self._blocks)
        hashes = self._hashes[first * HASH_BYTES : last * HASH_BYTES]
        parent = self._hashes[(first - 1) * HASH_BYTES : first * HASH_BYTES] if first else self._parent
        arguments = {"hashes": hashes, "parent": parent}
        ticket = self._connection.ask("store", arguments, self._context.deadline_seconds, undo="abort")
        return Batch(first, last, ticket, ahead)

    def _again(self, first: int) -> Batch:
        """Ask for the blocks from `first` on once nothing of ours is uncommitted."""
        self._collect(0)
        return self._ask(first)

    def _placed(self, batch: Batch) -> tuple[int, NDArray[np.int32]]:
        reply = self._connection.wait(batch.ticket, self._context.deadline_seconds)
        self._context.session.absence.answered()
        codes = unpack_slots(reply["slots"])
        asked, lease = batch.last - batch.first, int(reply["lease"])
        if len(codes) != asked or codes.min() < NO_ROOM or bool(lease) != (codes.max() >= 0):
            raise Closed(f"store of {asked} blocks was answered with {len(codes)} slots and lease {lease}")
        return lease, codes

    def _write(self, lease: int, codes: NDArray[np.int32], first: int, more: bool) -> None:
        """Fill every slot that was given, and say so: with the next request, if `more` follows."""
        if not lease:
            return
        context = self._context
        given = (codes >= 0).nonzero()[0]
        try:
            with context.session.segments.copying(self._connection, codes[given], WRITING) as parts:
                context.copier.store(parts, self._pool, self._pages[first + given])
        except BaseException:
            self._connection.tell("abort", {"lease": lease})
            raise
        commit = self._connection.ask("commit", {"lease": lease}, context.deadline_seconds, later=more)
        self._commits.append(commit)
        self._collect(COMMITS_UNANSWERED)

    def _collect(self, left: int) -> None:
        """Wait for commits until only `left` are unanswered."""
        while len(self._commits) > left:
            try:
                reply = self._connection.wait(self._commits.popleft(), self._context.deadline_seconds)
                self._stored += reply["committed"]
            except TierdError as error:
                self._context.failed("commit", error)
