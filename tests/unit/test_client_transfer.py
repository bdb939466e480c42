"""Copies: the right bytes to the right page, and a torn or stale block is never counted."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.unit.fake_daemon import LAYOUT, make_segment
from tests.unit.test_client_mapping import mapped
from tierd.client.mapping import Mapping
from tierd.client.transfer import Copier, Pages, Rows, as_pages, as_pool, locate
from tierd.errors import Closed, Invalid
from tierd.layout import Layout, Namespace
from tierd.tiers.host import HostSegment

BYTES = LAYOUT.block_bytes
SLOTS = 50


@pytest.fixture
def segments() -> Iterator[list[HostSegment]]:
    """Two segments, all slots READY, each full of bytes of its own."""
    made = [make_segment(SLOTS), make_segment(SLOTS)]
    rng = np.random.default_rng(1)
    for segment in made:
        assert len(segment.slots) == SLOTS
        segment.slots[:] = rng.integers(0, 256, segment.slots.shape, np.uint8)
        every = np.arange(SLOTS)
        segment.directory.begin(every, bytes(32 * SLOTS), bytes(32 * SLOTS))
        segment.directory.ready(every)
    yield made
    for segment in made:
        segment.close()


@pytest.fixture
def mappings(segments: list[HostSegment]) -> Iterator[dict[int, Mapping]]:
    """Both mapped, under ordinals 0 and 3."""
    made = {0: mapped(segments[0]), 3: mapped(segments[1])}
    yield made
    for mapping in made.values():
        mapping.close()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_every_block_lands_on_its_page(
    segments: list[HostSegment], mappings: dict[int, Mapping], threads: int, order: str
) -> None:
    """Over two segments, contiguous or not, by one thread or several, there and back."""
    rng = np.random.default_rng(7)
    slots = np.concatenate([np.arange(SLOTS), 3 * SLOTS + np.arange(SLOTS)]).astype(np.int32)
    pages = np.arange(2 * SLOTS)
    if order == "shuffled":
        slots, pages = rng.permutation(slots), rng.permutation(pages)
    expected = np.stack([segments[0 if slot < SLOTS else 1].slots[slot % SLOTS, :BYTES] for slot in slots])
    copier = Copier(BYTES, threads)
    pool = np.zeros((2 * SLOTS, BYTES), np.uint8)
    parts = locate(slots, SLOTS, mappings)
    assert copier.load(parts, Rows(pool), pages) == 2 * SLOTS
    assert (pool[pages] == expected).all()
    copier.store(parts, Rows(~pool), pages)
    assert copier.load(parts, Rows(pool), pages) == 2 * SLOTS
    assert (pool[pages] == ~expected).all()
    copier.close()


class Layers:
    """An engine that keeps the two halves of a page in two arrays."""

    def __init__(self, pages: int, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.halves = np.zeros((2, pages, block_bytes // 2), np.uint8)

    def __len__(self) -> int:
        return self.halves.shape[1]

    def fill(self, pages: Pages, slots: NDArray[np.uint8], indexes: Pages) -> None:
        """Slots to pages."""
        for half, array in enumerate(self.halves):
            array[pages] = self._half(slots, half)[indexes]

    def drain(self, pages: Pages, slots: NDArray[np.uint8], indexes: Pages) -> None:
        """Pages to slots."""
        for half, array in enumerate(self.halves):
            self._half(slots, half)[indexes] = array[pages]

    def _half(self, slots: NDArray[np.uint8], half: int) -> NDArray[np.uint8]:
        size = self.block_bytes // 2
        return slots[:, half * size : (half + 1) * size]


def test_a_pool_of_many_pieces_is_copied_by_whoever_knows_them(mappings: dict[int, Mapping]) -> None:
    """Each call names pages and the slots of one segment; there and back, every byte is where it was."""
    rng = np.random.default_rng(3)
    slots = np.concatenate([np.arange(SLOTS), 3 * SLOTS + np.arange(SLOTS)]).astype(np.int32)
    parts, pages = locate(slots, SLOTS, mappings), rng.permutation(2 * SLOTS)
    pool = Layers(2 * SLOTS, BYTES)
    pool.halves[:] = rng.integers(0, 256, pool.halves.shape, np.uint8)
    before, copier = pool.halves.copy(), Copier(BYTES, 2)
    copier.store(parts, as_pool(pool, BYTES, writable=False), pages)
    pool.halves[:] = 0
    assert copier.load(parts, as_pool(pool, BYTES, writable=True), pages) == 2 * SLOTS
    assert (pool.halves == before).all()
    copier.close()


@pytest.mark.parametrize("slot", [-1, SLOTS, 2 * SLOTS, 4 * SLOTS, 2**31 - 1])
def test_a_slot_in_no_attached_segment_is_not_touched(mappings: dict[int, Mapping], slot: int) -> None:
    """Whatever number the daemon says, no address outside of a mapping comes of it."""
    with pytest.raises(Closed, match="in no segment"):
        locate(np.array([0, slot], np.int32), SLOTS, mappings)


@pytest.mark.parametrize("verb", ["free", "begin"])
def test_a_block_that_is_not_ready_ends_the_prefix(
    segments: list[HostSegment], mappings: dict[int, Mapping], verb: str
) -> None:
    """FREE or FILLING: the blocks before it count, nothing behind does."""
    segments[0].directory.free([6])
    if verb == "begin":
        segments[0].directory.begin([6], bytes(32), bytes(32))
    pool = np.zeros((10, BYTES), np.uint8)
    parts = locate(np.arange(10, dtype=np.int32), SLOTS, mappings)
    assert Copier(BYTES, 1).load(parts, Rows(pool), np.arange(10)) == 6
    assert (pool[:6] == segments[0].slots[:6, :BYTES]).all()


def test_a_block_that_is_rewritten_meanwhile_is_never_counted() -> None:
    """One side refills a slot as the daemon would, the other loads it: what counts is of one writing, whole."""
    layout = Layout(32, 8, 64, "float32")
    segment = HostSegment.create(Namespace("test", "model", layout), 3 * layout.block_bytes, 0, "off")
    shape = segment.header.geometry
    sizes = {name: getattr(shape, name) for name in ("slot_bytes", "directory_bytes", "slots_bytes")}
    names = {"tier": "cpu", "ordinal": 0, "segment": segment.segment_id, "slots": shape.slot_count}
    mapping = Mapping({**names, **sizes}, segment.directory_fd, segment.slots_fd, layout)
    stop = Event()

    def rewrite() -> None:
        value = 0
        while not stop.is_set():
            value = (value + 1) % 256
            segment.directory.free([0])
            segment.directory.begin([0], bytes(32), bytes(32))
            segment.slots[0] = value
            segment.directory.ready([0])

    writer = Thread(target=rewrite)
    writer.start()
    pool = np.zeros((1, layout.block_bytes), np.uint8)
    parts = locate(np.zeros(1, np.int32), 1, {0: mapping})
    copier, counted, refused = Copier(layout.block_bytes, 1), 0, 0
    while refused < 20 and counted + refused < 5_000:
        if copier.load(parts, Rows(pool), np.zeros(1, np.int64)):
            counted += 1
            assert (pool == pool[0, 0]).all()
        else:
            refused += 1
    stop.set()
    writer.join()
    assert refused >= 20, f"{counted} loads met no writer: the test did not test"
    assert copier.load(parts, Rows(pool), np.zeros(1, np.int64)) == 1 and (pool == pool[0, 0]).all()
    segment.directory.free([0])
    mapping.close()
    segment.close()


def test_a_pool_that_cannot_be_copied_to_is_misuse() -> None:
    """Wrong type, shape, page size, order or permission: said before anything happens."""
    good = np.zeros((4, BYTES), np.uint8)
    rows = as_pool(good, BYTES, writable=True)
    assert isinstance(rows, Rows) and rows.array.base is not None
    assert len(as_pool(np.zeros((4, BYTES // 4), np.float32), BYTES, writable=True)) == 4
    frozen = good.copy()
    frozen.flags.writeable = False
    assert len(as_pool(frozen, BYTES, writable=False)) == 4
    strangers = (np.uint8(1), [1], Layers(4, BYTES + 2))
    for bad in (good[:, :-1], good[::2], good.T, np.zeros((4, BYTES + 8), np.uint8), frozen, *strangers):
        with pytest.raises(Invalid, match="pool"):
            as_pool(bad, BYTES, writable=True)


def test_pages_outside_of_the_pool_are_misuse() -> None:
    """Also negative ones, fractions and tables."""
    pool = Rows(np.zeros((4, BYTES), np.uint8))
    assert as_pages([3, 0], pool).tolist() == [3, 0] and as_pages([], pool).tolist() == []
    for bad in ([4], [-1], [0.5], [[1]], 1, ["a"], [1 << 70]):
        with pytest.raises(Invalid, match="pages"):
            as_pages(bad, pool)
