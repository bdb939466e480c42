"""The way through host memory, and a GPU that fails in the middle of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.build import load
from tierd.cuda import Device, DeviceArray
from tierd.layout import Layout, Namespace
from tierd.tiers.io.posix import PosixEngine
from tierd.tiers.nvme import READ_DAMAGED, READ_FAILED, READ_OK, FileSegment, slots_path
from tierd.tiers.paths import BOUNCE, READ, STAGING_BYTES, WRITE, Paths, download, upload

LAYOUT = Layout(layers=1, kv_heads=1, head_dim=4096, dtype="float16")
PART = STAGING_BYTES // LAYOUT.slot_bytes
BLOCKS = 2 * PART + 5
"""Three parts, the last one short."""
NOWHERE = 1 << 40


@pytest.fixture
def rows(emulation: Path) -> DeviceArray:
    """Slots on an emulated GPU."""
    load(emulation)
    device, size = Device(0), BLOCKS * LAYOUT.slot_bytes
    address = device.reserve(size)
    device.map(address, size, device.create(size))
    return DeviceArray(device, address, BLOCKS, LAYOUT.slot_bytes)


@pytest.fixture
def segment(tmp_path: Path) -> FileSegment:
    """A segment file with room for all of them."""
    return FileSegment.create(tmp_path, Namespace("d", "m", LAYOUT), (BLOCKS + 1) * (LAYOUT.slot_bytes + 512), 1, PosixEngine())


def listed(rows: DeviceArray, broken: int | None = None) -> list[DeviceArray]:
    """All rows; one of them may be where the GPU has no memory."""
    payloads = [rows[at] for at in range(BLOCKS)]
    if broken is not None:
        payloads[broken] = DeviceArray(rows.device, NOWHERE, LAYOUT.slot_bytes)
    return payloads


def content_of(payloads: list[DeviceArray]) -> np.ndarray:
    """What is in them."""
    back = np.empty((len(payloads), LAYOUT.slot_bytes), np.uint8)
    download(list(back), payloads)
    return back


def fill(rows: DeviceArray) -> np.ndarray:
    """Random bytes in all rows."""
    content = np.frombuffer(bytearray(os.urandom(BLOCKS * LAYOUT.slot_bytes)), np.uint8).reshape(BLOCKS, -1)
    upload(listed(rows), list(content))
    return content


def test_blocks_of_a_gpu_go_through_host_memory_in_parts(rows: DeviceArray, segment: FileSegment) -> None:
    """All of them arrive in the file and come back, a damaged one is found and its page left alone, and bytes are counted."""
    paths, content, slots = Paths("posix", rows.device), fill(rows), np.arange(BLOCKS)
    assert paths.names == ("posix", "bounce") and paths.gpu == "bounce"
    assert paths.write(segment, slots, listed(rows), os.urandom(32 * BLOCKS), bytes(32 * BLOCKS)).all()
    assert slots_path(segment.path).read_bytes()[: content.nbytes] == content.tobytes()
    with open(slots_path(segment.path), "r+b") as file:
        file.seek((PART + 1) * LAYOUT.slot_bytes)
        file.write(b"\0\0\0\0\0\0\0\0\0")
    rows.device.clear(rows.address, content.nbytes)
    codes = paths.read(segment, slots, listed(rows))
    assert np.flatnonzero(codes).tolist() == [PART + 1] and codes[PART + 1] == READ_DAMAGED
    content[PART + 1] = 0
    assert (content_of(listed(rows)) == content).all()
    size = LAYOUT.block_bytes
    assert dict(paths.bytes) == {(BOUNCE, WRITE): BLOCKS * size, (BOUNCE, READ): (BLOCKS - 1) * size}


def test_a_gpu_that_fails_in_the_middle_costs_its_part_and_is_counted(rows: DeviceArray, segment: FileSegment) -> None:
    """What was written before and after is there, what was not can be written again, and reads fail alike."""
    paths, content, slots = Paths("posix", rows.device), fill(rows), np.arange(BLOCKS)
    hashes, parents = os.urandom(32 * BLOCKS), bytes(32 * BLOCKS)
    done = paths.write(segment, slots, listed(rows, broken=PART + 3), hashes, parents)
    lost = np.arange(PART, 2 * PART)
    assert np.flatnonzero(~done).tolist() == lost.tolist() and segment.failures["gpu: EIO"] == 1
    assert paths.write(segment, lost, listed(rows)[PART : 2 * PART], hashes[: 32 * PART], parents[: 32 * PART]).all()
    rows.device.clear(rows.address, content.nbytes)
    codes = paths.read(segment, slots, listed(rows, broken=2))
    assert (codes[:PART] == READ_FAILED).all() and (codes[PART:] == READ_OK).all() and segment.failures["gpu: EIO"] == 2
    assert (content_of(listed(rows)[PART:]) == content[PART:]).all()
