"""Slots as pages: a session of the paged tier computes in slots of its own, and names them when they are full.

A reserved page is a slot that its session fills; nobody else knows it, and its directory says FREE with the holder's bit
until it is named. From then on it is a block like any other, which the session goes on holding, to read. Whatever the
session holds ends by its release, once for each time that it was given, or with the session.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tierd.block import HASH_BYTES, ROOT
from tierd.core.index import Index
from tierd.core.ladder import PAGED
from tierd.core.plan import NAMED, UNNAMED, Slots, names, pick
from tierd.core.pool import FILLING
from tierd.core.publish import publish
from tierd.core.room import Room
from tierd.core.session import Session
from tierd.core.write_back import WriteBack
from tierd.errors import Busy, Invalid


class Pages:
    """What sessions of the paged tier ask for besides lookups and stores."""

    def __init__(self, index: Index, room: Room, write_back: WriteBack, counters: Counter[tuple[str, ...]]) -> None:
        self._index, self._room, self._write_back, self._counters = index, room, write_back, counters

    def reserve(self, session: Session, count: int, now: int) -> Slots:
        """Up to `count` slots to fill, at least one; raises Busy when every slot is held."""
        _check_paged(session, "reserve")
        slots = self._room.take(session.tier, count)
        if len(slots) < count:
            self._counters["reserve_short",] += 1
        if not len(slots):
            raise Busy("reserve: every page of the tier is held; release some, or go on without")
        session.pool.touched(slots, now)
        session.hold(slots)
        return slots

    def commit(self, session: Session, slots: Slots, parents: bytes, hashes: bytes, now: int) -> Slots:
        """Name reserved pages, a parent (32 bytes each) and a hash for every one; returns a code for each (int32[n]).

        NAMED: it is that block now, and stays held, to read. A slot number: the block is there already, and held from now
        on; the page stays reserved. UNNAMED: it stays reserved, because its parent is not known. A page that is not reserved
        (it was named and the answer got lost, or its segment is being given up) is NAMED: others may be reading it.
        """
        _check_paged(session, "commit_pages")
        _check_request(session, slots, parents, hashes)
        codes = np.where(session.pool.state[slots] == FILLING, np.int32(UNNAMED), np.int32(NAMED))
        runs, waiting = _runs(slots, parents, hashes), 0
        while len(runs) != waiting:  # a parent may be anywhere in the request
            waiting, unknown = len(runs), []
            for run in runs:
                if (found := self._commit(session, run, now)) is None:
                    unknown.append(run)
                else:
                    codes[run.first : run.first + len(found)] = found
            runs = unknown
        return codes

    def release(self, session: Session, slots: Slots) -> None:
        """Hold pages once less for each time that they are named."""
        _check_paged(session, "release_pages")
        session.drop(slots)

    def _commit(self, session: Session, run: _Run, now: int) -> Slots | None:
        """Name the pages of one chain; returns their codes, or None when the parent is not known."""
        pool, slots = session.pool, run.slots
        reserved = pool.state[slots] == FILLING
        placed = publish(self._index, session.tier, run.parents[:HASH_BYTES], run.hashes, np.where(reserved, slots, -1), now)
        if placed is None:
            return None
        if len(new := np.flatnonzero(reserved & (placed == slots))):
            pool.begin(slots[new], pick(run.hashes, new), pick(run.parents, new))
            pool.ready(slots[new])
            pool.use(slots[new])
            self._write_back.offer(session.tier, run.parents[:HASH_BYTES], run.hashes)
        codes: Slots = np.where(reserved & (placed != slots), placed, np.int32(NAMED))
        if len(others := codes[codes >= 0]):
            pool.use(others)
            session.hold(others)
        codes[reserved & (placed < 0)] = UNNAMED
        return codes


class _Run(NamedTuple):
    """Pages of one chain, head first, from position `first` of a request on."""

    first: int
    slots: Slots
    parents: bytes
    hashes: bytes


def _runs(slots: Slots, parents: bytes, hashes: bytes) -> list[_Run]:
    """Cut a request where a block does not follow the one before it."""
    above = np.frombuffer(parents, np.uint64).reshape(-1, HASH_BYTES // 8)
    blocks = np.frombuffer(hashes, np.uint64).reshape(-1, HASH_BYTES // 8)
    cuts = (np.flatnonzero((above[1:] != blocks[:-1]).any(1)) + 1).tolist()
    runs = []
    for first, end in pairwise([0, *cuts, len(slots)]):
        part = slice(first * HASH_BYTES, end * HASH_BYTES)
        runs.append(_Run(first, slots[first:end], parents[part], hashes[part]))
        distinct = set(names(hashes[part]))
        if len(distinct) < end - first or ROOT in distinct:
            raise Invalid("commit_pages: a hash is in a chain twice, or all zeros; hashes must be chained over their parents")
    return runs


def _check_request(session: Session, slots: Slots, parents: bytes, hashes: bytes) -> None:
    if not len(slots) * HASH_BYTES == len(parents) == len(hashes):
        sizes = f"{len(parents)} and {len(hashes)} bytes"
        raise Invalid(f"commit_pages: {len(slots)} slots came with {sizes} of parents and hashes: {HASH_BYTES} for each slot")
    if len(strangers := slots[~session.holds(slots)]):
        raise Invalid(f"commit_pages: slot {strangers[0]} is not held by this session: reserve it")
    if len(np.unique(slots)) < len(slots):
        raise Invalid("commit_pages: a slot is there twice; a page holds one block")


def _check_paged(session: Session, verb: str) -> None:
    if not session.paged:
        raise Invalid(f"{verb}: only sessions of the {PAGED} tier have pages: say so in hello")
