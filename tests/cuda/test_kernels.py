"""Digests by the kernels that ship as PTX: launched by the driver, on a real GPU where there is one.

On the emulated one the PTX itself is executed, instruction by instruction (see ptx.c), so arithmetic, parameters and grids are
shown. What it does not show: that a GPU's driver compiles it to the same, and how fast that is.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from tests.cuda.build import environ, load
from tierd.cuda import Device, DeviceArray
from tierd.tiers.gds import DIGESTED
from tierd.tiers.kernels import SCRATCH_BYTES, DeviceDigests, can_digest, doubt
from tierd.tiers.nvme import digests
from tierd.tiers.paths import upload

SLOT_BYTES = 72 << 10
SLOTS = 300
LENGTHS = (248, 256, 1016, 1024, 1032, 1088, 2048, 2056, 64 << 10, (64 << 10) + 8, (66 << 10) - 64, SLOT_BYTES)
"""Around the borders of stripes (64 bytes), of chunks (1 KiB) and of the 64 chunks of a block."""
PATIENCE_SECONDS = 60.0


@pytest.fixture(params=["emulated", pytest.param("real", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """An emulated GPU, and a real one."""
    if request.param == "emulated":
        load(request.getfixturevalue("emulation"))
    return Device(0)


class Rows:
    """Random bytes in some rows of a device's memory, and the same in host memory."""

    def __init__(self, device: Device, count: int, row_bytes: int) -> None:
        size = -(-count * row_bytes // device.granularity) * device.granularity
        self.address, descriptor = device.reserve(size), device.create(size)
        device.map(self.address, size, descriptor)
        os.close(descriptor)
        array = DeviceArray(device, self.address, count, row_bytes)
        self.there = [array[at] for at in range(count)]
        self.here = [np.frombuffer(os.urandom(row_bytes), np.uint8) for _ in range(count)]
        upload(self.there, self.here)

    def expected(self, length: int) -> list[int]:
        """What xxHash's own code says."""
        return digests(self.here, length).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_gpus_digests_are_those_of_xxhash(device: Device, length: int) -> None:
    """Whatever the length, and wherever the payloads lie."""
    rows, compute = Rows(device, 9, SLOT_BYTES), DeviceDigests(device)
    order = random.Random(length).sample(range(9), 7)
    assert compute([rows.there[at] for at in order], length).tolist() == [rows.expected(length)[at] for at in order]
    assert compute([], length).tolist() == []


def test_what_scratch_memory_does_not_hold_comes_in_parts(device: Device) -> None:
    """More payloads than one launch takes, and one payload that needs more than a thread begins with."""
    rows, compute = Rows(device, SLOTS, SLOT_BYTES), DeviceDigests(device)
    assert SLOTS * SLOT_BYTES // 16 > SCRATCH_BYTES
    assert compute(rows.there, SLOT_BYTES).tolist() == rows.expected(SLOT_BYTES)
    large = Rows(device, 1, 16 * SCRATCH_BYTES + (64 << 10))
    assert compute(large.there, len(large.here[0])).tolist() == large.expected(len(large.here[0]))
    assert compute(rows.there, 2048).tolist() == rows.expected(2048)


def test_what_is_behind_a_payload_does_not_count(device: Device) -> None:
    """A slot's padding is no part of its digest, and every bit before it is."""
    rows, compute = Rows(device, 1, 4096), DeviceDigests(device)
    before = compute(rows.there, 3000)
    for place, same in ((3000, True), (4095, True), (0, False), (1500, False), (2999, False)):
        changed = rows.here[0].copy()
        changed[place] ^= 16
        upload(rows.there, [changed])
        assert (compute(rows.there, 3000) == before).all() == same, place


def test_threads_digest_at_once(device: Device) -> None:
    """Each in scratch memory of its own: nobody gets another's digests."""
    compute, threads, rounds = DeviceDigests(device), 6, 20
    work = [Rows(device, 5, 8192) for _ in range(threads)]
    together = Barrier(threads, timeout=PATIENCE_SECONDS)

    def repeat(rows: Rows) -> bool:
        together.wait()
        lengths = [8192 - 8 * turn for turn in range(rounds)]
        return all(compute(rows.there, length).tolist() == rows.expected(length) for length in lengths)

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(repeat, work, timeout=PATIENCE_SECONDS)) == [True] * threads


def test_lengths_that_the_kernels_do_not_take_are_known() -> None:
    """Short ones, and such that end within a word: they are digested in host memory."""
    assert [length for length in (0, 64, 240, 248, 250, 256, 1 << 20, (1 << 20) + 4, 1 << 31) if can_digest(length)] == [
        *(248, 256, 1 << 20)
    ]


def test_memory_that_is_not_there_is_an_error(emulation: Path) -> None:
    """Of no GPU, or of another one: the caller is told, and others are served after it."""
    load(emulation)
    device = Device(0)
    rows, compute = Rows(device, 2, 4096), DeviceDigests(device)
    with pytest.raises(OSError, match="cuLaunchKernel says CUDA_ERROR_ILLEGAL_ADDRESS"):
        compute([rows.there[0], DeviceArray(device, 1 << 40, 4096)], 4096)
    assert compute(rows.there, 4096).tolist() == rows.expected(4096)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, ""),
        ({"STUB_CUDA_KERNELS_LIE": "1"}, f"Emulated Device 0 computed other digests of {DIGESTED[0]} bytes than the CPU"),
        ({"STUB_CUDA_PTX_REFUSED": "1"}, "cuModuleLoadData says CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222)"),
    ],
    ids=["right", "wrong", "refused"],
)
def test_digests_are_tried_before_they_are_believed(
    emulation: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], says: str
) -> None:
    """In a process of its own; a GPU that computes another number, or a driver that does not take the PTX, is found there."""
    for name, value in environ(emulation, **settings).items():
        monkeypatch.setenv(name, value)
    said = doubt("cuda:0", DIGESTED, PATIENCE_SECONDS)
    assert said.endswith(says) and bool(said) == bool(says)


@pytest.mark.gpu
def test_a_real_gpu_is_not_doubted() -> None:
    """The daemon's own trial, with all lengths that it tries."""
    assert doubt("cuda:0", DIGESTED, PATIENCE_SECONDS) == ""
