"""What a cache says of blocks that are gone. The worlds of `tests/sim` ask after every step; here are the cases by name."""

from __future__ import annotations

import numpy as np

from tests.sim.cases import crowd_out, put, put_below, small
from tests.sim.clients import chain
from tests.sim.world import UPPER, World
from tierd.block import split
from tierd.core import removed
from tierd.core.removed import BLOCKS_MAX, Removed


def told(world: World) -> tuple[list[bytes], bool]:
    """What the cache has noted since the last look; the world does not look meanwhile."""
    assert world.cache.index.removed is not None
    hashes, too_many = world.cache.index.removed.take()
    return list(split(hashes)), too_many


def test_a_block_that_has_another_copy_is_not_gone() -> None:
    """Evicted from memory it is still below; only with its last copy it goes."""
    world, client = small()
    hashes = chain(range(6))
    put_below(world, client, hashes)
    crowd_out(world, client)
    assert all(UPPER not in world.where[block] for block in hashes)
    for ordinal in list(world.segments[1]):
        world.cache.vacate(1, ordinal)
    gone, _ = told(world)
    assert set(hashes) <= set(gone)


def test_a_hole_is_gone_though_what_is_behind_it_stays() -> None:
    """A lease on a chain's end keeps that, and its head goes: nobody can have the head any more."""
    world, client = small(upper=1, lower=0)
    hashes = chain(range(8))
    put(world, client, hashes)
    found = world.cache.lookup(client.id, b"".join(hashes[4:]), hashes[3], world.now)
    assert found.blocks == 4
    assert world.cache.store(client.id, b"".join(chain(range(50, 54))), bytes(32), world.now).lease
    assert told(world) == (hashes[:4], False)
    assert world.cache.index.find(hashes[0]) and world.cache.index.find(hashes[7])


def test_nothing_is_noted_for_nobody() -> None:
    """Without a listener there is nothing to fill up."""
    world, client = small(upper=1, lower=0)
    put(world, client, chain(range(8)))
    world.cache.index.removed = None
    world.cache.vacate(0, 0)
    assert not world.cache.index.blocks


def test_too_many_to_name_are_only_said_to_be_too_many() -> None:
    """Memory has a bound, whoever does not listen; the next ones are named again."""
    woken: list[int] = []
    noted = Removed(lambda: woken.append(1))
    hashes = np.arange(BLOCKS_MAX * 4, dtype="<u8").tobytes()
    nowhere = np.full((2, BLOCKS_MAX), -1, np.int32)
    noted.note(hashes, nowhere, slice(None))
    noted.note(hashes, nowhere, slice(0, 0))
    assert len(woken) == 1
    noted.note(hashes, nowhere, slice(0, 1))
    noted.note(hashes, nowhere, slice(0, 9))
    assert noted.take() == (b"", True)
    assert noted.take() == (b"", False)
    noted.note(hashes, nowhere, np.array([3]))
    assert noted.take() == (hashes[96:128], False) and len(woken) == 2
    assert removed.BLOCKS_MAX * 32 <= 1 << 20, "one push of them is a frame that every client takes"
