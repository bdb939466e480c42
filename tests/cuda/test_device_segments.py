"""Segments on an emulated GPU: what they cost, what they show, and who may take them over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.build import load
from tierd.cuda import Device, DeviceArray
from tierd.errors import Busy, Invalid
from tierd.layout import Layout, Namespace
from tierd.tiers.device import DeviceSegment
from tierd.tiers.host import HostSegment
from tierd.tiers.paths import download, upload
from tierd.tiers.segment import Medium

MIB = 1 << 20
UNIT = 2 * MIB
LAYOUT = Layout(4, 2, 32, "bfloat16")
NAMESPACE = Namespace("uid:1000", "model", LAYOUT)
HASH = bytes(range(32))
BYTES_OF_BLOCKS = {"Llama 3.1 8B": (32, 8, 128), "one of 8 of 70B": (80, 1, 128), "SmolLM2": (30, 3, 64)}


@pytest.fixture
def device(emulation: Path) -> Device:
    """An emulated GPU in this process."""
    load(emulation)
    return Device(0)


@pytest.fixture
def segment(device: Device) -> DeviceSegment:
    """A segment of one MiB."""
    return DeviceSegment.create(NAMESPACE, MIB, 1, device)


def read(row: DeviceArray) -> np.ndarray:
    """What is in a slot."""
    content = np.empty(len(row), np.uint8)
    download([content], [row])
    return content


@pytest.mark.parametrize(("model", "slots_at_a_time"), [("Llama 3.1 8B", 1), ("one of 8 of 70B", 16), ("SmolLM2", 256)])
def test_slots_fill_whole_units_of_the_driver(model: str, slots_at_a_time: int) -> None:
    """As many as fit in multiples of what fills 2 MiB units exactly, so that pages have no gaps between segments."""
    layout = Layout(*BYTES_OF_BLOCKS[model], "bfloat16")
    shape = DeviceSegment.geometry(layout, 1024 * MIB, UNIT)
    assert shape.slot_count % slots_at_a_time == 0 and shape.slots_bytes % UNIT == 0
    assert shape.slots_bytes == shape.slot_count * shape.slot_bytes and shape.total_bytes <= 1024 * MIB
    assert (shape.slot_count + slots_at_a_time) * (shape.slot_bytes + 160) > 1024 * MIB - UNIT
    least = slots_at_a_time * layout.slot_bytes
    with pytest.raises(Invalid, match=f"cannot hold {slots_at_a_time} blocks") as refused:
        DeviceSegment.geometry(layout, least, UNIT)
    needed = int(str(refused.value).rsplit(" ", 1)[1])
    assert DeviceSegment.geometry(layout, needed, UNIT).slot_count == slots_at_a_time


def test_an_adopted_segment_has_everything_that_was_in_it(segment: DeviceSegment, device: Device) -> None:
    """Header, blocks and payloads are found by a daemon that has only the two descriptors."""
    content = np.full(LAYOUT.slot_bytes, 77, np.uint8)
    upload([segment.slots[2]], [content])
    segment.directory.begin([2], HASH, bytes(32))
    segment.directory.ready([2])
    descriptors = os.dup(segment.directory_fd), os.dup(segment.slots_fd)
    segment.close()
    adopted = DeviceSegment.adopt(*descriptors, device)
    scan = adopted.directory.scan()
    assert adopted.header.namespace == NAMESPACE and adopted.header.medium == Medium.DEVICE
    assert scan.slots.tolist() == [2] and scan.hashes == HASH and (read(adopted.slots[2]) == 77).all()
    adopted.close()


def test_a_segment_that_is_not_whole_is_not_adopted(segment: DeviceSegment, device: Device) -> None:
    """Swapped descriptors, one of host memory and too little memory are refused with the reason, and stay the caller's."""
    host = HostSegment.create(NAMESPACE, MIB, 1, "off")
    for pair, reason in (
        ((segment.slots_fd, segment.directory_fd), "not made by tierd"),
        ((host.directory_fd, segment.slots_fd), "of the medium memory, not device"),
        ((segment.directory_fd, host.slots_fd), "cannot be imported on cuda:0: cuMemImportFromShareableHandle says"),
        ((segment.directory_fd, device.create(4096)), "cannot be imported on cuda:0: cuMemMap says"),
    ):
        with pytest.raises(Invalid, match=reason):
            DeviceSegment.adopt(*pair, device)
        assert all(os.fstat(descriptor) for descriptor in pair)
    with pytest.raises(Invalid, match="of the medium device, not memory"):
        HostSegment.adopt(segment.directory_fd, host.slots_fd)


def test_a_closed_segment_gives_everything_back(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor and no address stays, neither of those that were closed nor of those that could not be made."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        DeviceSegment.create(NAMESPACE, MIB, 1, device).close()

    def refuse(*_: object) -> None:
        raise OSError(5, "the driver refuses")

    freed: list[int] = []
    free: Callable[[int, int], None] = device.free
    monkeypatch.setattr(device, "free", lambda address, size: freed.append(address) or free(address, size))
    monkeypatch.setattr(device, "clear", refuse)
    with pytest.raises(Busy, match=r"no GPU memory for a segment of .* bytes: the driver refuses; lower gpu"):
        DeviceSegment.create(NAMESPACE, MIB, 1, device)
    assert len(freed) == 1 and len(os.listdir("/proc/self/fd")) == before


def test_a_segment_too_small_for_a_block_leaves_nothing_behind(device: Device) -> None:
    """The refusal names both sizes and costs no descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Invalid, match="4096 bytes cannot hold"):
        DeviceSegment.create(NAMESPACE, 4096, 1, device)
    assert len(os.listdir("/proc/self/fd")) == before
