"""Digests of what is in a GPU's memory, computed there: kernels that were compiled ahead of time, launched by the driver.

`ptx/` has the output of `make ptx`: PTX, which the driver compiles for the GPU that is there, and `digest.json`, which says how
it is launched (what is in it: `kernels/tierd_kernels/ahead.py`). So neither torch nor Triton is needed. Whether a GPU computes
what the CPU would is tried before it is believed, by `doubt`, in a process of its own: a kernel that goes wrong ends its
process's use of the GPU.

A part of a call is one small upload, two launches, and one small download, which waits for them. It takes as many payloads as
there is scratch memory for, on the GPU, for each thread: 16 bytes each, and 1/16 of what they have.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from ctypes import byref, c_uint, c_ulonglong, c_void_p
from functools import cache
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.cuda import Device, DeviceArray
from tierd.devices import gpu_number
from tierd.driver import DevicePointer, call
from tierd.layout import PAGE_BYTES
from tierd.tiers.io.probe import in_child
from tierd.tiers.nvme import digests

FOLDER = Path(__file__).parent / "ptx"
SCRATCH_BYTES = 1 << 20
"""Of each thread; more only where a single payload needs it: one of more than 16 MiB."""
TYPES = {"u32": c_uint, "u64": c_ulonglong}
WORD_BYTES = 8
TRIED = 3
"""Payloads of each length in the trial."""


@cache
def about() -> dict[str, Any]:
    """What is known of the kernels: `digest.json`."""
    known: dict[str, Any] = json.loads((FOLDER / "digest.json").read_text())
    return known


def can_digest(payload_bytes: int) -> bool:
    """Whether the kernels take payloads of this length."""
    shortest, step = (int(about()["payloads"][name]) for name in ("bytes_min", "bytes_step"))
    return shortest <= payload_bytes < 1 << 31 and payload_bytes % step == 0


class DeviceDigests:
    """Computes `digests` of rows of one GPU's memory, there. Thread safe; a call waits until it has them."""

    def __init__(self, device: Device) -> None:
        """Load the kernels; raises OSError with the driver's words."""
        self._device, self._mine = device, local()
        table = np.frombuffer(bytes.fromhex(about()["table"]), np.uint64)
        with device:
            self._kernels = {name: _Kernel(name, how) for name, how in about()["kernels"].items()}
            self._table = _allocate(table.nbytes)
            device.upload(self._table, table.ctypes.data, table.nbytes)
            device.wait()

    def __call__(self, payloads: Sequence[DeviceArray], payload_bytes: int) -> NDArray[np.uint64]:
        """xxh3-64 of the first bytes of each payload, uint64 `[payloads]`. Raises OSError when the GPU fails."""
        addresses = np.array([payload.address for payload in payloads], np.uint64)
        assert can_digest(payload_bytes) and not (addresses % about()["payloads"]["address_step"]).any()
        chunks = (payload_bytes - 1) // about()["chunk_bytes"]
        each = 2 * WORD_BYTES + chunks * about()["sum_bytes"]
        at_once = max(1, SCRATCH_BYTES // each)
        found = np.empty_like(addresses)
        with self._device:
            for first in range(0, len(addresses), at_once):
                part = slice(first, min(first + at_once, len(addresses)))
                scratch = self._scratch((part.stop - part.start) * each)
                self._digest(addresses[part], found[part], payload_bytes, chunks, scratch)
        return found

    def _digest(self, addresses: NDArray[np.uint64], found: NDArray[np.uint64], length: int, chunks: int, scratch: int) -> None:
        """One part. Scratch memory has room for its digests, for addresses, and for the sums of chunks."""
        count = len(addresses)
        values = {"digests": scratch, "addresses": scratch + addresses.nbytes, "sums": scratch + 2 * addresses.nbytes}
        values |= {"table": self._table, "count": count, "length": length, "chunks": chunks}
        sum_chunks, chain_sums = self._kernels["sum_chunks"], self._kernels["chain_sums"]
        self._device.upload(values["addresses"], addresses.ctypes.data, addresses.nbytes)
        if chunks:
            sum_chunks.launch((count, sum_chunks.blocks(chunks)), values)
        chain_sums.launch((chain_sums.blocks(count), 1), values)
        self._device.download(found.ctypes.data, values["digests"], found.nbytes)

    def _scratch(self, size: int) -> int:
        """The address of this thread's own scratch memory, of so many bytes at least."""
        mine = self._mine
        if getattr(mine, "size", 0) < size:
            if getattr(mine, "size", 0):
                mine.size = 0
                call("cuMemFree_v2", mine.address)
            mine.address = _allocate(max(size, SCRATCH_BYTES))
            mine.size = max(size, SCRATCH_BYTES)
        address: int = mine.address
        return address


class _Kernel:
    """One kernel, loaded into the current context."""

    def __init__(self, name: str, how: dict[str, Any]) -> None:
        module, self._function, self._how = c_void_p(), c_void_p(), how
        call("cuModuleLoadData", byref(module), (FOLDER / f"{name}.ptx").read_bytes())
        call("cuModuleGetFunction", byref(self._function), module, how["name"].encode())

    def blocks(self, items: int) -> int:
        """How many blocks so many items take."""
        return -(-items // int(self._how["at_once"]))

    def launch(self, grid: tuple[int, int], values: dict[str, int]) -> None:
        """Begin it, with its parameters from `values`. What has no name there is scratch memory that it does not use."""
        arguments = [TYPES[kind](values.get(name, 0)) for name, kind in self._how["parameters"]]
        places = (c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        block = self._how["threads"], 1, 1
        call("cuLaunchKernel", self._function, *grid, 1, *block, self._how["shared_bytes"], None, places, None)


def _allocate(size: int) -> int:
    """The address of so many bytes of the current context's GPU, at a multiple of 256."""
    address = DevicePointer()
    call("cuMemAlloc_v2", byref(address), size)
    return address.value


def doubt(device: str, lengths: Sequence[int], timeout_seconds: float) -> str:
    """Why a GPU's digests are not to be used; empty where those of all lengths were right. Blocks up to `timeout_seconds`."""
    failure, said = in_child("tierd.tiers.kernels", device, *map(str, lengths), timeout_seconds=timeout_seconds)
    return failure or said


def _try(name: str, lengths: list[int]) -> str:
    """In the child: what `doubt` returns."""
    number = gpu_number(name)
    assert number is not None, f"{name} has no kernels"
    device = Device(number)
    compute, row_bytes = DeviceDigests(device), -(-max(lengths) // PAGE_BYTES) * PAGE_BYTES
    address = device.reserve(size := -(-TRIED * row_bytes // device.granularity) * device.granularity)
    device.map(address, size, device.create(size))
    content = np.frombuffer(os.urandom(TRIED * row_bytes), np.uint8).reshape(TRIED, row_bytes)
    with device:
        device.upload(address, content.ctypes.data, content.nbytes)
        device.wait()
    rows = DeviceArray(device, address, TRIED, row_bytes)
    for length in lengths:
        if (compute([rows[at] for at in range(TRIED)], length) != digests(list(content), length)).any():
            return f"{device.name} computed other digests of {length} bytes than the CPU"
    return ""


if __name__ == "__main__":
    print(_try(sys.argv[1], [int(length) for length in sys.argv[2:]]))
