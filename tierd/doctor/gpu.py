"""GPUs, their driver, and whether NVMe can reach their memory without a bounce (GPUDirect Storage)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from tierd.config import Config
from tierd.doctor.finding import ERROR, NOTE, OK, WARNING, Finding
from tierd.doctor.machine import Machine

GPUS = "/proc/driver/nvidia/gpus"
NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm")
PACKAGES = ("torch", "triton", "kvikio")


def examine(machine: Machine, config: Config) -> Iterator[Finding]:
    """Driver, devices and their nodes, nvidia-fs, what kvikio needs."""
    version = next((line for line in machine.text("/proc/driver/nvidia/version").splitlines() if "NVRM" in line), "")
    if not version:
        yield _no_driver(config)
        return
    yield Finding("gpu driver", OK, version.partition(":")[2].strip())
    yield from _devices(machine)
    yield from _nodes(machine)
    yield from _direct_storage(machine)
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            yield Finding(f"python {package}", WARNING, "it is not installed", "pip install 'tierd[gpu]'")


def wants_gpu(config: Config) -> bool:
    """Whether the gpu tier is to be on a GPU."""
    return bool(config.gpu.gpus)


def gpus(machine: Machine) -> list[str]:
    """PCI addresses of the GPUs that the driver has."""
    return machine.names(GPUS)


def _no_driver(config: Config) -> Finding:
    if wants_gpu(config):
        remedy = 'install it, or set gpu.device = "cpu" or gpu.bytes = 0'
        return Finding("gpu driver", ERROR, f"no NVIDIA driver is loaded, and gpu.device is {config.gpu.device}", remedy)
    remedy = "install it to use a GPU and GPUDirect Storage; without one the cpu and nvme tiers work as they are"
    return Finding("gpu driver", NOTE, "no NVIDIA driver is loaded: no GPU, no GPUDirect Storage", remedy)


def _devices(machine: Machine) -> Iterator[Finding]:
    for address in gpus(machine):
        lines = machine.text(f"{GPUS}/{address}/information").splitlines()
        about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        node = machine.numa_node(f"/sys/bus/pci/devices/{address}")
        where = "" if node is None else f", NUMA node {node}"
        yield Finding("gpu", OK, f"{about.get('Model', 'unknown model')} at {address}{where}")


def _nodes(machine: Machine) -> Iterator[Finding]:
    """The modes of the device nodes, and what this user cannot open."""
    names = machine.names("/dev")
    minors = [f"/dev/{name}" for name in names if name.removeprefix("nvidia").isdigit()]
    if not minors:
        yield Finding("gpu nodes", WARNING, "no /dev/nvidia0", "run nvidia-modprobe -c 0 -u, or pass it into the container")
    good = []
    for name in (*NODES, *minors, *(f"/dev/{name}" for name in names if name.startswith("nvidia-fs"))):
        path = machine.path(name)
        if not path.exists():
            yield Finding("gpu nodes", WARNING, f"{name} is not there", "run nvidia-modprobe -u, or pass it into the container")
            continue
        described = f"{name} (mode {path.stat().st_mode & 0o777:o})"
        if os.access(path, os.R_OK | os.W_OK):
            good.append(described)
        else:
            remedy = "add this user to the group that owns it (often video or render), or set NVreg_DeviceFileMode=0666"
            yield Finding("gpu nodes", WARNING, f"{described} cannot be opened by this user", remedy)
    if good:
        yield Finding("gpu nodes", OK, f"this user can open {', '.join(good)}")


def _direct_storage(machine: Machine) -> Iterator[Finding]:
    version = machine.text("/proc/driver/nvidia-fs/version")
    if not version:
        remedy = "install nvidia-fs-dkms and modprobe nvidia-fs; until then bytes bounce through memory"
        yield Finding("gds", WARNING, "nvidia-fs is not loaded: NVMe cannot write into GPU memory", remedy)
    else:
        yield Finding("gds", OK, f"nvidia-fs {version.split(':')[-1].strip()}")
    if not machine.exists("/run/udev"):
        remedy = "bind-mount /run/udev read-only into the container, or allow it in the unit"
        yield Finding(
            "gds udev", WARNING, "/run/udev is not there: cuFile falls back to its compatibility mode in silence", remedy
        )
    if not machine.exists("/proc/modules"):
        remedy = "pin nvidia-cufile 1.15.1.6: later ones spin for ever when they open the driver"
        yield Finding("gds modules", WARNING, "/proc/modules is not there", remedy)
