"""Small worlds and the usual things that clients do there, for tests of single cases."""

from __future__ import annotations

from tests.sim.clients import Client, chain
from tests.sim.world import LOWER, UPPER, World
from tierd.block import ROOT
from tierd.core.plan import Wait

LONG = chain(range(100, 140))
"""Longer than the upper tier of a small world."""


def small(upper: int = 2, lower: int = 8, share: float = 0.25) -> tuple[World, Client]:
    """Segments of eight slots, and one client."""
    world = World(upper, lower, slots=8, window_share=share)
    return world, world.open()


def put(world: World, client: Client, hashes: list[bytes], parent: bytes = ROOT) -> None:
    """Store and commit as much as has room."""
    if lease := world.store(client, hashes, parent):
        world.commit(client, lease)
    world.check()


def put_below(world: World, client: Client, hashes: list[bytes]) -> None:
    """Store a chain part by part, and write each part back."""
    for at in range(0, len(hashes), 4):
        put(world, client, hashes[at : at + 4], hashes[at - 1] if at else ROOT)
        world.run_all()
    assert all(LOWER in world.where[block] for block in hashes)


def crowd_out(world: World, client: Client, first: int = 900) -> None:
    """Fill the upper tier with something else that is below too, so that everything older is only below."""
    put_below(world, client, chain(range(first, first + world.cache.pools[UPPER].slots)))


def read_all(world: World, client: Client, hashes: list[bytes]) -> int:
    """Look up and load in windows, letting go of each; returns the blocks that were read."""
    found = world.lookup(client, hashes)
    at = 0
    while at < found.blocks:
        answer = world.load(client, found.lease, at, 4)
        if isinstance(answer, Wait):
            world.finish(next(transfer for transfer in world.running if transfer.id in answer.transfers))
        elif answer is None:
            break
        else:
            world.release(client, found.lease, at, answer)
            at += answer
        world.check()
    if found.lease:
        world.release(client, found.lease)
    return at
