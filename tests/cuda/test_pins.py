"""The cpu tier beneath a GPU: its segments are registered with the driver meanwhile, and never unmapped while they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from tests.cuda.build import load
from tierd.clock import monotonic_seconds
from tierd.cuda import Device
from tierd.layout import Layout, Namespace
from tierd.tiers.pins import Pins
from tierd.tiers.tier import MemoryTier

NAMESPACE = Namespace("domain", "model", Layout(layers=1, kv_heads=1, head_dim=64, dtype="float16"))
SEGMENT_BYTES = 256 << 10
SECONDS_MAX = 20


class Watched(Device):
    """A device that notes what it is asked to register and what is given back; it waits for `go`, and may refuse."""

    def __init__(self) -> None:
        super().__init__(0)
        self.go, self.refuses = Event(), False
        self.asked: list[int] = []
        self.registered: list[int] = []
        self.given_back: list[int] = []

    def register(self, address: int, size: int) -> None:
        self.asked.append(address)
        assert self.go.wait(SECONDS_MAX)
        if self.refuses:
            raise OSError(12, "the driver refuses")
        super().register(address, size)
        self.registered.append(address)

    def unregister(self, address: int) -> None:
        assert is_mapped(address), "it was unmapped first"
        super().unregister(address)
        self.given_back.append(address)


@pytest.fixture
def device(emulation: Path) -> Watched:
    """An emulated GPU."""
    load(emulation)
    return Watched()


@pytest.fixture
def tier(device: Watched) -> Iterator[MemoryTier]:
    """A cpu tier beneath it."""
    tier = MemoryTier("cpu", 8 * SEGMENT_BYTES, SEGMENT_BYTES, pins=Pins(device))
    yield tier
    device.go.set()
    assert tier.pins
    tier.pins.close()


def is_mapped(address: int) -> bool:
    """Whether there is memory at an address."""
    ranges = (line.split(" ", 1)[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


def until(so: Callable[[], bool]) -> None:
    """Wait until it is so."""
    deadline, never = monotonic_seconds() + SECONDS_MAX, Event()
    while not so():
        assert monotonic_seconds() < deadline, "it is still not so"
        never.wait(0.002)


def test_a_segment_is_used_at_once_and_registered_meanwhile(tier: MemoryTier, device: Watched) -> None:
    """It is there before the driver has done anything; when it goes, it is given back to the driver before it is unmapped."""
    segment = tier.create(NAMESPACE, 0, 1)
    address = segment.slots.ctypes.data
    segment.slots[:] = 1
    assert device.registered == []
    device.go.set()
    until(lambda: device.registered == [address])
    tier.discard(segment)
    assert device.given_back == [address] and not is_mapped(address)


def test_who_discards_a_segment_waits_for_its_registration(tier: MemoryTier, device: Watched) -> None:
    """The driver is at it: nothing is unmapped under its hands."""
    segment = tier.create(NAMESPACE, 0, 1)
    address = segment.slots.ctypes.data
    until(lambda: device.asked == [address])
    with ThreadPoolExecutor(1) as other:
        gone = other.submit(tier.discard, segment)
        assert is_mapped(address) and not gone.done()
        device.go.set()
        assert gone.result(SECONDS_MAX)
    assert device.registered == device.given_back == [address]


def test_a_segment_that_goes_before_its_turn_is_never_registered(tier: MemoryTier, device: Watched) -> None:
    """The driver is busy with another one: nobody waits for that, and the one that is gone is not touched."""
    first, second = tier.create(NAMESPACE, 0, 1), tier.create(NAMESPACE, 1, 1)
    until(lambda: bool(device.asked))
    tier.discard(second)
    device.go.set()
    tier.discard(first)
    assert len(device.asked) == len(device.given_back) == 1


def test_an_adopted_segment_is_registered_too(tier: MemoryTier, device: Watched) -> None:
    """What an earlier life left is as fast as what is new."""
    segment = tier.create(NAMESPACE, 0, 1)
    adopted = tier.adopt(os.dup(segment.directory_fd), os.dup(segment.slots_fd))
    device.go.set()
    until(lambda: device.registered == [segment.slots.ctypes.data, adopted.slots.ctypes.data])
    for each in (adopted, segment):
        tier.discard(each)


def test_where_the_driver_refuses_everything_goes_on_and_it_is_said_once(
    tier: MemoryTier, device: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    """Copies are slower then; nothing is given back that was not taken."""
    device.refuses = True
    device.go.set()
    segments = [tier.create(NAMESPACE, ordinal, 1) for ordinal in range(3)]
    until(lambda: len(device.asked) == 3)
    for segment in segments:
        tier.discard(segment)
    assert device.given_back == []
    assert caplog.text.count("segments cannot be registered with the GPU") == 1
