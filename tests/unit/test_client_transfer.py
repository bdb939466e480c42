"""Copies: the right bytes to the right page, and a torn or stale block is never counted."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread

import numpy as np
import pytest

from tests.unit.fake_daemon import LAYOUT, make_segment
from tests.unit.test_client_mapping import mapped
from tierd.client.mapping import Mapping
from tierd.client.transfer import Copier, as_pages, as_rows, locate
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
    assert copier.load(parts, pool, pages) == 2 * SLOTS
    assert (pool[pages] == expected).all()
    copier.store(parts, ~pool, pages)
    assert copier.load(parts, pool, pages) == 2 * SLOTS
    assert (pool[pages] == ~expected).all()
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
    assert Copier(BYTES, 1).load(parts, pool, np.arange(10)) == 6
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
        if copier.load(parts, pool, np.zeros(1, np.int64)):
            counted += 1
            assert (pool == pool[0, 0]).all()
        else:
            refused += 1
    stop.set()
    writer.join()
    assert refused >= 20, f"{counted} loads met no writer: the test did not test"
    assert copier.load(parts, pool, np.zeros(1, np.int64)) == 1 and (pool == pool[0, 0]).all()
    segment.directory.free([0])
    mapping.close()
    segment.close()


def test_a_pool_that_cannot_be_copied_to_is_misuse() -> None:
    """Wrong type, shape, page size, order or permission: said before anything happens."""
    good = np.zeros((4, BYTES), np.uint8)
    assert as_rows(good, BYTES, writable=True).base is not None
    assert as_rows(np.zeros((4, BYTES // 4), np.float32), BYTES, writable=True).shape == (4, BYTES)
    frozen = good.copy()
    frozen.flags.writeable = False
    assert len(as_rows(frozen, BYTES, writable=False)) == 4
    for bad in (good[:, :-1], good[::2], good.T, np.zeros((4, BYTES + 8), np.uint8), np.uint8(1), [1], frozen):
        with pytest.raises(Invalid, match="pool"):
            as_rows(bad, BYTES, writable=True)


def test_pages_outside_of_the_pool_are_misuse() -> None:
    """Also negative ones, fractions and tables."""
    pool = np.zeros((4, BYTES), np.uint8)
    assert as_pages([3, 0], pool).tolist() == [3, 0] and as_pages([], pool).tolist() == []
    for bad in ([4], [-1], [0.5], [[1]], 1, ["a"], [1 << 70]):
        with pytest.raises(Invalid, match="pages"):
            as_pages(bad, pool)
