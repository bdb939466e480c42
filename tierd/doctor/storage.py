"""Where the nvme tier is: file system, what is below it, free space, and which way bytes really go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tierd.config import Config
from tierd.doctor.finding import ERROR, NOTE, OK, WARNING, Finding
from tierd.doctor.gpu import gpus, wants_gpu
from tierd.doctor.machine import Machine
from tierd.errors import Invalid
from tierd.tiers.gds import measure_all
from tierd.tiers.io.probe import probe
from tierd.values import rounded_size

IN_MEMORY = ("tmpfs", "ramfs", "overlay")
FOR_DIRECT_STORAGE = ("ext4", "xfs")


def examine(machine: Machine, config: Config) -> Iterator[Finding]:
    """Nothing when there is no nvme tier."""
    if not config.nvme.bytes:
        yield Finding("nvme", NOTE, "nvme.bytes is 0: blocks do not outlive a stop", "set nvme.bytes and nvme.path")
        return
    folder = existing(config.nvme.path or config.server.state_dir / "nvme")
    yield _space(config, folder)
    yield from _file_system(machine, folder.resolve())
    yield _io_engine(config, folder)
    if wants_gpu(config):
        yield _gds(config, folder)
    elif gpus(machine):
        remedy = "with --set gpu.bytes=1GiB --set gpu.device=cuda:0 it is tried"
        yield Finding("gds in use", NOTE, "no: there is no gpu tier on a GPU (gpu.bytes, gpu.device)", remedy)


def existing(folder: Path) -> Path:
    """The directory, or the deepest one above it that exists."""
    return next((each for each in (folder, *folder.parents) if each.is_dir()), Path("/"))


def _space(config: Config, folder: Path) -> Finding:
    about = os.statvfs(folder)
    free, used = about.f_bavail * about.f_frsize, _used(config.nvme.path or config.server.state_dir / "nvme")
    lacking = config.nvme.bytes - used - free
    tier = f"the tier has {rounded_size(used)} and may take {rounded_size(config.nvme.bytes)}"
    found = f"{rounded_size(free)} are free in {folder}; {tier}"
    if lacking > 0:
        return Finding("nvme space", WARNING, found, f"free {rounded_size(lacking)}, or lower nvme.bytes by that")
    return Finding("nvme space", OK, found)


def _used(folder: Path) -> int:
    """Bytes on disk below a directory."""
    sizes = (os.lstat(os.path.join(at, name)).st_blocks * 512 for at, _, names in os.walk(folder) for name in names)
    return sum(sizes)


def _file_system(machine: Machine, folder: Path) -> Iterator[Finding]:
    mount = machine.mount(folder)
    if mount is None:
        yield Finding("nvme file system", NOTE, f"/proc/self/mountinfo does not say what {folder} is on")
        return
    disks = machine.disks(mount.device)
    options = ",".join(sorted(mount.options))
    found = f"{mount.kind} on {mount.source} at {mount.point} ({' on '.join(disks) or 'no block device'}), {options}"
    if mount.kind in IN_MEMORY:
        yield Finding("nvme file system", WARNING, found, "set nvme.path to a directory on an NVMe drive")
        return
    yield Finding("nvme file system", OK, found)
    yield from _for_direct_storage(machine, mount.kind, disks, "data=journal" in mount.options)
    for disk in disks:
        if (node := machine.numa_node(f"/sys/class/block/{disk}/device/device")) is not None:
            yield _numa(machine, disk, node)
        if machine.number(f"/sys/class/block/{disk}/queue/rotational") == 1 and not disk.startswith(("vd", "dm")):
            yield Finding("nvme disk", WARNING, f"{disk} is a rotating disk", "set nvme.path to a directory on an NVMe drive")


def _numa(machine: Machine, disk: str, node: int) -> Finding:
    """Where a drive is, and whether a GPU is there too."""
    nodes = {machine.numa_node(f"/sys/bus/pci/devices/{address}") for address in gpus(machine)} - {None}
    if nodes and node not in nodes:
        found = f"{disk} is on NUMA node {node}, no GPU is: their bytes cross sockets"
        return Finding("nvme numa", WARNING, found, "use a drive of the GPU's node: see lspci and numactl --hardware")
    return Finding("nvme numa", OK, f"{disk} is on NUMA node {node}")


def _for_direct_storage(machine: Machine, kind: str, disks: list[str], journal: bool) -> Iterator[Finding]:
    """What keeps cuFile from the direct way; said only where there is a GPU."""
    if not machine.text("/proc/driver/nvidia/version"):
        return
    mappers = [disk for disk in disks if disk.startswith("dm-")]
    if mappers:
        found = f"there is a device mapper below ({', '.join(mappers)}): cuFile refuses it"
        yield Finding("gds volume", WARNING, found, "put nvme.path on a partition without LVM or encryption")
    if kind not in FOR_DIRECT_STORAGE or journal:
        found = f"{kind}{' with data=journal' if journal else ''} is not for GPUDirect Storage"
        yield Finding("gds volume", WARNING, found, "use xfs, or ext4 with data=ordered")
    if not any(disk.startswith("nvme") for disk in disks):
        yield Finding(
            "gds volume", WARNING, f"no NVMe drive is below ({', '.join(disks) or 'nothing known'})", "use a local NVMe drive"
        )


def _io_engine(config: Config, folder: Path) -> Finding:
    nvme = config.nvme
    try:
        choice = probe(folder, nvme.io_engine, nvme.probe_seconds_max, nvme.io_threads)
    except Invalid as error:
        return Finding("nvme io", ERROR, str(error), "make the directory writable for this user, or change nvme.path")
    found = f"{choice.engine}, {'direct' if choice.direct else 'through the page cache'}: {choice.reason}"
    if choice.direct:
        return Finding("nvme io", OK, found)
    return Finding("nvme io", WARNING, found, "this file system has no O_DIRECT: use ext4 or xfs")


def _gds(config: Config, folder: Path) -> Finding:
    """Whether GPUDirect Storage is really in use there: tried as the daemon tries it at its start."""
    found = measure_all(folder, config.gpu.gpus, config.nvme.io_threads, config.nvme.probe_seconds_max)
    said = f"{config.gpu.device} and {folder}: {found}"
    if found.speeds is None:
        level = ERROR if config.nvme.require_gds else WARNING
        remedy = "mend what is said here and under gds, or go on through host memory (nvme.require_gds = false)"
        return Finding("gds in use", level, said, remedy)
    if found.doubt:
        return Finding("gds in use", WARNING, said, "install a newer driver; until then it is copied to be verified")
    return Finding("gds in use", OK, said)
