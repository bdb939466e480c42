"""Forgetting a namespace: nothing that was stored before a purge is found, read or entered after it.

Every segment is closed, so that what is being filled in one, by a client or by a transfer under way, cannot be published any
more. A reading lease keeps the slots that its client was told, since it may be copying from them, and loses the others.
"""

from __future__ import annotations

import numpy as np

from tierd.core.cache import Cache
from tierd.core.plan import Lease
from tierd.core.session import Session


def purge(cache: Cache) -> int:
    """Forget every block; returns how many there were. Segments are idle when the last user of their slots has gone."""
    blocks = cache.index.blocks
    cache.pins.clear()
    for session in cache.sessions.values():
        for lease in session.leases.values():
            if not lease.writing:
                _cut(session, lease)
    nodes = list(cache.index.nodes())
    for tier, pool in enumerate(cache.pools):
        for ordinal in pool.segments.keys() - pool.closing:
            pool.close_segment(ordinal)
        for node in nodes:
            offsets = np.flatnonzero(node.slots[tier] >= 0)
            if len(offsets):
                pool.retire(cache.index.clear(tier, node, offsets))
    cache.index.trim(nodes)
    cache.write_back.forget()
    cache.write_back.admission.forget()
    cache.counters["purged",] += blocks
    return blocks


def _cut(session: Session, lease: Lease) -> None:
    """End what a lease holds and its client was not told: to load it is as if it were lost."""
    untold = ~lease.told & (lease.slots.max(0, initial=-1) >= 0)
    if untold.any():
        session.let_go(lease, untold)
        lease.blocks = min(lease.blocks, int(untold.argmax()))
