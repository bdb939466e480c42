"""Memory: enough of it for the tiers, in large pages, and the limits of processes."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from tierd.config import Config
from tierd.doctor.finding import ERROR, NOTE, OK, WARNING, Finding
from tierd.doctor.machine import Machine
from tierd.values import rounded_size

TRANSPARENT = "/sys/kernel/mm/transparent_hugepage"
FILES_PER_SEGMENT = 3
FILES_BESIDE = 512


def examine(machine: Machine, config: Config) -> Iterator[Finding]:
    """Bytes, pages, descriptors, locked memory."""
    yield _size(machine, config)
    yield _pages(machine, config)
    yield _descriptors(config)
    yield _locked()


def _size(machine: Machine, config: Config) -> Finding:
    wanted = config.cpu.bytes + config.gpu.host_bytes
    there, total = machine.memory("MemAvailable"), machine.memory("MemTotal")
    found = f"the tiers may take {rounded_size(wanted)}; {rounded_size(there)} of {rounded_size(total)} are available"
    if wanted > total:
        return Finding("memory", ERROR, found, "lower cpu.bytes or gpu.bytes")
    if wanted > there:
        return Finding("memory", WARNING, found, "lower cpu.bytes or gpu.bytes, or stop what else uses memory")
    return Finding("memory", OK, found)


def _pages(machine: Machine, config: Config) -> Finding:
    pool = machine.memory("HugePages_Total")
    shared, private = machine.chosen(f"{TRANSPARENT}/shmem_enabled"), machine.chosen(f"{TRANSPARENT}/enabled")
    found = f"{pool} in the kernel's pool; transparent: {private or 'unknown'}, for shared memory: {shared or 'unknown'}"
    if config.cpu.huge_pages == "require" and not pool:
        return Finding("huge pages", ERROR, found, 'set vm.nr_hugepages, or cpu.huge_pages = "auto"')
    if config.cpu.huge_pages == "off":
        return Finding("huge pages", NOTE, f"cpu.huge_pages is off ({found})", '"auto" fills new segments five times as fast')
    if not pool and not private:
        return Finding("huge pages", NOTE, "this kernel has none", "use one with CONFIG_TRANSPARENT_HUGEPAGE")
    return Finding("huge pages", OK, found)


def _descriptors(config: Config) -> Finding:
    tiers = ((config.gpu.bytes, config.gpu.segment_bytes), (config.cpu.bytes, config.cpu.segment_bytes))
    segments = sum(most // each for most, each in (*tiers, (config.nvme.bytes, config.nvme.segment_bytes)))
    needed = segments * FILES_PER_SEGMENT + config.limits.sessions_max * 4 + FILES_BESIDE
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"up to {needed:,} files may be open at a time, the hard limit is {hard:,}"
    if hard != resource.RLIM_INFINITY and hard < needed:
        return Finding("open files", WARNING, found, f"raise LimitNOFILE to {needed}, or make segments larger")
    return Finding("open files", OK, found)


def _locked() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", OK, "no limit")
    remedy = "with a GPU or RDMA set LimitMEMLOCK=infinity: memory is registered with the driver; nothing else needs it"
    return Finding("locked memory", NOTE, f"the limit is {rounded_size(soft)}", remedy)
