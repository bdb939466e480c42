"""Calls of the CUDA driver, against the emulation and the real headers: what is shared, what is refused, and how."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.build import PAGE_BYTES, compile_c, environ, load
from tierd import cuda, devices, driver
from tierd.client import pinned
from tierd.cuda import Device, DeviceArray
from tierd.driver import AllocationProperties, CopyAttributes
from tierd.errors import Invalid
from tierd.tiers.io.cufile import GpuStatistics, Statistics
from tierd.tiers.paths import download, upload

SIZE = 4 * PAGE_BYTES
CHILD = """
import sys, json
from tierd.cuda import Device
from tierd.errors import Invalid
try:
    print(json.dumps(repr(Device(int(sys.argv[1])))))
except Invalid as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def device(emulation: Path) -> Device:
    """An emulated GPU in this process."""
    load(emulation)
    return Device(0)


@pytest.fixture
def mapped(device: Device) -> Iterator[tuple[Device, int, int]]:
    """A device, a descriptor of its memory, and where that is mapped."""
    descriptor, address = device.create(SIZE), device.reserve(SIZE)
    device.map(address, SIZE, descriptor)
    yield device, descriptor, address
    device.unmap(address, SIZE)
    device.free(address, SIZE)
    os.close(descriptor)


def opened(number: int, environment: dict[str, str]) -> str:
    """What a process says that opens a device."""
    command = [sys.executable, "-c", CHILD, str(number)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True)
    said: str = json.loads(done.stdout)
    return said


def test_one_descriptor_is_the_same_memory_wherever_it_is_mapped(mapped: tuple[Device, int, int]) -> None:
    """What is written through one mapping is read through another, also of an earlier copy of the descriptor."""
    device, descriptor, address = mapped
    again, other = os.dup(descriptor), device.reserve(SIZE)
    device.map(other, SIZE, again)
    content = np.frombuffer(os.urandom(SIZE), np.uint8)
    upload([DeviceArray(device, address, SIZE)], [content])
    back = np.empty(SIZE, np.uint8)
    download([back], [DeviceArray(device, other, SIZE)])
    assert (back == content).all()
    device.clear(address, SIZE)
    download([back], [DeviceArray(device, other, SIZE)])
    assert not back.any()
    device.unmap(other, SIZE)
    device.free(other, SIZE)
    os.close(again)


def test_the_callers_own_context_is_never_changed(mapped: tuple[Device, int, int]) -> None:
    """Whatever was current before a call is current after it, also when the call fails."""
    device, descriptor, _ = mapped
    mine, found = ctypes.c_void_p(0x77), ctypes.c_void_p()
    driver.call("cuCtxPushCurrent_v2", mine)
    with pytest.raises(OSError, match="cuMemMap says CUDA_ERROR_INVALID_VALUE"):
        device.map(0, SIZE, descriptor)
    device.create(SIZE)
    driver.call("cuCtxPopCurrent_v2", ctypes.byref(found))
    assert found.value == mine.value


def test_a_copy_needs_a_context(mapped: tuple[Device, int, int]) -> None:
    """Outside of `with device` the driver refuses it: the emulation is as strict as that."""
    device, _, address = mapped
    with pytest.raises(OSError, match="cuMemcpyHtoD_v2 says CUDA_ERROR_INVALID_CONTEXT"):
        device.upload(address, ctypes.addressof(ctypes.create_string_buffer(8)), 8)


@pytest.mark.parametrize("what", ["a file", "a memfd", "too little"])
def test_a_descriptor_that_is_not_that_memory_is_refused(device: Device, tmp_path: Path, what: str) -> None:
    """Neither a file nor a memfd is mapped, nor an allocation that is smaller than announced; nothing stays mapped."""
    address = device.reserve(SIZE)
    descriptor = {
        "a file": lambda: os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT),
        "a memfd": lambda: os.memfd_create("directory"),
        "too little": lambda: device.create(SIZE // 2),
    }[what]()
    with pytest.raises(OSError, match=r"cuMem(Import|Map)"):
        device.map(address, SIZE, descriptor)
    os.close(descriptor)
    device.free(address, SIZE)


def test_descriptors_are_closed_on_exec(device: Device) -> None:
    """No program that this process starts inherits a GPU's memory."""
    descriptor = device.create(SIZE)
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


def test_a_row_is_a_piece_of_the_array(device: Device) -> None:
    """Rows follow each other; what libraries are told of one is its address and length."""
    rows = DeviceArray(device, 1 << 40, 3, 512)
    assert len(rows) == 3 and len(rows[2]) == 512
    assert rows[2].__cuda_array_interface__["data"] == ((1 << 40) + 1024, False)
    assert [len(row) for row in rows] == [512] * 3
    with pytest.raises(IndexError):
        rows[3]


def test_without_a_driver_the_refusal_says_so(tmp_path: Path) -> None:
    """A library that cannot be loaded is named, with the loader's words."""
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    assert "cuda:0 cannot be used: the NVIDIA driver cannot be loaded" in opened(0, {"LD_LIBRARY_PATH": str(tmp_path)})


