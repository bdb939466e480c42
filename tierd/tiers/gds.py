"""Whether GPUDirect Storage works between a GPU and a folder, and with which blocks it is faster: measured, and not believed.

All of it happens in a process of its own with a deadline: it loads drivers, and cuFile can spin for ever. Blocks of several
sizes are written to a segment file and read back, by the very ways that the daemon would use, digests included. Then cuFile's
statistics are asked which way the bytes took: its compatibility mode copies through host memory and looks like the real thing.
Before that another process tries whether the GPU digests blocks of these sizes as the CPU does (`kernels.doubt`): if not,
digests are computed in host memory, here and by the daemon.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tierd.clock import monotonic_seconds
from tierd.cuda import Device, DeviceArray
from tierd.devices import gpu_number
from tierd.layout import Layout, Namespace
from tierd.tiers import kernels
from tierd.tiers.io import IoEngine, cufile, make
from tierd.tiers.io.probe import in_child
from tierd.tiers.kernels import DeviceDigests
from tierd.tiers.nvme import READ_OK, FileSegment
from tierd.tiers.paths import BOUNCE, DIRECTIONS, GDS, READ, WRITE, Paths, Speeds, download, upload
from tierd.tiers.segment import Geometry, Header, Medium

SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
DIGESTED = tuple(length for size in SIZES for length in (size, size - 1000))
"""Lengths of payloads whose digests are tried: whole slots, and such that end within a stripe and within a chunk."""
ON_GPU, IN_HOST = "gpu", "host"
"""Where the trial has digests computed of what goes straight."""
ROUND_BYTES = 16 << 20
"""What is written and read with each size and way, twice."""
ROUNDS = 2


@dataclass(frozen=True)
class Measured:
    """The speeds, where it works, or else the reasons why not; at least one. `doubt`: why the GPU does not compute digests."""

    speeds: Speeds | None
    reasons: tuple[str, ...] = ()
    doubt: str = ""

    def __str__(self) -> str:
        if self.speeds is None:
            return "; ".join(self.reasons)
        better = [
            f"{way} from {size >> 10} KiB" for way in DIRECTIONS for size in SIZES if self.speeds.prefers_straight(way, size)
        ]
        digested = f"digests are computed in host memory: {self.doubt}" if self.doubt else "digests are computed on the GPU"
        return f"it works, and is faster in: {', '.join(better) or 'nothing'}; {digested}"


def measure(folder: Path, device: str, threads: int, timeout_seconds: float) -> Measured:
    """Try it in `folder`. Blocks up to twice `timeout_seconds` and a little; whatever fails is a reason."""
    doubt = kernels.doubt(device, DIGESTED, timeout_seconds)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".gds-", ignore_cleanup_errors=True) as scratch:
            arguments = scratch, device, str(threads), IN_HOST if doubt else ON_GPU
            failure, output = in_child("tierd.tiers.gds", *arguments, timeout_seconds=timeout_seconds)
    except OSError as error:
        failure, output = str(error), ""
    if failure:
        return Measured(None, (f"it was tried: {failure}",))
    answer = json.loads(output)
    if answer["reasons"]:
        return Measured(None, tuple(answer["reasons"]))
    rows = answer["measured"]
    speeds = Speeds({way: {int(size): (one, two) for size, (one, two) in rows[way].items()} for way in DIRECTIONS})
    return Measured(speeds, doubt=doubt)


def measure_all(folder: Path, devices: list[str], threads: int, timeout_seconds: float) -> Measured:
    """One choice for all devices of a daemon: it must work with each of them, and the slowest one counts."""
    found = {name: measure(folder, name, threads, timeout_seconds) for name in devices}
    if reasons := [f"{name}: {reason}" for name, one in found.items() for reason in one.reasons]:
        return Measured(None, tuple(reasons))
    rows = [one.speeds.measured for one in found.values() if one.speeds]
    slowest = {way: {size: _slowest([row[way][size] for row in rows]) for size in rows[0][way]} for way in rows[0]}
    doubts = [f"{name}: {one.doubt}" for name, one in found.items() if one.doubt]
    return Measured(Speeds(slowest), doubt="; ".join(doubts))


def _slowest(speeds: list[tuple[float, float]]) -> tuple[float, float]:
    straight, bounce = zip(*speeds, strict=True)
    return min(straight), min(bounce)


def _try(folder: Path, name: str, threads: int, digested: str) -> dict[str, object]:
    """In the child: what `measure` reads."""
    import kvikio.defaults

    engine = make("kvikio", threads)
    if kvikio.defaults.is_compat_mode_preferred():
        udev = [] if os.path.isdir("/run/udev") else ["/run/udev is not there, which cuFile needs"]
        return {"reasons": ["kvikio is in its compatibility mode, which copies through host memory", *udev]}
    number = gpu_number(name)
    assert number is not None, f"{name} has no files to reach"
    counts, device = cufile.start(), Device(number)
    address = device.reserve(size := -(-ROUND_BYTES // device.granularity) * device.granularity)
    device.map(address, size, device.create(size))
    trial = _Trial(folder, engine, device, address, {number: DeviceDigests(device)} if digested == ON_GPU else {})
    measured = {size: trial.run(size) for size in SIZES}
    rows = {way: {size: [found[path, way] for path in (GDS, BOUNCE)] for size, found in measured.items()} for way in DIRECTIONS}
    return {"reasons": _doubts(cufile.operations() if counts else None), "measured": rows}


def _doubts(operations: Counter[tuple[str, str]] | None) -> list[str]:
    """Why bytes that should have gone straight did not, or may not have."""
    if operations is None:
        return ["cuFile has no statistics, so nobody knows which way its bytes take: use nvidia-cufile 1.14 or later"]
    copied = sum(operations["posix", way] for way in DIRECTIONS)
    total = sum(operations.values())
    if not total:
        return ["cuFile has seen no block: kvikio moved them through host memory"]
    if copied:
        return [f"cuFile moved {copied} of {total} blocks through host memory, in its compatibility mode"]
    return []


class _Trial:
    """Moves blocks of one size at a time between `address` on the device and a file."""

    def __init__(self, folder: Path, engine: IoEngine, device: Device, address: int, kernels: dict[int, DeviceDigests]) -> None:
        self._folder, self._engine, self._device, self._address = folder, engine, device, address
        always, never = ({way: {1: speeds} for way in DIRECTIONS} for speeds in ((1.0, 0.0), (0.0, 1.0)))
        straight, bounce = (Paths("kvikio", device, Speeds(choice), kernels) for choice in (always, never))
        self._paths = {GDS: straight, BOUNCE: bounce}

    def run(self, size: int) -> Counter[tuple[str, str]]:
        """Bytes a second by path and direction; the best of all rounds. Raises ValueError when other bytes come back."""
        count = ROUND_BYTES // size
        layout = Layout(layers=1, kv_heads=1, head_dim=size // 64, dtype="float16")
        header = Header.fresh(Medium.FILE, Namespace("probe", "gds", layout), Geometry(count, layout.block_bytes), 0)
        segment = FileSegment.format(self._folder, header, self._engine)
        rows = DeviceArray(self._device, self._address, count, size)
        payloads, slots = [rows[at] for at in range(count)], np.arange(count)
        content = [np.frombuffer(os.urandom(size), np.uint8) for _ in range(count)]
        best: Counter[tuple[str, str]] = Counter()
        for path in (GDS, BOUNCE) * ROUNDS:
            upload(payloads, content)
            began = monotonic_seconds()
            written = self._paths[path].write(segment, slots, payloads, os.urandom(32 * count), bytes(32 * count))
            best[path, WRITE] = max(best[path, WRITE], int(ROUND_BYTES / (monotonic_seconds() - began)))
            self._device.clear(self._address, ROUND_BYTES)
            began = monotonic_seconds()
            codes = self._paths[path].read(segment, slots, payloads)
            best[path, READ] = max(best[path, READ], int(ROUND_BYTES / (monotonic_seconds() - began)))
            back = [np.empty_like(block) for block in content]
            download(back, payloads)
            if (
                not written.all()
                or (codes != READ_OK).any()
                or any((one != two).any() for one, two in zip(content, back, strict=True))
            ):
                raise ValueError(
                    f"{path}: blocks of {size} bytes did not come back as they were written: {dict(segment.failures)}"
                )
            segment.free(slots)
        segment.unlink()
        return best


if __name__ == "__main__":
    _, folder_name, device_name, thread_count, digests_on = sys.argv
    print(json.dumps(_try(Path(folder_name), device_name, int(thread_count), digests_on)))
