"""Slots in host memory are registered with the GPU in the background, so that its copy engines reach them at full speed.

Blocks that go between a GPU and the cpu tier are copied by these engines. From and to memory that is not registered the
driver copies through a buffer of its own, in the calling thread: right, and slower. So a segment is used at once and registered
meanwhile, and where the driver refuses (a limit of locked memory, a container) that is logged once.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tierd.cuda import Device
from tierd.log import get_logger

log = get_logger("pins")


class Pins:
    """Registers memory with one GPU, piece after piece, in a thread of its own. Thread safe."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "tierd-pin")
        self._asked: dict[int, Future[bool]] = {}
        """Whether what begins at an address was registered; there is no memory twice at one."""
        self._refused = False

    def add(self, slots: Any) -> None:
        """Have slots (a numpy array) registered; `remove` them before they are unmapped."""
        address: int = slots.ctypes.data
        self._asked[address] = self._thread.submit(self._register, address, slots.nbytes)

    def remove(self, slots: Any) -> None:
        """End what `add` began. Waits for the end of what is being registered."""
        address = slots.ctypes.data
        asked = self._asked.pop(address)
        if not asked.cancel() and asked.result():
            try:
                self._device.unregister(address)
            except OSError as error:
                log.warning("a segment cannot be unregistered", reason=error.strerror)

    def close(self) -> None:
        """Register no more; waits for the end of what is being registered. What is registered ends with the process."""
        self._thread.shutdown(cancel_futures=True)

    def _register(self, address: int, size: int) -> bool:
        try:
            self._device.register(address, size)
        except OSError as error:
            if not self._refused:
                log.warning("segments cannot be registered with the GPU: copies are slower", reason=error.strerror)
            self._refused = True
            return False
        return True
