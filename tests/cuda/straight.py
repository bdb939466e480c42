"""With an emulated GPU and cuFile, in a process of its own: `python -m tests.cuda.straight FOLDER gpu|host` says what
blocks became whose digests are computed there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tierd.cuda import Device, DeviceArray
from tierd.layout import Layout, Namespace
from tierd.tiers.gds import ON_GPU
from tierd.tiers.io import cufile, make
from tierd.tiers.kernels import DeviceDigests
from tierd.tiers.nvme import READ_FAILED, FileSegment, slots_path
from tierd.tiers.paths import DIRECTIONS, Paths, Speeds, download, upload

LAYOUT = Layout(layers=1, kv_heads=1, head_dim=1000, dtype="float16")
"""Blocks of 64,000 bytes in slots of 65,536: what is behind the payload does not count."""
BLOCKS = 300
"""More than the staging memory of a thread holds, so that digests and bounces come in parts."""


def main(folder: Path, digested: str) -> dict[str, Any]:
    """Write blocks each way and read them the other, damage one, and read them again; then have the file end too early."""
    engine, device, layout = make("kvikio", 4), Device(0), LAYOUT
    assert cufile.start()
    size = BLOCKS * layout.slot_bytes
    address = device.reserve(size)
    device.map(address, size, device.create(size))
    rows = DeviceArray(device, address, BLOCKS, layout.slot_bytes)
    payloads = [rows[at] for at in range(BLOCKS)]
    kernels = {0: DeviceDigests(device)} if digested == ON_GPU else {}
    straight, bounce = (
        Paths("kvikio", device, Speeds({way: {layout.block_bytes: speeds} for way in DIRECTIONS}), kernels)
        for speeds in ((2.0, 1.0), (1.0, 2.0))
    )
    slots, answer = np.arange(BLOCKS), {}
    for name, write, read in (("straight", straight, bounce), ("bounce", bounce, straight)):
        content = [np.frombuffer(os.urandom(layout.slot_bytes), np.uint8) for _ in payloads]
        hashes = os.urandom(32 * BLOCKS)
        segment = FileSegment.create(folder, Namespace("d", name, layout), (BLOCKS + 1) * (layout.slot_bytes + 512), 1, engine)
        upload(payloads, content)
        written = write.write(segment, slots, payloads, hashes, bytes(32 * BLOCKS))
        device.clear(address, size)
        codes = read.read(segment, slots, payloads)
        back = [np.empty_like(block) for block in content]
        download(back, payloads)
        same = [bool((one == two).all()) for one, two in zip(content, back, strict=True)]
        with open(slots_path(segment.path), "r+b") as file:  # a bit of a payload, and one of the padding behind another
            for place in (7 * layout.slot_bytes + 100, 8 * layout.slot_bytes + layout.block_bytes + 100):
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 4]))
        again = read.read(segment, slots, payloads)
        failures = dict(segment.failures)
        os.truncate(slots_path(segment.path), 0)
        short = read.read(segment, slots, payloads)
        answer[name] = {
            "written": int(written.sum()),
            "read": int((codes == 0).sum()),
            "same": sum(same),
            "damaged": np.flatnonzero(again).tolist(),
            "codes": again[again != 0].tolist(),
            "failures": failures,
            "failed": int((short == READ_FAILED).sum()),
        }
    answer["bytes"] = {
        f"{which}.{path}.{way}": number
        for which, paths in (("straight", straight), ("bounce", bounce))
        for (path, way), number in paths.bytes.items()
    }
    answer["staged"] = {"straight": hasattr(straight._staging, "memory"), "bounce": hasattr(bounce._staging, "memory")}
    answer["operations"] = {".".join(key): number for key, number in (cufile.operations() or {}).items() if number}
    return answer


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
