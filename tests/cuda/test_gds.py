"""GPUDirect Storage through the real kvikio, on an emulated GPU and an emulated cuFile: bytes, digests, and what is believed.

kvikio's calls, its threads and its buffers are the real ones. How fast anything is, and what a file system or a driver does, is
not shown by this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.test_io_engines import need_kvikio
from tests.cuda.build import environ, with_cufile
from tests.cuda.straight import BLOCKS, LAYOUT
from tierd.tiers.gds import IN_HOST, ON_GPU, SIZES, Measured, measure, measure_all
from tierd.tiers.paths import BOUNCE, DIRECTIONS, GDS, READ, WRITE, Paths, Speeds

PATIENCE_SECONDS = 60.0


@pytest.fixture(autouse=True)
def kvikio() -> None:
    """Skip where it is not installed."""
    need_kvikio()


def measured(folder: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Measured:
    """What a daemon in that environment would be told."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = measure(folder, "cuda:0", 4, PATIENCE_SECONDS)
    assert list(folder.iterdir()) == [], "the trial left something behind"
    return found


@pytest.mark.parametrize("digested", [ON_GPU, IN_HOST])
def test_blocks_are_the_same_and_verified_whichever_way_they_take(emulation: Path, tmp_path: Path, digested: str) -> None:
    """What went one way is read the other way, byte for byte; a flipped bit of a payload is damage on both, one behind it is
    not, and what cannot be read at all has failed; cuFile counts just the blocks that went straight, and bytes are counted by
    path. What is digested on the GPU is never copied to host memory.
    """
    command = [sys.executable, "-m", "tests.cuda.straight", str(tmp_path), digested]
    done = subprocess.run(command, env=os.environ | with_cufile(emulation), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    moved = BLOCKS * LAYOUT.block_bytes
    for name in ("straight", "bounce"):
        told = answer[name]
        assert (told["written"], told["read"], told["same"]) == (BLOCKS, BLOCKS, BLOCKS), name
        assert (told["damaged"], told["codes"]) == ([7], [2]) and told["failures"] == {"read: digest differs": 1}
        assert told["failed"] == BLOCKS
    good = 2 * moved - LAYOUT.block_bytes
    expected = {f"straight.{GDS}.{WRITE}": moved, f"straight.{GDS}.{READ}": good}
    assert answer["bytes"] == expected | {f"bounce.{BOUNCE}.{WRITE}": moved, f"bounce.{BOUNCE}.{READ}": good}
    assert answer["operations"] == {"p2p.write": BLOCKS, "p2p.read": 3 * BLOCKS}
    assert answer["staged"] == {"straight": digested == IN_HOST, "bounce": True}


def test_what_works_is_measured_in_both_directions(emulation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size has two speeds for each direction, and the text says where it is worth it."""
    found = measured(tmp_path, with_cufile(emulation), monkeypatch)
    assert found.speeds is not None and not found.reasons
    assert {way: sorted(sizes) for way, sizes in found.speeds.measured.items()} == {way: list(SIZES) for way in DIRECTIONS}
    assert all(min(speeds) > 1e6 for sizes in found.speeds.measured.values() for speeds in sizes.values())
    assert str(found).startswith("it works, and is faster in: ") and str(found).endswith("; digests are computed on the GPU")


def test_a_slow_gds_is_not_used(emulation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each of its operations takes 20 ms longer, host memory is the better way for all sizes and directions."""
    found = measured(tmp_path, with_cufile(emulation, STUB_CUFILE_MICROSECONDS="20000"), monkeypatch)
    assert found.speeds is not None
    assert not any(found.speeds.prefers_straight(way, size) for way in DIRECTIONS for size in SIZES)
    assert str(found) == "it works, and is faster in: nothing; digests are computed on the GPU"


@pytest.mark.parametrize(
    ("setting", "doubt"),
    [
        ("STUB_CUDA_KERNELS_LIE", "Emulated Device 0 computed other digests of 65536 bytes than the CPU"),
        ("STUB_CUDA_PTX_REFUSED", "cuModuleLoadData says CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222)"),
    ],
)
def test_where_a_gpu_cannot_digest_gds_works_with_digests_in_host_memory(
    emulation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, doubt: str
) -> None:
    """It is measured as it will be used, every block came back right, and the text has the reason."""
    found = measured(tmp_path, with_cufile(emulation, **{setting: "1"}), monkeypatch)
    assert found.speeds is not None and not found.reasons
    assert str(found).endswith(doubt) and "; digests are computed in host memory: " in str(found)


def test_cufiles_compatibility_mode_is_not_taken_for_the_real_thing(
    emulation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block came back right and kvikio saw no difference, but cuFile's own counters say that all were copied."""
    found = measured(tmp_path, with_cufile(emulation, STUB_CUFILE_WAY="posix"), monkeypatch)
    assert found.speeds is None
    assert str(found).endswith("blocks through host memory, in its compatibility mode")


def test_kvikios_compatibility_mode_is_a_reason(emulation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cuFile there is no GPUDirect Storage, and nothing is tried."""
    found = measured(tmp_path, environ(emulation, KVIKIO_COMPAT_MODE="ON"), monkeypatch)
    assert found.speeds is None and "kvikio is in its compatibility mode" in str(found)


def test_a_trial_that_hangs_ends_at_its_deadline(emulation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is given up, and the reason says so."""
    for name, value in with_cufile(emulation, STUB_CUFILE_MICROSECONDS="60000000").items():
        monkeypatch.setenv(name, value)
    assert str(measure(tmp_path, "cuda:0", 1, 3.0)) == "it was tried: no answer within 3 s"
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_size_that_was_measured_decides() -> None:
    """By ratio: 300 KiB is nearer to 256 KiB than to 1 MiB, and 1.5 MiB to 1 MiB."""
    speeds = Speeds({READ: {256 << 10: (2.0, 1.0), 1 << 20: (1.0, 2.0)}, WRITE: {64 << 10: (1.0, 1.0)}})
    assert [speeds.prefers_straight(READ, size) for size in (4096, 300 << 10, 600 << 10, 3 << 19)] == [True, True, False, False]
    assert not speeds.prefers_straight(WRITE, 64 << 10)


def test_only_paths_that_there_are_have_a_series() -> None:
    """Without a GPU there is one; with one also the bounce, and GDS only where it works."""
    assert Paths("posix").names == ("posix",) and Paths("kvikio").names == ("kvikio-host",)


def test_with_several_devices_it_must_work_with_each_and_the_slowest_counts(
    emulation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are tried, blocks of either come back right, and a reason says of which device it is."""
    for name, value in with_cufile(emulation, STUB_CUDA_DEVICES="2").items():
        monkeypatch.setenv(name, value)
    found = measure_all(tmp_path, ["cuda:0", "cuda:1"], 4, PATIENCE_SECONDS)
    assert found.speeds is not None and set(found.speeds.measured) == set(DIRECTIONS), str(found)
    found = measure_all(tmp_path, ["cuda:1", "cuda:2"], 4, PATIENCE_SECONDS)
    assert found.speeds is None and len(found.reasons) == 1
    assert found.reasons[0].startswith("cuda:2: it was tried") and "this process sees 2 GPUs" in found.reasons[0]
