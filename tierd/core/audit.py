"""Whether tree, slots, leases and transfers add up: the core's books, checked in tests and in idle time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tierd.core.index import Index
from tierd.core.plan import TIERS, UPPER, Slots, Transfer
from tierd.core.pool import FILLING, READY, Pool
from tierd.core.session import Session


def audit(index: Index, pools: list[Pool], sessions: list[Session], transfers: list[Transfer]) -> None:
    """Raise AssertionError at the first thing that is wrong: every part is checked by itself, then against the others."""
    index.check()
    for session in sessions:
        session.check()
    for tier, pool in enumerate(pools):
        pool.check()
        name = TIERS[tier]
        users, fillers = _users(tier, len(pool.users), sessions, transfers)
        wrong = np.flatnonzero(users != pool.users)
        assert not len(wrong), f"{name} slots {wrong[:8]} have users {pool.users[wrong[:8]]}, not {users[wrong[:8]]}"
        filling = np.setdiff1d(np.flatnonzero(pool.state == FILLING), fillers)
        assert not len(filling), f"nobody fills {name} slots {filling[:8]}"
        slots = np.concatenate([np.empty(0, np.int32), *(node.slots[tier] for node in index.nodes())])
        slots = np.sort(slots[slots >= 0])
        assert not (slots[1:] == slots[:-1]).any(), f"a {name} slot is in the tree twice"
        stray = np.setxor1d(slots, np.flatnonzero(pool.state == READY))
        assert not len(stray), f"{name} slots {stray[:8]} are ready or in the tree, but not both"


def _users(tier: int, slots: int, sessions: list[Session], transfers: list[Transfer]) -> tuple[NDArray[np.int32], Slots]:
    """By slot (of `slots`): how many leases and transfers use it; and the slots that somebody fills."""
    used: list[Slots] = [np.empty(0, np.int32)]
    filled: list[Slots] = [np.empty(0, np.int32)]
    for session in sessions:
        for lease in session.leases.values():
            used.append(lease.upper if tier == UPPER else lease.lower)
            if lease.writing and tier == UPPER:
                filled.append(lease.upper)
        if tier == UPPER:
            used.append(session.restored)
    for transfer in transfers:
        if transfer.source == TIERS[tier]:
            used.append(transfer.source_slots)
        else:
            used.append(transfer.target_slots)
            filled.append(transfer.target_slots)
    all_used = np.concatenate(used)
    return np.bincount(all_used[all_used >= 0], minlength=slots).astype(np.int32), np.concatenate(filled)
