"""The media: how many bytes each may take, and how a segment of it comes and goes.

A tier's bytes are counted from before a segment is made until after its last byte is given back, so the limit holds at
every moment, for any number of namespaces and lives. `create` and `discard` block: call them off the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tierd import systemd
from tierd.cuda import Device
from tierd.layout import Namespace
from tierd.log import get_logger
from tierd.tiers.device import DeviceSegment
from tierd.tiers.host import HostSegment
from tierd.tiers.io import IoEngine
from tierd.tiers.nvme import FileSegment
from tierd.tiers.paths import Paths
from tierd.tiers.pins import Pins
from tierd.tiers.segment import Geometry, Medium
from tierd.tiers.state import StateDirectory

log = get_logger("tier")
MemorySegment = HostSegment | DeviceSegment
FIRST_EPOCH = 1
"""Of a namespace that was never purged, or of which nothing is left."""


@dataclass
class Budget:
    """Bytes of a tier: `used` never exceeds `most`."""

    most: int
    used: int = 0

    def reserve(self, count: int) -> bool:
        """Take bytes if they are there."""
        if self.used + count > self.most:
            return False
        self.used += count
        return True

    def release(self, count: int) -> None:
        """Give bytes back."""
        assert count <= self.used, f"{count} bytes given back, {self.used} were used"
        self.used -= count


class Tier(Protocol):
    """One medium: makes segments (HostSegment, DeviceSegment or FileSegment) of one geometry per namespace."""

    name: str
    medium: Medium
    budget: Budget

    def geometry(self, namespace: Namespace) -> Geometry:
        """What every segment of the namespace looks like; raises Invalid when not even one block fits."""

    def create(self, namespace: Namespace, ordinal: int, epoch: int) -> Any:
        """A new segment, its bytes reserved before by the caller; raises Busy when the medium has no room.

        Where a segment outlives this process, so does the `ordinal` that it has among those of its namespace.
        """

    def discard(self, segment: Any) -> bool:
        """Give a segment up; returns whether the medium has its bytes again."""


class MemoryTier:
    """Memory segments of the host, of the cpu tier or of a gpu tier without a GPU. Where a service manager keeps descriptors,
    segments outlive this process. `pins` registers them with a GPU whose blocks come and go here.
    """

    medium = Medium.MEMORY

    def __init__(
        self,
        name: str,
        bytes_max: int,
        segment_bytes: int,
        huge_pages: str = "off",
        pins: Pins | None = None,
        device: bytes = b"",
    ) -> None:
        self.name = name
        self.device = device
        """The GPU that segments are on, by its 16 bytes, or what stands for one; empty in host memory."""
        self.pins = pins
        self.budget = Budget(bytes_max)
        self._segment_bytes = segment_bytes
        self._huge_pages = huge_pages
        self.not_kept = 0
        """Descriptors that the service manager did not take: they end with this process."""

    def geometry(self, namespace: Namespace) -> Geometry:
        """See Tier."""
        return HostSegment.geometry(namespace.layout, self._segment_bytes, self._huge_pages)

    def create(self, namespace: Namespace, ordinal: int, epoch: int) -> MemorySegment:
        """See Tier."""
        segment = self._make(namespace, epoch)
        if self.pins:
            self.pins.add(segment.slots)
        segment.kept_as = f"{self.name}.{ordinal}.{systemd.short(segment.segment_id[:6])}"
        for name, descriptor in stored_names(segment).items():
            if systemd.can_store() and not systemd.store(name, [descriptor]):
                self.not_kept += 1
                log.warning("the service manager does not keep a segment", name=name)
        return segment

    def adopt(self, directory_fd: int, slots_fd: int) -> MemorySegment:
        """The segment that these descriptors are, which belong to it then; raises Invalid when they are none."""
        segment = HostSegment.adopt(directory_fd, slots_fd)
        if self.pins:
            self.pins.add(segment.slots)
        return segment

    def discard(self, segment: MemorySegment) -> bool:
        """See Tier."""
        if self.pins:
            self.pins.remove(segment.slots)
        for name in stored_names(segment):
            systemd.remove(name)
        if segment.shred:
            segment.wipe()
        segment.close()
        return True

    def _make(self, namespace: Namespace, epoch: int) -> MemorySegment:
        return HostSegment.create(namespace, self._segment_bytes, epoch, self._huge_pages)


class DeviceTier(MemoryTier):
    """Segments in the memory of one GPU."""

    medium = Medium.DEVICE

    def __init__(self, name: str, bytes_max: int, segment_bytes: int, device: Device) -> None:
        super().__init__(name, bytes_max, segment_bytes, device=device.uuid)
        self._device = device

    def geometry(self, namespace: Namespace) -> Geometry:
        """See Tier."""
        return DeviceSegment.geometry(namespace.layout, self._segment_bytes, self._device.granularity)

    def adopt(self, directory_fd: int, slots_fd: int) -> MemorySegment:
        """See MemoryTier; also what the driver does not import is refused."""
        return DeviceSegment.adopt(directory_fd, slots_fd, self._device)

    def _make(self, namespace: Namespace, epoch: int) -> MemorySegment:
        return DeviceSegment.create(namespace, self._segment_bytes, epoch, self._device)


class NvmeTier:
    """File segments in the state directory, moved by an io engine."""

    name = "nvme"
    medium = Medium.FILE

    def __init__(
        self, bytes_max: int, segment_bytes: int, state: StateDirectory, io: IoEngine, paths: Paths | None = None
    ) -> None:
        self.budget = Budget(bytes_max)
        self.io = io
        self.paths = paths or Paths(io.name)
        self.state = state
        self._segment_bytes = segment_bytes

    def geometry(self, namespace: Namespace) -> Geometry:
        """See Tier."""
        return Geometry.fit(namespace.layout, self._segment_bytes)

    def create(self, namespace: Namespace, ordinal: int, epoch: int) -> FileSegment:
        """See Tier."""
        return FileSegment.create(self.state.folder(namespace), namespace, self._segment_bytes, epoch, self.io)

    def discard(self, segment: FileSegment) -> bool:
        """See Tier."""
        return segment.unlink()


def stored_names(segment: MemorySegment) -> dict[str, int]:
    """Under which names a segment's two descriptors are kept by the service manager: for directory and slots."""
    return {f"{segment.kept_as}.d": segment.directory_fd, f"{segment.kept_as}.s": segment.slots_fd}
