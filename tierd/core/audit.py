"""Whether tree, slots, leases and transfers add up: the core's books, checked in tests and in idle time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tierd.core.index import Index
from tierd.core.ladder import Ladder
from tierd.core.pins import Pins
from tierd.core.plan import Slots, Transfer
from tierd.core.pool import FILLING, READY
from tierd.core.session import Session


def audit(index: Index, ladder: Ladder, sessions: list[Session], transfers: list[Transfer], pins: Pins) -> None:
    """Raise AssertionError at the first thing that is wrong: every part is checked by itself, then against the others."""
    index.check()
    for session in sessions:
        session.check()
    for tier, (name, pool) in enumerate(zip(ladder.names, ladder.pools, strict=True)):
        pool.check()
        users, fillers = _users(tier, name, len(pool.users), sessions, transfers, pins)
        wrong = np.flatnonzero(users != pool.users)
        assert not len(wrong), f"{name} slots {wrong[:8]} have users {pool.users[wrong[:8]]}, not {users[wrong[:8]]}"
        filling = np.setdiff1d(np.flatnonzero(pool.state == FILLING), fillers)
        assert not len(filling), f"nobody fills {name} slots {filling[:8]}"
        slots = np.concatenate([np.empty(0, np.int32), *(node.slots[tier] for node in index.nodes())])
        slots = np.sort(slots[slots >= 0])
        assert not (slots[1:] == slots[:-1]).any(), f"a {name} slot is in the tree twice"
        stray = np.setxor1d(slots, np.flatnonzero(pool.state == READY))
        assert not len(stray), f"{name} slots {stray[:8]} are ready or in the tree, but not both"


def _users(
    tier: int, name: str, slots: int, sessions: list[Session], transfers: list[Transfer], pins: Pins
) -> tuple[NDArray[np.int32], Slots]:
    """By slot (of `slots`): how many leases, pages, transfers and pins use it; and the slots that somebody fills."""
    used: list[Slots] = [np.empty(0, np.int32)]
    filled: list[Slots] = [np.empty(0, np.int32)]
    for session in sessions:
        for lease in session.leases.values():
            used.append(lease.slots[tier])
            if lease.writing and tier == session.tier:
                filled.append(lease.here)
        if tier == session.tier:
            used += session.used()
            filled.append(session.all_pages())
    used += [slots[tier] for slots in pins.chains.values()]
    for transfer in transfers:
        if transfer.source == name:
            used.append(transfer.source_slots)
        elif transfer.target == name:
            used.append(transfer.target_slots)
            filled.append(transfer.target_slots)
    all_used = np.concatenate(used)
    return np.bincount(all_used[all_used >= 0], minlength=slots).astype(np.int32), np.concatenate(filled)
