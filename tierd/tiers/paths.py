"""The ways between memory and segment files, and how many bytes took each.

From and to host memory an io engine moves bytes by itself. For a GPU's memory there are two ways: straight, by GPUDirect
Storage, and through a buffer of host memory ("bounce"). Which one is faster depends on the machine, the direction and the size
of a block, so it was measured (`Speeds`, by the probe); without GPUDirect Storage there is only the buffer.

Both ways are verified by the digest of segment files. Of what goes straight the GPU computes it, where its kernels were tried
and found right; otherwise it is copied to host memory for that.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.cuda import Device, DeviceArray
from tierd.log import get_logger
from tierd.tiers.directory import Slots
from tierd.tiers.kernels import DeviceDigests, can_digest
from tierd.tiers.nvme import READ_FAILED, READ_OK, FileSegment, digests

log = get_logger("paths")
EMPTY: NDArray[np.uint8] = np.empty(0, np.uint8)
STAGING_BYTES = 8 << 20
"""Of each io thread that moves bytes of a GPU; at least one slot."""
READ, WRITE = "read", "write"
DIRECTIONS = (READ, WRITE)
GDS, BOUNCE = "gds", "bounce"
HOST_PATHS = {"posix": "posix", "kvikio": "kvikio-host"}
"""What the way of an io engine to and from host memory is called."""


@dataclass(frozen=True)
class Speeds:
    """Bytes a second as measured, by direction and block size: straight, and through host memory."""

    measured: dict[str, dict[int, tuple[float, float]]]

    def prefers_straight(self, direction: str, block_bytes: int) -> bool:
        """Whether straight was faster with blocks of the size that is nearest to this one."""
        sizes = self.measured[direction]
        straight, bounce = sizes[min(sizes, key=lambda size: abs(np.log(size / block_bytes)))]
        return straight > bounce


class Paths:
    """Moves payloads of memory tiers to and from file segments. Thread safe; every call blocks its thread.

    `device` is the GPU that payloads may be on (or one of several), `speeds` what was measured where GPUDirect Storage works,
    `kernels` what computes digests on a GPU, by its number, where that was tried.
    """

    def __init__(
        self,
        engine: str,
        device: Device | None = None,
        speeds: Speeds | None = None,
        kernels: Mapping[int, DeviceDigests] | None = None,
    ) -> None:
        self.host = HOST_PATHS.get(engine, engine)
        self.device, self.speeds, self._kernels = device, speeds, kernels or {}
        self.bytes: Counter[tuple[str, str]] = Counter()
        """Payload bytes that have arrived, by path and direction."""
        self._lock = Lock()
        self._staging = local()

    @property
    def gpu(self) -> str:
        """The best of the ways to a GPU: "gds", "bounce" or "none"."""
        return "none" if self.device is None else GDS if self.speeds else BOUNCE

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that there are here."""
        return (self.host, *([GDS] if self.speeds else []), *([BOUNCE] if self.device else []))

    def write(
        self, segment: FileSegment, slots: Slots, payloads: Sequence[Any], hashes: bytes, parents: bytes
    ) -> NDArray[np.bool_]:
        """`FileSegment.write` from memory of either kind, all payloads of the same."""
        path, done = self._choose(WRITE, segment, payloads), np.zeros(len(payloads), np.bool_)
        if path == GDS:
            with counted(segment):  # digests come first: when the GPU fails, nothing was begun
                done = segment.write(slots, payloads, hashes, parents, self._digests)
        elif path == BOUNCE:
            for part, staged in self._staged(payloads):
                names = slice(32 * part.start, 32 * part.stop)
                with counted(segment):
                    download(staged, payloads[part])
                    done[part] = segment.write(slots[part], staged, hashes[names], parents[names])
        else:
            done = segment.write(slots, payloads, hashes, parents)
        self._count(path, WRITE, segment, int(done.sum()))
        return done

    def read(self, segment: FileSegment, slots: Slots, payloads: Sequence[Any]) -> NDArray[np.uint8]:
        """`FileSegment.read` to memory of either kind, all payloads of the same."""
        path, codes = self._choose(READ, segment, payloads), np.full(len(payloads), READ_FAILED, np.uint8)
        if path == GDS:
            with counted(segment):
                codes = segment.read(slots, payloads, self._digests)
        elif path == BOUNCE:
            for part, staged in self._staged(payloads):
                read = segment.read(slots[part], staged)
                good = np.flatnonzero(read == READ_OK).tolist()
                with counted(segment):
                    upload([payloads[part][at] for at in good], [staged[at] for at in good])
                    codes[part] = read
        else:
            codes = segment.read(slots, payloads)
        self._count(path, READ, segment, int((codes == READ_OK).sum()))
        return codes

    def _choose(self, direction: str, segment: FileSegment, payloads: Sequence[Any]) -> str:
        if not isinstance(payloads[0], DeviceArray):
            return self.host
        straight = self.speeds and self.speeds.prefers_straight(direction, segment.header.geometry.payload_bytes)
        return GDS if straight else BOUNCE

    def _count(self, path: str, direction: str, segment: FileSegment, blocks: int) -> None:
        with self._lock:
            self.bytes[path, direction] += blocks * segment.header.geometry.payload_bytes

    def _digests(self, payloads: Sequence[DeviceArray], payload_bytes: int) -> NDArray[np.uint64]:
        """Digests of what is in the memory of one device: computed there, or in parts in host memory."""
        computed = np.empty(len(payloads), np.uint64)
        if not payloads:
            return computed
        if (kernels := self._kernels.get(payloads[0].device.number)) and can_digest(payload_bytes):
            return kernels(payloads, payload_bytes)
        for part, staged in self._staged(payloads):
            download(staged, payloads[part])
            computed[part] = digests(staged, payload_bytes)
        return computed

    def _staged(self, payloads: Sequence[DeviceArray]) -> Iterator[tuple[slice, list[NDArray[np.uint8]]]]:
        """Parts of a list of payloads, each with rows of this thread's own host memory for it."""
        rows = self._rows(len(payloads[0]))
        for first in range(0, len(payloads), len(rows)):
            part = slice(first, min(first + len(rows), len(payloads)))
            yield part, list(rows[: part.stop - part.start])

    def _rows(self, slot_bytes: int) -> NDArray[np.uint8]:
        """This thread's staging memory as rows of a slot each, page aligned and registered with the GPU."""
        assert self.device is not None
        size, mine = max(1, STAGING_BYTES // slot_bytes) * slot_bytes, self._staging
        if getattr(mine, "memory", EMPTY).nbytes < size:
            if getattr(mine, "registered", False):
                self.device.unregister(mine.memory.ctypes.data)
            mine.memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
            mine.registered = self._register(mine.memory)
        memory: NDArray[np.uint8] = mine.memory
        return memory[:size].reshape(-1, slot_bytes)

    def _register(self, memory: NDArray[np.uint8]) -> bool:
        assert self.device is not None
        try:
            self.device.register(memory.ctypes.data, memory.nbytes)
        except OSError as error:
            log.warning("host memory cannot be registered with the GPU: copies are slower", reason=error.strerror)
            return False
        return True


@contextmanager
def counted(segment: FileSegment) -> Iterator[None]:
    """A GPU that fails to copy costs the blocks that it was about, and is counted with the failures of the segment."""
    try:
        yield
    except OSError as error:
        segment.noted("gpu", error)


def download(targets: Sequence[NDArray[np.uint8]], sources: Sequence[DeviceArray]) -> None:
    """Copy rows of device memory to host memory; all of it is there afterwards. Raises OSError."""
    for device in {source.device for source in sources}:
        with device:
            for target, source in zip(targets, sources, strict=True):
                device.download(target.ctypes.data, source.address, target.nbytes)


def upload(targets: Sequence[DeviceArray], sources: Sequence[NDArray[np.uint8]]) -> None:
    """Copy rows of host memory to device memory; all of it is there afterwards. Raises OSError."""
    for device in {target.device for target in targets}:
        with device:
            for target, source in zip(targets, sources, strict=True):
                device.upload(target.address, source.ctypes.data, source.nbytes)
            device.wait()
