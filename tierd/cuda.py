"""GPU memory that processes share: allocations passed as descriptors and mapped where one wants them, by the CUDA driver.

No GPU memory is taken before the first `Device`.

Source: CUDA driver API, "Virtual Memory Management" (cuMemCreate, cuMemExportToShareableHandle, cuMemMap).
"""

from __future__ import annotations

import ctypes
import errno
import os
from ctypes import byref, c_char, c_int, c_size_t, c_void_p
from typing import Any

from tierd.driver import Access, AllocationProperties, Context, DevicePointer, Handle, Location, call, needing

PINNED, DEVICE, POSIX_DESCRIPTOR, READ_WRITE = 1, 1, 1, 3
"""Kinds of an allocation, of where it is, of what it is exported as, and of access to it."""
CAN_MAP, CAN_EXPORT, CAN_RDMA = 102, 103, 110
"""Attributes of a device: virtual memory management, export as a descriptor, and what GPUDirect needs of such memory."""
UUID_BYTES = 16


class Device(Context):
    """One GPU, by its number among those that this process sees.

    `uuid` names it in every process, whatever number it has there. `granularity` divides every size and address of a mapping.
    """

    def __init__(self, number: int) -> None:
        """Take the device's primary context; raises Invalid with the reason when there is none, or it cannot share memory."""
        super().__init__(number)
        with needing(number):
            self._describe()

    def __repr__(self) -> str:
        return f"<Device cuda:{self.number} {self.name}>"

    def _describe(self) -> None:
        total, granularity, name = c_size_t(), c_size_t(), ctypes.create_string_buffer(256)
        call("cuDeviceGetName", name, len(name), self.number)
        self.name = name.value.decode("utf-8", "replace")
        for attribute, what in ((CAN_MAP, "map memory where it is wanted"), (CAN_EXPORT, "export memory as a descriptor")):
            if not self._attribute(attribute):
                raise OSError(errno.ENOTSUP, f"{self.name} cannot {what} (device attribute {attribute} is 0)")
        uuid = (c_char * UUID_BYTES)()
        call("cuDeviceGetUuid_v2", uuid, self.number)
        self.uuid: bytes = uuid.raw
        call("cuDeviceTotalMem_v2", byref(total), self.number)
        self.total_bytes = total.value
        self._properties = AllocationProperties(PINNED, POSIX_DESCRIPTOR, Location(DEVICE, self.number))
        self._properties.flags.gpu_direct_rdma = self._attribute(CAN_RDMA)
        call("cuMemGetAllocationGranularity", byref(granularity), byref(self._properties), 0)
        self.granularity = granularity.value

    def _attribute(self, attribute: int) -> int:
        value = c_int()
        call("cuDeviceGetAttribute", byref(value), attribute, self.number)
        return value.value

    # Everything below raises OSError with the driver's words.

    def create(self, size: int) -> int:
        """A descriptor of new memory, of a multiple of `granularity`. It lives until the last descriptor is closed and the last
        mapping is gone (cuMemRelease: "its shareable counterparts"). What is in it is what was there before.
        """
        handle, descriptor = Handle(), c_int()
        with self:
            call("cuMemCreate", byref(handle), size, byref(self._properties), 0)
            try:
                call("cuMemExportToShareableHandle", byref(descriptor), handle, POSIX_DESCRIPTOR, 0)
            finally:
                call("cuMemRelease", handle)
        os.set_inheritable(descriptor.value, False)
        return descriptor.value

    def reserve(self, size: int) -> int:
        """Addresses without memory."""
        address = DevicePointer()
        with self:
            call("cuMemAddressReserve", byref(address), size, 0, 0, 0)
        return address.value

    def map(self, address: int, size: int, descriptor: int) -> None:
        """Put the memory that a descriptor stands for at reserved addresses; the descriptor stays the caller's."""
        handle, found = Handle(), AllocationProperties()
        with self:
            call("cuMemImportFromShareableHandle", byref(handle), c_void_p(descriptor), POSIX_DESCRIPTOR)
            try:
                call("cuMemGetAllocationPropertiesFromHandle", byref(found), handle)
                if (found.location.type, found.location.id) != (DEVICE, self.number):
                    raise OSError(errno.EXDEV, f"the memory is of cuda:{found.location.id}, not cuda:{self.number}")
                call("cuMemMap", address, size, 0, handle, 0)
            finally:
                call("cuMemRelease", handle)  # the mapping keeps the memory
            try:
                call("cuMemSetAccess", address, size, byref(Access(Location(DEVICE, self.number), READ_WRITE)), 1)
            except OSError:
                call("cuMemUnmap", address, size)
                raise

    def unmap(self, address: int, size: int) -> None:
        """Leave addresses without memory, once all work of this process on the device has ended: it may be touching them."""
        with self:
            call("cuCtxSynchronize")
            call("cuMemUnmap", address, size)

    def free(self, address: int, size: int) -> None:
        """Give reserved addresses back, with nothing mapped there."""
        with self:
            call("cuMemAddressFree", address, size)

    def clear(self, address: int, size: int) -> None:
        """Fill mapped memory with zeros."""
        with self:
            call("cuMemsetD8_v2", address, 0, size)
            call("cuCtxSynchronize")

    def download(self, target: int, source: int, size: int) -> None:
        """Copy from the device to host memory, given as addresses, within `with device`. Nothing is under way afterwards."""
        call("cuMemcpyDtoH_v2", target, source, size)

    def upload(self, target: int, source: int, size: int) -> None:
        """Copy from host memory to the device, within `with device`. It has arrived only after `wait`: from memory that is not
        registered, the driver returns when it has taken the bytes.
        """
        call("cuMemcpyHtoD_v2", target, source, size)

    def wait(self) -> None:
        """Wait for all that this process has given the device to do, within `with device`."""
        call("cuCtxSynchronize")


class DeviceArray:
    """Bytes of device memory as uint8 `[rows, row_bytes]`, or `[row_bytes]` for one row of it: what torch and kvikio take.

    The memory lives as long as its owner says, not as long as this.
    """

    def __init__(self, device: Device, address: int, *shape: int) -> None:
        self.device, self.address, self.shape = device, address, shape

    def __repr__(self) -> str:
        return f"<DeviceArray uint8{list(self.shape)} at {self.address:#x} of cuda:{self.device.number}>"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> DeviceArray:
        """One row."""
        rows, row_bytes = self.shape
        if not 0 <= index < rows:
            raise IndexError(f"row {index} of {rows}")
        return DeviceArray(self.device, self.address + index * row_bytes, row_bytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": "|u1", "data": (self.address, False), "version": 3, "strides": None}