def test_a_gpu_that_is_not_there_is_refused(emulation: Path) -> None:
    """With the number of those that the process sees."""
    assert opened(1, environ(emulation)) == "cuda:1 cannot be used: this process sees 1 GPUs"
    assert opened(1, environ(emulation, STUB_CUDA_DEVICES="2")) == "<Device cuda:1 Emulated Device 1>"


@pytest.mark.parametrize(
    ("attribute", "lacks"), [(102, "map memory where it is wanted"), (103, "export memory as a descriptor")]
)
def test_a_gpu_that_cannot_share_memory_is_refused_with_what_it_lacks(emulation: Path, attribute: int, lacks: str) -> None:
    """The refusal names the device and the attribute that the driver says it has not."""
    said = opened(0, environ(emulation, STUB_CUDA_LACKS=str(attribute)))
    assert said == f"cuda:0 cannot be used: Emulated Device 0 cannot {lacks} (device attribute {attribute} is 0)"


def test_structures_are_those_of_the_real_headers(tmp_path: Path) -> None:
    """Sizes and places of fields, and values of constants, as a C compiler sees them in cuda.h and cufile.h."""
    ours = {
        "sizeof(CUmemAllocationProp)": ctypes.sizeof(AllocationProperties),
        "offsetof(CUmemAllocationProp, location.id)": AllocationProperties.location.offset + driver.Location.id.offset,
        "offsetof(CUmemAllocationProp, allocFlags.gpuDirectRDMACapable)": AllocationProperties.flags.offset
        + driver.AllocationFlags.gpu_direct_rdma.offset,
        "sizeof(CUmemAccessDesc)": ctypes.sizeof(driver.Access),
        "offsetof(CUmemAccessDesc, flags)": driver.Access.flags.offset,
        "sizeof(CUmemcpyAttributes)": ctypes.sizeof(CopyAttributes),
        "offsetof(CUmemcpyAttributes, srcLocHint)": CopyAttributes.source_hint.offset,
        "offsetof(CUmemcpyAttributes, flags)": CopyAttributes.flags.offset,
        "sizeof(CUuuid)": cuda.UUID_BYTES,
        "sizeof(CUdeviceptr)": ctypes.sizeof(ctypes.c_ulonglong),
        "CU_MEM_ALLOCATION_TYPE_PINNED": cuda.PINNED,
        "CU_MEM_LOCATION_TYPE_DEVICE": cuda.DEVICE,
        "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR": cuda.POSIX_DESCRIPTOR,
        "CU_MEM_ACCESS_FLAGS_PROT_READWRITE": cuda.READ_WRITE,
        "CU_MEM_ALLOC_GRANULARITY_MINIMUM": 0,
        "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM": pinned.IN_STREAM_ORDER,
        "CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE": pinned.BESIDE_KERNELS,
        "CU_EVENT_DISABLE_TIMING": pinned.WITHOUT_TIMING,
        "CU_MEMHOSTREGISTER_PORTABLE": driver.PORTABLE,
        "CUDA_ERROR_NOT_READY": driver.NOT_READY,
        "CUDA_ERROR_NOT_SUPPORTED": driver.NOT_SUPPORTED,
        "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": cuda.CAN_MAP,
        "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": cuda.CAN_EXPORT,
        "CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED": cuda.CAN_RDMA,
        "sizeof(CUfileStatsLevel3_t)": ctypes.sizeof(Statistics),
        "offsetof(CUfileStatsLevel3_t, num_gpus)": Statistics.gpus.offset,
        "offsetof(CUfileStatsLevel3_t, per_gpu_stats)": Statistics.per_gpu.offset,
        "sizeof(CUfilePerGpuStats_t)": ctypes.sizeof(GpuStatistics),
        "offsetof(CUfilePerGpuStats_t, n_p2p_reads)": GpuStatistics.reads.offset,
        "offsetof(CUfilePerGpuStats_t, n_posix_reads)": GpuStatistics.reads.offset + 16,
        "offsetof(CUfilePerGpuStats_t, n_p2p_writes)": GpuStatistics.writes.offset,
        "offsetof(CUfilePerGpuStats_t, n_posix_writes)": GpuStatistics.writes.offset + 16,
    }
    source, program = tmp_path / "sizes.c", tmp_path / "sizes"
    lines = "".join(f'printf("%zu\\n", (size_t)({what}));' for what in ours)
    source.write_text(
        f"#include <cuda.h>\n#include <cufile.h>\n#include <stddef.h>\n#include <stdio.h>\nint main() {{{lines}}}"
    )
    compile_c(["-o", str(program), str(source)])
    theirs = subprocess.run([program], capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert dict(zip(ours, map(int, theirs), strict=True)) == ours


def test_a_device_is_named_by_its_number() -> None:
    """Anything else is refused with what it must be: "cuda" alone means another GPU to each process."""
    assert devices.gpu_number("cuda:12") == 12 and devices.gpu_number("cpu") is None
    for name in ("cuda", "cuda:-1", "gpu:0", ""):
        with pytest.raises(Invalid, match="such as 'cuda:0'"):
            devices.gpu_number(name)


def test_opening_an_unusable_gpu_is_the_callers_mistake(emulation: Path) -> None:
    """It is Invalid, which a program reports and does not try again."""
    load(emulation)
    with pytest.raises(Invalid, match="this process sees 1 GPUs"):
        Device(7)
