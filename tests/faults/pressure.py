"""Stores and looks through more than the tiers can hold, by hand, and says what was wrong."""

from __future__ import annotations

from tests.faults.content import chain, payload
from tests.faults.house import House, until
from tests.faults.raw import RawClient
from tierd.block import HASH_BYTES, ROOT, split
from tierd.errors import Gone
from tierd.wire.messages import NO_ROOM

BATCH_BLOCKS = 32


def store(client: RawClient, hashes: bytes, flavour: int = 0, batch_blocks: int = BATCH_BLOCKS) -> int:
    """Store a chain in batches; returns how many blocks there was no room for."""
    parent, refused = ROOT, 0
    for at in range(0, len(hashes), batch_blocks * HASH_BYTES):
        batch = hashes[at : at + batch_blocks * HASH_BYTES]
        lease, slots = client.store(batch, parent)
        for block, slot in zip(split(batch), slots, strict=True):
            if slot >= 0:
                client.slot(slot)[:] = payload(block, client.layout.block_bytes, flavour)
        if lease:
            client.ask("commit", lease=lease)
        refused += slots.count(NO_ROOM)
        parent = batch[-HASH_BYTES:]
    return refused


def verify(client: RawClient, hashes: bytes, flavour: int = 0) -> tuple[int, int]:
    """Load whatever there is of a chain; returns how many blocks were had, and how many of them were wrong."""
    lease, blocks, slots = client.lookup(hashes)
    had = wrong = 0
    run = list(split(hashes))[:blocks]
    while had < blocks:
        if had == len(slots):
            try:
                slots += client.numbers(client.ask("load", lease=lease, first=had, count=blocks - had)["slots"])
            except Gone:
                break
        for block, slot in zip(run[had:], slots[had:], strict=False):
            wrong += bool((client.slot(slot) != payload(block, client.layout.block_bytes, flavour)).any())
        client.ask("release", lease=lease, first=had, count=len(slots) - had)
        had = len(slots)
    if lease:
        client.ask("release", lease=lease)
    return had, wrong


def press(client: RawClient, name: str, blocks: int, chain_blocks: int = 32) -> list[bytes]:
    """Store that many blocks as chains of their own; returns the chains. AssertionError when one is refused."""
    chains = [chain(f"{name} {number}", chain_blocks) for number in range(-(-blocks // chain_blocks))]
    for hashes in chains:
        assert store(client, hashes) == 0, "a store was refused while blocks could be evicted"
    return chains


def capacity_is_whole(house: House, seconds: float = 5.0) -> None:
    """No slot of any tier is lost once nobody does anything: each is free or holds a block."""

    def whole() -> bool:
        tiers = house.wait_ready()["tiers"]
        return all(
            states["filling"] == states["retired"] == states["quarantined"] == 0
            for states in (tier["slots"] for tier in tiers.values())
            if states
        )

    until(whole, f"slots are lost: {house.wait_ready()['tiers']}", seconds)


def nothing_is_held(house: House, client: RawClient) -> None:
    """One store can have every slot of the mapped tier: nobody holds any."""
    house.sync()
    total = sum(house.slots().values())
    assert total, "there are no slots"
    lease, slots = client.store(chain(f"everything {total} {client.welcome['session']}", total))
    client.ask("abort", lease=lease)
    assert sorted(slots) == list(range(total)), f"{slots.count(NO_ROOM)} of {total} slots are held by somebody"
