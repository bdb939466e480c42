"""Geometry, header and directory of a segment."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd.errors import Invalid
from tierd.layout import PAGE_BYTES, Layout, Namespace
from tierd.tiers.directory import FILLING, FREE, IDENTITY, READY, RECENCY, Directory, page_ranges
from tierd.tiers.segment import HUGE_PAGE_BYTES, Geometry, Header, Medium

LAYOUT = Layout(2, 1, 8, "float16", block_tokens=4)
NAMESPACE = Namespace("uid:1000", "model", LAYOUT)


def make_directory(slot_count: int = 8, epoch: int = 3) -> Directory:
    """An empty directory on a plain buffer."""
    geometry = Geometry(slot_count, LAYOUT.block_bytes)
    return Directory(bytearray(geometry.directory_bytes), Header.fresh(Medium.MEMORY, NAMESPACE, geometry, epoch))


def hashes(*numbers: int) -> bytes:
    """Packed hashes of numbered blocks."""
    return b"".join(hashlib.sha256(b"%d" % number).digest() for number in numbers)


def fill(directory: Directory, slots: list[int], first: int = 0) -> None:
    """Make slots ready with the numbered blocks from `first` on."""
    packed = hashes(*range(first, first + len(slots)))
    directory.begin(slots, packed, bytes(32) + packed[:-32])
    directory.ready(slots)


@given(st.integers(1, 80), st.integers(1, 8), st.sampled_from([16, 64, 128]), st.integers(0, 1 << 28), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_geometry_has_as_many_slots_as_fit(layers: int, heads: int, dim: int, segment_bytes: int, huge: bool) -> None:
    """The segment costs at most what was given, and one more slot would cost more."""
    layout = Layout(layers, heads, dim, "bfloat16")
    page_bytes = HUGE_PAGE_BYTES if huge else PAGE_BYTES
    try:
        shape = Geometry.fit(layout, segment_bytes, page_bytes)
    except Invalid:
        assert Geometry(1, layout.block_bytes, page_bytes).total_bytes > segment_bytes
        return
    assert shape.total_bytes <= segment_bytes
    assert Geometry(shape.slot_count + 1, layout.block_bytes, page_bytes).total_bytes > segment_bytes
    assert shape.slots_bytes >= shape.slot_count * shape.slot_bytes and shape.slots_bytes % page_bytes == 0


@given(st.integers(1, 100_000))
@settings(max_examples=100, deadline=None)
def test_columns_are_page_aligned_and_do_not_overlap(slot_count: int) -> None:
    """Each column starts on a page and ends before the next one starts."""
    shape = Geometry(slot_count, 4096)
    offsets = [shape.state_offset, shape.holders_offset, shape.identity_offset, shape.recency_offset]
    ends = [*offsets[1:], shape.directory_bytes]
    assert all(offset % PAGE_BYTES == 0 for offset in offsets) and offsets[0] == PAGE_BYTES
    for offset, end, row_bytes in zip(offsets, ends, (8, 8, 128, 16), strict=True):
        assert 0 <= end - offset - slot_count * row_bytes < PAGE_BYTES


def test_a_segment_that_holds_no_block_is_refused_with_both_sizes() -> None:
    """The message names what was given and what it takes."""
    with pytest.raises(Invalid, match=r"20000 bytes .* 256 bytes.* 24576"):
        Geometry.fit(LAYOUT, 20_000)


@pytest.mark.parametrize("page_bytes", [PAGE_BYTES, HUGE_PAGE_BYTES])
def test_a_header_survives_its_page(page_bytes: int) -> None:
    """Unpacking what was packed gives the same header, huge pages or not."""
    header = Header.fresh(Medium.MEMORY, NAMESPACE, Geometry(5, LAYOUT.block_bytes, page_bytes), 9)
    assert Header.unpack(header.pack()) == header


def test_a_header_with_any_damaged_byte_is_refused() -> None:
    """No byte of the page can change unnoticed."""
    page = bytearray(Header.fresh(Medium.FILE, NAMESPACE, Geometry(5, LAYOUT.block_bytes), 9).pack())
    for offset in range(len(page)):
        page[offset] ^= 0x10
        with pytest.raises(Invalid):
            Header.unpack(bytes(page))
        page[offset] ^= 0x10


@pytest.mark.parametrize(
    ("offset", "value", "complaint"),
    [
        (8, struct.pack("<I", 2), "version is 2, this tierd reads 1"),
        (12, struct.pack("<I", 4), "medium is 4"),
        (32, bytes(32), "do not fit together"),
        (96, struct.pack("<Q", 512), "blocks of 512 bytes, its layout 256"),
        (112, struct.pack("<I", 0), "0 slots"),
        (112, struct.pack("<I", 1 << 31), "do not fit together"),
        (136, struct.pack("<Q", 1 << 40), "do not fit together"),
        (512, b"\xc1", "namespace record"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused_although_its_crc_is_good(
    offset: int, value: bytes, complaint: str
) -> None:
    """A good CRC is no proof of sense: every field is checked against the others."""
    page = bytearray(Header.fresh(Medium.FILE, NAMESPACE, Geometry(5, LAYOUT.block_bytes), 9).pack())
    page[offset : offset + len(value)] = value
    page[4092:] = struct.pack("<I", zlib.crc32(page[:4092]))
    with pytest.raises(Invalid, match=complaint):
        Header.unpack(bytes(page))


def test_rows_have_their_documented_size() -> None:
    """An identity has 128 bytes with its crc at 124, a recency 16."""
    assert (IDENTITY.itemsize, IDENTITY.fields["crc"][1], IDENTITY.fields["digest"][1]) == (128, 124, 64)
    assert RECENCY.itemsize == 16


def test_state_codes_differ_in_four_bits() -> None:
    """No single flipped bit, nor two or three, turns one state into another."""
    pairs = [(FREE, FILLING), (FREE, READY), (FILLING, READY)]
    assert all((a ^ b).bit_count() >= 4 for a, b in pairs)


def test_a_block_is_found_only_after_ready() -> None:
    """A slot that is being filled counts as unfinished and is spare; ready makes it a block."""
    directory = make_directory()
    generations = directory.begin([4, 2], hashes(0, 1), bytes(32) + hashes(0))
    before = directory.scan()
    assert len(before.slots) == 0 and before.unfinished == 2 and len(before.spare) == 8
    directory.ready([4, 2])
    scan = directory.scan()
    assert scan.slots.tolist() == [2, 4] and scan.hashes == hashes(1, 0) and scan.parents == hashes(0) + bytes(32)
    assert generations.tolist() == scan.generations.tolist() == [1, 1]
    assert scan.spare.tolist() == [0, 1, 3, 5, 6, 7]


def test_a_digest_travels_with_its_block() -> None:
    """Digests come back as they were given; 0 is none."""
    directory = make_directory()
    directory.begin([0, 1], hashes(0, 1), bytes(64), np.array([0, 2**64 - 1], np.uint64))
    directory.ready([0, 1])
    scan = directory.scan()
    assert scan.digests.tolist() == [0, 2**64 - 1]


def test_a_used_slot_cannot_be_begun_again() -> None:
    """Filling a slot that is not free is a bug and stops at once."""
    directory = make_directory()
    fill(directory, [0])
    with pytest.raises(AssertionError):
        directory.begin([0], hashes(1), bytes(32))
    with pytest.raises(AssertionError):
        directory.ready([1])


def test_each_filling_of_a_slot_has_a_new_generation() -> None:
    """A reader that compares state words before and after sees that a slot was used again."""
    directory = make_directory()
    seen = set()
    for block in range(5):
        fill(directory, [3], block)
        seen.add(int(directory.state[3]))
        directory.free([3])
    assert len(seen) == 5


def test_after_a_reset_new_generations_start_above_the_highest() -> None:
    """A slot that was never used does not start again at 1 next to one that has reached 6."""
    directory = make_directory()
    for block in range(6):
        fill(directory, [3], block)
        if block < 5:
            directory.free([3])
    directory.reset(directory.scan().spare)
    fill(directory, [0], 9)
    scan = directory.scan()
    assert dict(zip(scan.slots.tolist(), scan.generations.tolist(), strict=True)) == {0: 7, 3: 6}


def test_a_generation_wraps_without_damage() -> None:
    """After the last of 2^56 generations comes 0, consistently in state and identity."""
    directory = make_directory()
    directory.state[0] = np.uint64((2**56 - 1) << 8 | FREE)
    fill(directory, [0])
    assert directory.scan().slots.tolist() == [0] and directory.scan().generations.tolist() == [0]


def test_a_ready_row_with_any_flipped_bit_is_damage() -> None:
    """Each bit of the identity and of the state word counts; neighbours are not affected."""
    directory = make_directory()
    fill(directory, [0, 1, 2])
    columns = (directory.identity[1:2].view(np.uint8), directory.state[1:2].view(np.uint8))
    for column in columns:
        for bit in range(column.size * 8):
            column[bit // 8] ^= 1 << bit % 8
            scan = directory.scan()
            assert scan.slots.tolist() == [0, 2] and scan.damaged == 1 and 1 in scan.spare
            column[bit // 8] ^= 1 << bit % 8
    assert len(directory.scan().slots) == 3


def test_a_row_of_another_slot_is_damage() -> None:
    """A misdirected identity, although its CRC is good, is not believed."""
    directory = make_directory()
    fill(directory, [0, 1])
    directory.identity[1] = directory.identity[0]
    assert directory.scan().slots.tolist() == [0] and directory.scan().damaged == 1


def test_a_block_of_an_older_epoch_is_stale_not_damaged() -> None:
    """Purging a namespace takes its blocks without looking like a broken disk."""
    directory = make_directory(epoch=3)
    fill(directory, [0])
    directory.epoch = 4
    fill(directory, [1], 1)
    scan = directory.scan()
    assert scan.slots.tolist() == [1] and (scan.stale, scan.damaged) == (1, 0) and 0 in scan.spare


def test_rows_add_up_to_the_slots() -> None:
    """Every slot is exactly one of good, stale, damaged, unfinished or free."""
    directory = make_directory()
    fill(directory, [0, 1, 2])
    directory.begin([3], hashes(9), bytes(32))
    directory.state[2] ^= np.uint64(1)
    directory.identity["crc"][1] ^= 1
    scan = directory.scan()
    assert (len(scan.slots), scan.damaged, scan.unfinished, scan.stale) == (1, 2, 1, 0)
    assert sorted([*scan.slots.tolist(), *scan.spare.tolist()]) == list(range(8))


def test_holder_bits_are_counted_per_session_and_survive_a_free() -> None:
    """Freeing a slot does not make it reusable while somebody holds it."""
    directory = make_directory()
    fill(directory, [0, 1])
    directory.holders[[0, 1]] |= np.uint64(1)
    directory.holders[[1, 5]] |= np.uint64(1 << 63)
    directory.free([0, 1])
    assert directory.scan().held.tolist() == [0, 1, 5]
    assert directory.unhold_all(0) == 2 and directory.unhold_all(63) == 2 and directory.unhold_all(63) == 0
    assert len(directory.scan().held) == 0


def test_recency_is_outside_the_crc() -> None:
    """Touching a ready block changes its recency and nothing else."""
    directory = make_directory()
    fill(directory, [0, 1])
    directory.touch([1], 1_700_000_000_000, 5)
    scan = directory.scan()
    assert scan.last_use.tolist() == [0, 1_700_000_000_000] and scan.use_counts.tolist() == [0, 5]
    assert scan.damaged == 0


def test_page_ranges_are_whole_runs_of_pages() -> None:
    """Rows of one page are written once, neighbouring pages together, distant ones apart."""
    assert page_ranges(8192, 128, [0, 5, 31]) == [(8192, 4096)]
    assert page_ranges(8192, 128, [100, 0, 33, 31]) == [(8192, 8192), (8192 + 3 * 4096, 4096)]
    assert page_ranges(4096, 8, []) == []


def test_headers_are_values() -> None:
    """A header with another epoch is another header, and says so on its page."""
    header = Header.fresh(Medium.FILE, NAMESPACE, Geometry(5, LAYOUT.block_bytes), 1)
    other = dataclasses.replace(header, epoch=2)
    assert Header.unpack(other.pack()).epoch == 2 and other != header
