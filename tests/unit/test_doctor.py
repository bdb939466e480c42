"""The doctor on machines that are directories, and on this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.test_io_engines import need_kvikio
from tests.cuda.build import environ, with_cufile
from tierd.config import Config
from tierd.doctor import gpu, memory, storage
from tierd.doctor.finding import ERROR, LEVELS, NOTE, OK, WARNING, Finding
from tierd.doctor.machine import Machine

MEMINFO = "MemTotal: 2097152 kB\nMemAvailable: 1048576 kB\nHugePages_Total: 7\n"


def machine_of(root: Path, files: dict[str, str]) -> Machine:
    """A machine that has these files."""
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root)


def config_of(folder: Path, **settings: str) -> Config:
    """The defaults with a state directory and some keys changed."""
    flags = {"server.state_dir": str(folder)} | {name.replace("_", ".", 1): value for name, value in settings.items()}
    return Config.load(flags)


def levels(found: list[Finding]) -> dict[str, str]:
    """Each check with its level."""
    return {finding.check: finding.level for finding in found}


def test_a_machine_without_a_driver_is_told_what_works_all_the_same(tmp_path: Path) -> None:
    """One note, and no complaint about what only a GPU needs."""
    [finding] = gpu.examine(machine_of(tmp_path, {}), config_of(tmp_path))
    assert (finding.level, finding.found) == (NOTE, "no NVIDIA driver is loaded: no GPU, no GPUDirect Storage")
    assert "without one" in finding.remedy


def test_a_gpu_tier_without_a_driver_is_an_error(tmp_path: Path) -> None:
    """The daemon would not start, unless its gpu tier is in host memory."""
    on_gpu = {"gpu_bytes": "1GiB", "gpu_device": "cuda:0"}
    [finding] = gpu.examine(machine_of(tmp_path, {}), config_of(tmp_path, **on_gpu))
    assert finding.level == ERROR and "gpu.device is cuda:0" in finding.found
    [finding] = gpu.examine(Machine(tmp_path), config_of(tmp_path, **on_gpu | {"gpu_device": "cpu"}))
    assert finding.level == NOTE


GPU_BOX = {
    "/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module  580.95.05\nGCC version: 13",
    "/proc/driver/nvidia/gpus/0000:0b:00.0/information": "Model: \t NVIDIA H100 80GB HBM3\nIRQ: 5",
    "/sys/bus/pci/devices/0000:0b:00.0/numa_node": "1",
    "/dev/nvidia0": "",
    "/dev/nvidiactl": "",
    "/proc/modules": "",
}


def test_a_gpu_box_without_direct_storage_is_told_each_thing_that_is_missing(tmp_path: Path) -> None:
    """The device and its NUMA node are named; nvidia-fs, udev and device nodes that are absent are to be mended."""
    config = config_of(tmp_path)
    found = list(gpu.examine(machine_of(tmp_path, GPU_BOX), config))
    assert [finding.found for finding in found if finding.check == "gpu"] == [
        "NVIDIA H100 80GB HBM3 at 0000:0b:00.0, NUMA node 1"
    ]
    missing = [finding.found for finding in found if finding.check == "gpu nodes" and finding.level == WARNING]
    assert missing == ["/dev/nvidia-uvm is not there"]
    by_check = levels(found)
    assert (by_check["gds"], by_check["gds udev"]) == (WARNING, WARNING) and "gds modules" not in by_check
    (tmp_path / "run/udev").mkdir(parents=True)
    more = {"/proc/driver/nvidia-fs/version": "version: 2.26.6", "/dev/nvidia-uvm": "", "/dev/nvidia-fs0": ""}
    by_check = levels(list(gpu.examine(machine_of(tmp_path, more), config)))
    assert by_check["gds"] == by_check["gpu nodes"] == OK and "gds udev" not in by_check


def test_device_nodes_are_named_with_their_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that this user can open in one line, each of the others with its remedy."""
    machine = machine_of(tmp_path, GPU_BOX | {"/dev/nvidia-uvm": "", "/dev/nvidia-fs0": ""})
    for name, mode in (("nvidia0", 0o600), ("nvidiactl", 0o660), ("nvidia-uvm", 0o666), ("nvidia-fs0", 0o600)):
        (tmp_path / "dev" / name).chmod(mode)
    closed = {tmp_path / "dev/nvidia0", tmp_path / "dev/nvidia-fs0"}
    monkeypatch.setattr("os.access", lambda path, mode: path not in closed)  # root may open everything
    found = [finding for finding in gpu.examine(machine, config_of(tmp_path)) if finding.check == "gpu nodes"]
    assert [(finding.level, finding.found) for finding in found] == [
        (WARNING, "/dev/nvidia0 (mode 600) cannot be opened by this user"),
        (WARNING, "/dev/nvidia-fs0 (mode 600) cannot be opened by this user"),
        (OK, "this user can open /dev/nvidiactl (mode 660), /dev/nvidia-uvm (mode 666)"),
    ]
    assert all("group" in finding.remedy for finding in found[:2])


