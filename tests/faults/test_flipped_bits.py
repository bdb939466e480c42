"""One wrong bit on NVMe, wherever it is, is never served; where it matters it is counted; the daemon works on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.faults.content import chain
from tests.faults.house import LAYOUT, House
from tests.faults.pressure import press, store, verify
from tests.faults.raw import RawClient
from tests.faults.remains import HEADER, IDENTITY
from tierd.block import HASH_BYTES
from tierd.tiers.nvme import slots_path
from tierd.tiers.segment import Geometry

BLOCKS = 40
"""Of 127 slots, so that there are used and free ones."""
HASHES = chain("flipped", BLOCKS)
SHAPE = Geometry.fit(LAYOUT, 4 << 20)
SLOT = 17
"""The slot whose row or bytes are damaged; slots are used from the first."""
FREE_SLOT = 100
ADOPTED = re.compile(r"adopted segments=(\d+) copies=(\d+) sessions=\d+ damaged=(\d+)")


def slot_at(slot: int) -> int:
    """Where a slot's bytes are."""
    return SHAPE.directory_bytes + slot * SHAPE.slot_bytes


def row_at(slot: int, field: int) -> int:
    """Where a byte of a slot's identity is."""
    return SHAPE.identity_offset + slot * IDENTITY.size + field


PLACES: dict[str, tuple[int, str]] = {
    "magic": (3, "segment"),
    "version": (8, "segment"),
    "segment id": (20, "segment"),
    "namespace id": (40, "segment"),
    "slot count": (112, "segment"),
    "slots offset": (152, "segment"),
    "reserved header": (HEADER.size + 90, "segment"),
    "namespace record": (520, "segment"),
    "header crc": (4093, "segment"),
    "state code": (SHAPE.state_offset + 8 * SLOT, "row"),
    "state generation": (SHAPE.state_offset + 8 * SLOT + 2, "row"),
    "state of a free slot": (SHAPE.state_offset + 8 * FREE_SLOT, "free row"),
    "padding of the states": (SHAPE.holders_offset - 5, "nothing"),
    "holders": (SHAPE.holders_offset + 8 * SLOT, "nothing"),
    "hash": (row_at(SLOT, 5), "row"),
    "parent": (row_at(SLOT, 40), "row"),
    "digest": (row_at(SLOT, 66), "row"),
    "slot number": (row_at(SLOT, 84), "row"),
    "row crc": (row_at(SLOT, 127), "row"),
    "identity of a free slot": (row_at(FREE_SLOT, 5), "nothing"),
    "recency": (SHAPE.recency_offset + 16 * SLOT + 1, "nothing"),
    "first byte of a block": (slot_at(SLOT), "payload"),
    "last byte of a block": (slot_at(SLOT) + SHAPE.payload_bytes - 1, "payload"),
    "padding of a slot": (slot_at(SLOT) + SHAPE.payload_bytes, "nothing"),
    "bytes of a free slot": (slot_at(FREE_SLOT) + 9, "nothing"),
}
BLOCKS_HAD = {"segment": 0, "row": SLOT, "free row": BLOCKS, "payload": SLOT, "nothing": BLOCKS}


def flip(path: Path, offset: int, bit: int) -> None:
    """Turn one bit of a segment over; slots begin behind the directory."""
    if offset >= SHAPE.directory_bytes:
        path, offset = slots_path(path), offset - SHAPE.directory_bytes
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
        os.fsync(file.fileno())


def payload_of(house: House, block: bytes) -> tuple[Path, int]:
    """The file that has a block, and where its bytes begin."""
    for path in house.state.glob("nvme/*/*.directory"):
        rows = path.read_bytes()[SHAPE.identity_offset : SHAPE.recency_offset]
        for slot in range(SHAPE.slot_count):
            if rows[slot * IDENTITY.size :].startswith(block):
                return path, slot_at(slot)
    raise AssertionError("the block is in no file")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, bytes, bytes]]:
    """The name and both files' bytes of a segment with a chain of 40 blocks, as a killed daemon left it."""
    folder = tmp_path_factory.mktemp("flip")
    with House(folder, held=False, cpu__bytes="4MiB", nvme__bytes="4MiB") as house:
        client = RawClient(house.socket)
        client.hello()
        store(client, HASHES)
        house.sync()
        house.crash()
        (path,) = house.state.glob("nvme/*/*.directory")
        yield str(path.relative_to(house.state)), path.read_bytes(), slots_path(path).read_bytes()


