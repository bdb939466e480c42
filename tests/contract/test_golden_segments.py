"""Golden segments of format version 1: what this code writes, byte for byte, and can still read.

`python tests/contract/test_golden_segments.py` writes them anew: only together with a new format version.
"""

from __future__ import annotations

import hashlib
import mmap
import shutil
from pathlib import Path

import numpy as np
import pytest

from tierd.layout import Layout, Namespace
from tierd.tiers.directory import Directory
from tierd.tiers.io.posix import PosixEngine
from tierd.tiers.nvme import READ_OK, FileSegment, slots_path
from tierd.tiers.segment import Geometry, Header, Medium

GOLDEN = Path(__file__).parent / "golden"
NAMESPACE = Namespace("uid:1000", "golden-model", Layout(2, 1, 8, "float16", block_tokens=4))
GEOMETRY = Geometry(slot_count=4, payload_bytes=NAMESPACE.layout.block_bytes)
HASHES = [hashlib.sha256(b"block %d" % number).digest() for number in range(4)]
IN_MEMORY = {"memory.directory": (Medium.MEMORY, 0xA1), "device.directory": (Medium.DEVICE, 0xA2)}
"""Media whose directory is a memfd, with the byte that ids are made of."""
LAST_USE, EPOCH, CREATED_NS = 1_700_000_000_000, 7, 1_700_000_000_123_456_789


def header(medium: Medium, id_byte: int) -> Header:
    """A header in which nothing is random."""
    return Header(medium, bytes([id_byte]) * 16, NAMESPACE, EPOCH, CREATED_NS, GEOMETRY)


def payload(number: int) -> np.ndarray:
    """A page-aligned slot whose payload is its block's hash repeated, and whose padding is zero."""
    slot = np.frombuffer(mmap.mmap(-1, GEOMETRY.slot_bytes), np.uint8)
    repeated = HASHES[number] * (GEOMETRY.payload_bytes // 32)
    slot[: GEOMETRY.payload_bytes] = np.frombuffer(repeated, np.uint8)
    return slot


def make_memory(medium: Medium, id_byte: int) -> bytes:
    """The directory of a memory segment: a ready block, one being filled, one freed and used again, one never used."""
    buffer = bytearray(GEOMETRY.directory_bytes)
    buffer[:4096] = header(medium, id_byte).pack()
    directory = Directory(buffer, header(medium, id_byte))
    directory.begin([0, 1], HASHES[0] + HASHES[1], bytes(32) + HASHES[0])
    directory.ready([0, 1])
    directory.free([1])
    directory.begin([1, 2], HASHES[2] + HASHES[3], HASHES[0] + HASHES[2], np.array([0, 0x1122334455667788], np.uint64))
    directory.ready([1])
    directory.holders[[0, 2]] = 1 << 5
    directory.touch([0, 1], LAST_USE, np.array([3, 4], np.uint32))
    return bytes(buffer)


def make_file(folder: Path) -> Path:
    """A segment file with two blocks in the slots 2 and 0, and a freed one."""
    segment = FileSegment.format(folder, header(Medium.FILE, 0xB2), PosixEngine())
    hashes, parents = b"".join(HASHES[:3]), bytes(32) + HASHES[0] + HASHES[1]
    assert segment.write([2, 0, 3], [payload(number) for number in range(3)], hashes, parents).all()
    segment.free([3])
    segment.touch([2, 0], LAST_USE, np.array([9, 1], np.uint32))
    segment.close()
    return segment.path


@pytest.mark.parametrize("name", IN_MEMORY)
def test_a_memory_directory_is_written_as_it_always_was(name: str) -> None:
    """Every byte of header and directory equals the golden one."""
    assert make_memory(*IN_MEMORY[name]) == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("name", IN_MEMORY)
def test_a_golden_memory_directory_is_understood(name: str) -> None:
    """The scan finds the two ready blocks with everything they carry."""
    data = bytearray((GOLDEN / name).read_bytes())
    found = Header.unpack(bytes(data))
    scan = Directory(data, found).scan()
    assert found == header(*IN_MEMORY[name])
    assert scan.slots.tolist() == [0, 1] and scan.hashes == HASHES[0] + HASHES[2]
    assert scan.parents == bytes(32) + HASHES[0] and not scan.digests.any()
    assert scan.generations.tolist() == [1, 2] and scan.use_counts.tolist() == [3, 4]
    assert scan.last_use.tolist() == [LAST_USE, LAST_USE]
    assert (scan.held.tolist(), scan.spare.tolist()) == ([0, 2], [2, 3])
    assert (scan.damaged, scan.stale, scan.unfinished) == (0, 0, 1)


def test_a_segment_file_is_written_as_it_always_was(tmp_path: Path) -> None:
    """Every byte of both files equals the golden one."""
    path = make_file(tmp_path)
    for file in (path, slots_path(path)):
        assert file.read_bytes() == (GOLDEN / file.name).read_bytes()


def test_a_golden_segment_file_is_understood(tmp_path: Path) -> None:
    """Both blocks are found and verified against their digests."""
    for file in GOLDEN.glob("b2*"):
        shutil.copy(file, tmp_path)
    path = tmp_path / f"{'b2' * 16}.directory"
    segment = FileSegment.open(path, PosixEngine())
    scan = segment.scan()
    assert scan.slots.tolist() == [0, 2] and scan.hashes == HASHES[1] + HASHES[0]
    assert scan.use_counts.tolist() == [1, 9] and scan.digests.all() and scan.damaged == 0
    buffers = [payload(3), payload(3)]
    assert (segment.read(scan.slots, buffers) == READ_OK).all()
    assert [bytes(buffer[:32]) for buffer in buffers] == [HASHES[1], HASHES[0]]
    segment.close()


if __name__ == "__main__":
    for name, about in IN_MEMORY.items():
        (GOLDEN / name).write_bytes(make_memory(*about))
    make_file(GOLDEN)