@pytest.mark.parametrize(("cpu", "level"), [("512MiB", OK), ("1536MiB", WARNING), ("4GiB", ERROR)])
def test_tiers_are_measured_against_the_memory_that_there_is(tmp_path: Path, cpu: str, level: str) -> None:
    """More than is available is a warning, more than the machine has an error."""
    found = memory.examine(machine_of(tmp_path, {"/proc/meminfo": MEMINFO}), config_of(tmp_path, cpu_bytes=cpu))
    assert levels(list(found))["memory"] == level


def test_required_huge_pages_that_nobody_configured_are_an_error(tmp_path: Path) -> None:
    """With a pool they are not."""
    config = config_of(tmp_path, cpu_huge_pages="require")
    assert levels(list(memory.examine(machine_of(tmp_path, {}), config)))["huge pages"] == ERROR
    assert levels(list(memory.examine(machine_of(tmp_path, {"/proc/meminfo": MEMINFO}), config)))["huge pages"] == OK


def test_a_device_mapper_below_is_told_to_those_who_have_a_gpu(tmp_path: Path) -> None:
    """The whole stack is named: logical volume, partition, drive."""
    drive = tmp_path / "sys/devices/pci/nvme0n1"
    (drive / "nvme0n1p2").mkdir(parents=True)
    (drive / "nvme0n1p2/partition").write_text("2")
    classes, numbers = tmp_path / "sys/class/block", tmp_path / "sys/dev/block"
    (classes / "dm-0/slaves").mkdir(parents=True)
    (classes / "dm-0/slaves/nvme0n1p2").touch()
    (classes / "nvme0n1p2").symlink_to(drive / "nvme0n1p2")
    (classes / "nvme0n1").symlink_to(drive)
    numbers.mkdir(parents=True)
    (numbers / "252:0").symlink_to(classes / "dm-0")
    mounts = "22 1 252:0 / / rw,relatime shared:1 - ext4 /dev/mapper/vg-root rw,data=journal\n"
    state = tmp_path / "state"
    state.mkdir()
    machine = machine_of(tmp_path, {"/proc/self/mountinfo": mounts})
    assert machine.disks("252:0") == ["dm-0", "nvme0n1p2", "nvme0n1"]
    config = config_of(state)
    quiet = list(storage.examine(machine, config))
    assert "dm-0 on nvme0n1p2 on nvme0n1" in quiet[1].found and "gds volume" not in levels(quiet)
    machine_of(tmp_path, {"/proc/driver/nvidia/version": "NVRM version: 580"})
    volume = [finding.found for finding in storage.examine(machine, config) if finding.check == "gds volume"]
    assert len(volume) == 2 and "device mapper" in volume[0] and "data=journal" in volume[1]