def spoiled(house: House, image: tuple[str, bytes, bytes], spoil: Callable[[Path], None]) -> RawClient:
    """Start a daemon over the image after it was spoiled; returns a client."""
    path = house.state / image[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(image[1])
    slots_path(path).write_bytes(image[2])
    spoil(path)
    house.start()
    client = RawClient(house.socket)
    client.hello()
    return client


def works_on(house: House, client: RawClient) -> None:
    """The chain can be stored, evicted from memory and loaded again; damage that nobody has met yet may cost a try each."""
    for attempt in range(BLOCKS):
        assert store(client, HASHES) == 0
        house.sync()
        press(client, f"others {attempt}", 127)
        had, wrong = verify(client, HASHES)
        assert wrong == 0
        if had == BLOCKS:
            break
    assert had == BLOCKS
    assert house.errors() == []


@pytest.mark.parametrize("place", PLACES)
def test_a_bit_that_flipped_while_the_daemon_was_away_is_never_served(
    short_path: Path, image: tuple[str, bytes, bytes], place: str
) -> None:
    """The segment, the row or the block is given up, whichever the bit can have changed, and that is counted."""
    offset, kind = PLACES[place]
    house = House(short_path, held=False, cpu__bytes="4MiB", nvme__bytes="16MiB")
    try:
        client = spoiled(house, image, lambda path: flip(path, offset, Random(place).randrange(8)))
        assert verify(client, HASHES) == (BLOCKS_HAD[kind], 0)
        log = house.log.read_text()
        found = ADOPTED.search(log)
        damaged = int(found[3]) if found else 0
        assert ("segment file removed" in log, damaged) == (kind == "segment", int(kind in ("row", "free row")))
        assert house.wait_ready()["checksum_failures"] == int(kind == "payload")
        works_on(house, client)
    finally:
        house.crash()


def test_many_flipped_bits_everywhere_are_never_served(short_path: Path, image: tuple[str, bytes, bytes]) -> None:
    """A file that rots all over its slots and rows costs its blocks, and not one wrong byte."""
    random = Random(7)

    def rot(path: Path) -> None:
        for _ in range(60):
            flip(path, random.randrange(SHAPE.state_offset, SHAPE.total_bytes), random.randrange(8))

    house = House(short_path, held=False, cpu__bytes="4MiB", nvme__bytes="16MiB")
    try:
        client = spoiled(house, image, rot)
        had, wrong = verify(client, HASHES)
        assert had < BLOCKS and wrong == 0
        works_on(house, client)
    finally:
        house.crash()


def test_a_bit_that_flips_while_the_daemon_runs_is_never_served(short_path: Path) -> None:
    """Payloads are verified at every read: a miss, counted, and the slot is not used again in this life."""
    with House(short_path, cpu__bytes="4MiB", nvme__bytes="16MiB") as house:
        client = RawClient(house.socket)
        client.hello()
        store(client, HASHES)
        house.sync()
        press(client, "others", 127)
        house.sync()
        flip(*payload_of(house, HASHES[SLOT * HASH_BYTES : (SLOT + 1) * HASH_BYTES]), 3)
        assert verify(client, HASHES) == (SLOT, 0)
        status = house.wait_ready()
        assert (status["checksum_failures"], status["tiers"]["nvme"]["slots"]["quarantined"]) == (1, 1)
        works_on(house, client)
        assert house.wait_ready()["tiers"]["nvme"]["slots"]["quarantined"] == 1
