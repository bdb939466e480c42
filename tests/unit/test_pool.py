"""The slots of a tier: taken, filled, used, retired, and never handed out while somebody uses them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sim.directories import Segment
from tierd.core.pool import FILLING, READY, RETIRED, Pool, rows_of


def pool_of(segments: int = 2, slots: int = 8) -> tuple[Pool, list[Segment]]:
    """A pool of free slots, and its segments."""
    pool, made = Pool(slots), [Segment(slots) for _ in range(segments)]
    for segment in made:
        pool.add_segment(segment.directory, 0)
    return pool, made


def fill(pool: Pool, count: int) -> np.ndarray:
    """Take slots and publish something in them."""
    slots = pool.take(count)
    pool.begin(slots, bytes(range(32)) * len(slots), bytes(32) * len(slots))
    pool.ready(slots)
    return slots


def test_a_slot_with_users_is_not_handed_out() -> None:
    """What left the index is free only when its last user lets go, and its directory row with it."""
    pool, (segment, *_) = pool_of(1)
    slots = fill(pool, 8)
    pool.use(slots[:3])
    pool.use(slots[:1])
    pool.retire(slots)
    assert pool.free == 5 and pool.counts()["retired"] == 3
    assert (segment.directory.codes()[slots[:3]] != 0).all() and (segment.directory.codes()[slots[3:]] == 0).all()
    pool.unuse(slots[:3])
    assert pool.free == 7
    pool.unuse(slots[:1])
    assert pool.free == 8
    pool.check()


def test_giving_back_too_often_is_noticed() -> None:
    """A use that nobody has is a bug, not a free slot."""
    pool, _ = pool_of()
    with pytest.raises(AssertionError, match="more often"):
        pool.unuse(fill(pool, 2))


def test_neighbours_are_taken_together() -> None:
    """A young pool hands out rising runs, which arrays can be sliced by; so does one whose runs came back."""
    pool, _ = pool_of(1, 256)
    first, second = pool.take(100), pool.take(100)
    assert np.concatenate((first, second)).tolist() == list(range(200))
    assert rows_of(first) == slice(0, 100)
    pool.give(first)
    assert pool.take(100).tolist() == list(range(100))
    assert isinstance(rows_of(first[::-1].copy()), np.ndarray)


def test_the_same_slots_whichever_way_they_are_indexed() -> None:
    """A slice and a list of rows name the same slots."""
    values = np.arange(1000)
    for slots in (np.arange(300, 500), np.array([5]), np.array([7, 8, 9]), np.arange(200)[::-1], np.arange(0, 400, 2)):
        assert values[rows_of(slots.astype(np.int32))].tolist() == slots.tolist()


def test_quarantined_slots_stay_out() -> None:
    """They are free on the medium, and in no list of this life, even when their last user lets go."""
    pool, (segment, *_) = pool_of(1)
    slots = fill(pool, 4)
    pool.use(slots[:2])
    pool.quarantine(slots[:2])
    pool.unuse(slots[:2])
    assert pool.free == 4 and pool.counts()["quarantined"] == 2
    assert (segment.directory.codes()[slots[:2]] == 0).all()
    pool.check()


def test_a_closing_segment_hands_out_nothing_and_is_idle_in_the_end() -> None:
    """What is being filled there retires; when all users have gone, its ordinal is used again."""
    pool, _ = pool_of(2)
    ready, filling = fill(pool, 10), pool.take(4)
    closed = ready[ready // 8 == 0]
    pool.close_segment(0)
    pool.retire(closed)
    assert pool.slots == 8 and all(slot >= 8 for slot in pool.take(16))
    inside = filling[filling // 8 == 0]
    assert (pool.state[inside] == RETIRED).all() and (pool.state[filling[filling // 8 == 1]] == FILLING).all()
    assert pool.is_idle(0) == (len(inside) == 0)
    pool.give(inside)
    pool.remove_segment(0)
    assert pool.add_segment(Segment(8).directory, 1) == 0 and pool.free == 8
    pool.check()


def test_recovered_slots_are_claimed() -> None:
    """They are in no list of free ones; claiming a slot that is taken is a bug."""
    pool, _ = pool_of(1)
    pool.claim(np.array([2, 5], np.int32), READY)
    assert pool.free == 6 and not {2, 5} & set(pool.take(8).tolist())
    with pytest.raises(AssertionError, match="claimed"):
        pool.claim(np.array([5], np.int32), READY)


def test_holder_bits_are_per_session() -> None:
    """Bits of several sessions on one slot do not touch each other, across segments and however slots are ordered."""
    pool, segments = pool_of(2, 128)
    slots = np.random.default_rng(1).permutation(256).astype(np.int32)[:180]
    pool.hold(slots, 3)
    pool.hold(np.arange(256, dtype=np.int32)[:200], 63)
    pool.unhold(slots[:90], 3)
    holders = np.concatenate([segment.directory.holders for segment in segments])
    assert set(np.flatnonzero(holders & np.uint64(1 << 3)).tolist()) == set(slots[90:].tolist())
    assert np.flatnonzero(holders >> np.uint64(63)).tolist() == list(range(200))


def test_slots_of_other_widths_are_not_taken_for_one_another() -> None:
    """The kept answer belongs to these slots, not to others of the same bytes."""
    pool = Pool(4)
    wide, narrow = np.array([5], np.int64), np.array([5, 0], np.int32)
    assert wide.tobytes() == narrow.tobytes()
    assert [(at, rows.tolist()) for at, rows, _ in pool.by_segment(wide)] == [(1, [1])]
    assert [(at, rows.tolist()) for at, rows, _ in pool.by_segment(narrow)] == [(1, [1]), (0, [0])]