def test_a_drive_of_another_socket_than_the_gpu_is_told(tmp_path: Path) -> None:
    """Both nodes are known, and differ; on the GPU's own node all is well, and mount options are named."""
    drive = tmp_path / "sys/devices/pci/nvme0n1"
    drive.mkdir(parents=True)
    for folder, name in (("sys/class/block", "nvme0n1"), ("sys/dev/block", "259:0")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).symlink_to(drive)
    state = tmp_path / "state"
    state.mkdir()
    node = {"/sys/devices/pci/nvme0n1/device/device/numa_node": "0"}
    mounts = {"/proc/self/mountinfo": "22 1 259:0 / / rw,relatime shared:1 - xfs /dev/nvme0n1 rw,noquota\n"}
    found = {one.check: one for one in storage.examine(machine_of(tmp_path, GPU_BOX | node | mounts), config_of(state))}
    assert found["nvme numa"].level == WARNING and "NUMA node 0, no GPU is" in found["nvme numa"].found
    assert found["nvme file system"].found.endswith("(nvme0n1), noquota,relatime,rw")
    assert found["gds in use"].level == NOTE and "there is no gpu tier on a GPU" in found["gds in use"].found
    machine = machine_of(tmp_path, {"/sys/devices/pci/nvme0n1/device/device/numa_node": "1"})
    found = {one.check: one for one in storage.examine(machine, config_of(state))}
    assert found["nvme numa"].level == OK


def test_too_little_space_is_said_with_how_much_is_missing(tmp_path: Path) -> None:
    """A tier larger than the disk."""
    found = list(storage.examine(Machine(tmp_path), config_of(tmp_path, nvme_bytes="512TiB")))
    [space] = [finding for finding in found if finding.check == "nvme space"]
    assert space.level == WARNING and "TiB" in space.remedy


def test_a_machine_without_an_nvme_tier_is_told_what_it_loses(tmp_path: Path) -> None:
    """And nothing is written anywhere."""
    [finding] = storage.examine(Machine(tmp_path), config_of(tmp_path, nvme_bytes="0"))
    assert finding.level == NOTE and not list(tmp_path.iterdir())


def test_gds_is_tried_where_the_gpu_tier_is_on_a_gpu(tmp_path: Path, emulation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the daemon's own trial: what is missing is a warning, and an error where it is required; what works is said."""
    need_kvikio()
    on_gpu = {"gpu_bytes": "1GiB", "gpu_device": "cuda:0", "nvme_probe_seconds_max": "60"}
    for variables, settings, level, says in (
        (environ(emulation, KVIKIO_COMPAT_MODE="ON"), {}, WARNING, "kvikio is in its compatibility mode"),
        (environ(emulation, KVIKIO_COMPAT_MODE="ON"), {"nvme_require_gds": "true"}, ERROR, "kvikio is in its"),
        (with_cufile(emulation), {}, OK, "digests are computed on the GPU"),
        (with_cufile(emulation, STUB_CUDA_PTX_REFUSED="1"), {}, WARNING, "digests are computed in host memory: "),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        found = [*storage.examine(Machine(), config_of(tmp_path, **on_gpu, **settings))][-1]
        assert (found.check, found.level) == ("gds in use", level) and says in found.found
    assert "gds in use" not in levels([*storage.examine(Machine(), config_of(tmp_path))])


def test_the_command_examines_this_machine(tmp_path: Path) -> None:
    """All findings have a level and a text, what is to be mended has a remedy, and the exit code says whether any is."""
    command = [sys.executable, "-m", "tierd", "doctor", "--json", "--state-dir", str(tmp_path), "--set", "cpu.bytes=64MiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)["findings"]
    assert {"gpu driver", "memory", "huge pages", "open files", "nvme space", "nvme file system", "nvme io"} <= {
        finding["check"] for finding in found
    }
    assert all(finding["level"] in LEVELS and finding["found"] for finding in found)
    bad = [finding for finding in found if finding["level"] in (WARNING, ERROR)]
    assert all(finding["remedy"] for finding in bad) and done.returncode == int(bool(bad)), done.stderr
    assert not list(tmp_path.glob("**/.probe*"))
    plain = subprocess.run([*command[:4], *command[5:]], capture_output=True, text=True, timeout=60)
    assert plain.stdout.rstrip().endswith(f"{len(found)} findings, {len(bad)} to mend")
