"""The gpu tier in a GPU's memory: on one that is emulated, and on a real one where there is one.

On the emulated one the driver does by construction what is expected of it; what a real driver does, only the real one can say.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.test_io_engines import need_kvikio
from tests.cuda.build import environ, load, with_cufile
from tests.daemon.conftest import Start
from tests.daemon.harness import Daemon, hashes_of
from tests.daemon.test_pages import answer, reserve, until
from tierd.block import ROOT, split
from tierd.client.pages import PageClient, PageLookup
from tierd.layout import Layout
from tierd.tiers.paths import download, upload

LAYOUT = Layout(layers=1, kv_heads=1, head_dim=1024, dtype="float16")
SLOTS = 64
"""Of one segment: 4 MiB, which real GPUs can map."""
SEGMENT_BYTES = (4 << 20) + (64 << 10)
SEGMENTS = 2


@dataclass
class Gpu:
    """A GPU for tests: what processes need to see it."""

    is_real: bool
    environ: dict[str, str] = field(default_factory=dict)


@pytest.fixture(params=["emulated", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """An emulated GPU, and a real one."""
    if request.param == "real":
        return Gpu(True)
    library = request.getfixturevalue("emulation")
    load(library)
    return Gpu(False, environ(library))


@pytest.fixture
def launch(start: Start) -> Callable[..., Daemon]:
    """Starts daemons with a gpu tier of two segments on a GPU, above two of cpu."""

    def begin(gpu: Gpu, held: bool = False, environ: dict[str, str] | None = None, **values: Any) -> Daemon:
        sizes = {f"{tier}_bytes": SEGMENTS * SEGMENT_BYTES for tier in ("gpu", "cpu")} | {"nvme_bytes": 16 * SEGMENT_BYTES}
        sizes |= {f"{tier}_segment_bytes": SEGMENT_BYTES for tier in ("gpu", "cpu", "nvme")}
        return start(held=held, environ=gpu.environ | (environ or {}), **(sizes | {"gpu_device": "cuda:0"} | values))

    return begin


@pytest.fixture
def connect() -> Iterator[Callable[..., PageClient]]:
    """Makes paged clients, which are closed at the end."""
    made: list[PageClient] = []

    def build(daemon: Daemon, **options: Any) -> PageClient:
        given = {"model": "model", "layout": LAYOUT, "device": "cuda:0", "pages_max": SEGMENTS * SLOTS, "private_pages": 2}
        made.append(PageClient(daemon.socket, **(given | options)))
        return made[-1]

    yield build
    for client in made:
        client.close()


@pytest.fixture
def settle_environment() -> Iterator[Callable[[str, str], None]]:
    """Sets variables that the emulated driver of this process reads, until the end of the test."""
    c, names = ctypes.CDLL(None), []

    def put(name: str, value: str) -> None:
        names.append(name)
        c.setenv(name.encode(), value.encode(), 1)

    yield put
    for name in names:
        c.unsetenv(name.encode())


def payload_of(block: bytes) -> np.ndarray:
    """The bytes that belong to a hash."""
    word = sha256(block).digest()
    return np.frombuffer(word * (LAYOUT.block_bytes // len(word)), np.uint8)


def store(client: PageClient, hashes: bytes) -> np.ndarray:
    """Compute a chain in pages and name them; returns the pages, which are held."""
    until(client, lambda: client.alive)
    pages = reserve(client, len(hashes) // 32)
    assert len(pages) == len(hashes) // 32
    upload([client.memory[page] for page in pages.tolist()], [payload_of(block) for block in split(hashes)])
    assert (answer(client, client.commit(pages, (ROOT + hashes)[: len(hashes)], hashes)).codes == -1).all()
    return pages


def content(client: PageClient, pages: np.ndarray) -> list[np.ndarray]:
    """What is in pages."""
    rows = [np.empty(LAYOUT.slot_bytes, np.uint8) for _ in pages]
    download(rows, [client.memory[page] for page in pages.tolist()])
    return rows


def find(client: PageClient, hashes: bytes) -> PageLookup:
    """Look a chain up, wait for all of it, and check its bytes."""
    found = answer(client, client.lookup(hashes))
    for block, row in zip(split(hashes), content(client, found.pages), strict=False):
        assert (row == payload_of(block)).all(), "a page has other bytes than were stored under its hash"
    return found


def path_bytes(daemon: Daemon, direction: str) -> dict[str, float]:
    """Bytes to or from NVMe by path."""
    found = {key: value for key, value in daemon.metrics().items() if key.startswith("tierd_io_path_bytes_total")}
    return {key.split('path="')[1].split('"')[0]: value for key, value in found.items() if f'direction="{direction}"' in key}


def test_blocks_that_left_the_gpu_come_back_right(gpu: Gpu, launch: Callable[..., Daemon], connect: Any) -> None:
    """Five times the tier is evicted to cpu and nvme, and every block is right when it is brought up again."""
    daemon = launch(gpu)
    client = connect(daemon)
    chains = [hashes_of(seed, SLOTS // 2) for seed in range(20)]
    for hashes in chains:
        client.release(store(client, hashes))
        daemon.ask("sync", deadline_ms=60_000)
    tiers: dict[str, int] = {}
    for hashes in chains:
        found = find(client, hashes)
        assert found.ready == SLOTS // 2
        tiers = {tier: tiers.get(tier, 0) + number for tier, number in found.tiers.items()}
        found.release()
    assert tiers["cpu"] and tiers["nvme"] and not tiers["miss"]


def test_where_cpu_cannot_be_registered_with_the_gpu_blocks_come_and_go_all_the_same(
    launch: Callable[..., Daemon], connect: Any, emulation: Path
) -> None:
    """The driver refuses what the daemon asks it for each segment of cpu: it is said once, and costs nothing but speed."""
    load(emulation)
    daemon = launch(Gpu(False, environ(emulation, STUB_CUDA_PINS_REFUSED="1")), nvme_bytes="0")
    client = connect(daemon)
    chains = [hashes_of(seed, SLOTS) for seed in range(SEGMENTS + 1)]
    for hashes in chains:
        client.release(store(client, hashes))
        daemon.ask("sync", deadline_ms=60_000)
    assert find(client, chains[-2]).ready == SLOTS
    assert daemon.log.count("segments cannot be registered with the GPU") == 1
    assert "cuMemHostRegister_v2 says CUDA_ERROR_OUT_OF_MEMORY" in daemon.log


def test_bytes_between_a_gpu_and_nvme_are_counted_by_the_way_they_took(
    gpu: Gpu, launch: Callable[..., Daemon], connect: Any
) -> None:
    """Without room in cpu everything goes to nvme from the GPU, through a buffer of host memory, and comes back so."""
    daemon = launch(gpu, cpu_bytes=SEGMENT_BYTES, nvme_io_engine="posix")
    with daemon.peer(layout=LAYOUT.to_map(), fingerprint=LAYOUT.fingerprint) as other:
        other.ask("store", hashes=hashes_of(99, SLOTS))  # fills the cpu tier, and is never committed
        client = connect(daemon)
        hashes = hashes_of(1, SLOTS)
        client.release(store(client, hashes))
        daemon.ask("sync", deadline_ms=60_000)
        moved = SLOTS * LAYOUT.block_bytes
        assert path_bytes(daemon, "write") == {"posix": 0, "bounce": moved}
        client.release(store(client, hashes_of(2, SEGMENTS * SLOTS)))
        daemon.ask("sync", deadline_ms=60_000)
        found = find(client, hashes)
        assert found.tiers["nvme"] == found.ready == SLOTS
        assert path_bytes(daemon, "read") == {"posix": 0, "bounce": moved}
    assert daemon.status()["io"]["gpu"] == "bounce"


def test_a_killed_daemon_finds_its_gpu_memory_again(gpu: Gpu, launch: Callable[..., Daemon], connect: Any) -> None:
    """Where the driver imports the kept descriptors, every block is a hit in the page where it was, with its bytes; where it
    does not (which is not known of real ones), the tier is cold, the log says why, and everything else goes on.
    """
    daemon = launch(gpu, held=True, nvme_bytes="0")
    client = connect(daemon)
    hashes = hashes_of(1, SEGMENTS * SLOTS)
    pages = store(client, hashes)
    daemon.kill()
    until(client, lambda: not client.alive)
    for block, row in zip(split(hashes), content(client, pages), strict=True):
        assert (row == payload_of(block)).all(), "the engine's own mapping lost its bytes with the daemon"
    until(client, lambda: client.alive)
    is_adopted = f"adopted segments={SEGMENTS}" in daemon.log or "memory segment given up" not in daemon.log
    if gpu.is_real:
        what = "survives" if is_adopted else "does not survive"
        warnings.warn(f"an exported allocation {what} kill -9 of its exporter", stacklevel=1)
    else:
        assert is_adopted
    if is_adopted:
        found = find(client, hashes)
        assert found.pages.tolist() == pages.tolist() and found.tiers["gpu"] == SEGMENTS * SLOTS
        found.release()
    client.release(pages)
    client.release(store(client, hashes_of(2, SLOTS)))


def test_memory_that_cannot_be_imported_is_a_cold_start_with_its_reason(
    launch: Callable[..., Daemon], connect: Any, emulation: Path, tmp_path: Path
) -> None:
    """The driver's words are in the log, the segments are given up, and the tier serves from the beginning."""
    load(emulation)
    broken = tmp_path / "broken"
    gpu = Gpu(False, environ(emulation, STUB_CUDA_IMPORT_FAILS=str(broken)))
    daemon = launch(gpu, held=True, nvme_bytes="0", cpu_bytes=SEGMENT_BYTES)
    with daemon.peer(layout=LAYOUT.to_map(), fingerprint=LAYOUT.fingerprint) as other:
        other.ask("store", hashes=hashes_of(99, SLOTS))  # fills the cpu tier, or it would have some of the blocks afterwards
        client = connect(daemon)
        hashes = hashes_of(1, SLOTS)
        pages = store(client, hashes)
        fail_while_starting(daemon, broken)
    until(client, lambda: not client.alive)
    until(client, lambda: client.alive)
    assert "cannot be imported on cuda:0: cuMemImportFromShareableHandle says CUDA_ERROR_NOT_SUPPORTED" in daemon.log
    assert not find(client, hashes).blocks
    client.release(pages)
    client.release(store(client, hashes))
    assert find(client, hashes).ready == SLOTS


def fail_while_starting(daemon: Daemon, broken: Path) -> None:
    """Kill the daemon; the next one can import nothing until it serves."""
    broken.touch()
    daemon.kill()
    broken.unlink()


def test_new_pages_show_nothing_of_what_was_there_before(gpu: Gpu, launch: Callable[..., Daemon], connect: Any) -> None:
    """The driver does not say that memory is zeroed, so the daemon does it before anybody maps it."""
    client = connect(launch(gpu))
    until(client, lambda: client.alive)
    assert not any(row.any() for row in content(client, reserve(client, SLOTS)))


def test_a_client_on_another_device_is_told_so(gpu: Gpu, launch: Callable[..., Daemon], connect: Any) -> None:
    """One with pages in host memory cannot live in a tier on a GPU, nor the other way round; both messages name both places."""
    on_gpu = launch(gpu)
    client = connect(on_gpu, device="cpu")
    until(client, lambda: bool(client.trouble))
    assert "the daemon's gpu tier is in GPU" in client.trouble and "this client's pages are in host memory" in client.trouble
    assert not client.alive and answer(client, client.reserve(1)).failed
    on_host = launch(gpu, name="host", gpu_device="cpu")
    client = connect(on_host)
    until(client, lambda: bool(client.trouble))
    assert "the daemon's gpu tier is in host memory" in client.trouble


def test_a_client_whose_driver_refuses_goes_on_without_and_joins_when_it_can(
    launch: Callable[..., Daemon], connect: Any, emulation: Path, tmp_path: Path, settle_environment: Callable[[str, str], None]
) -> None:
    """No call raises: it has no slots, says why, tries again with each connection, and has slots once it can map them."""
    load(emulation)
    broken = tmp_path / "broken"
    settle_environment("STUB_CUDA_IMPORT_FAILS", str(broken))
    client = connect(launch(Gpu(False, environ(emulation))))
    until(client, lambda: client.alive)
    broken.touch()
    assert answer(client, client.reserve(1)).failed
    until(client, lambda: "cannot be mapped: cuMemImportFromShareableHandle says" in client.trouble)
    broken.unlink()
    until(client, lambda: client.alive)
    hashes = hashes_of(1, SLOTS)
    client.release(store(client, hashes))
    assert find(client, hashes).ready == SLOTS


def test_without_a_tier_on_a_gpu_no_driver_is_loaded(start: Start, emulation: Path) -> None:
    """Neither a daemon without a gpu tier nor one whose tier is in host memory maps libcuda, though it is there."""
    for at, values in enumerate(({}, {"gpu_bytes": 4 * SEGMENT_BYTES, "gpu_segment_bytes": SEGMENT_BYTES})):
        daemon = start(name=f"d{at}", environ=environ(emulation), **values)
        assert "libcuda" not in Path(f"/proc/{daemon.status()['pid']}/maps").read_text()


def refusal(make: Start, environment: dict[str, str], **values: Any) -> str:
    """What a daemon says that does not start."""
    sizes = {"gpu_bytes": 4 * SEGMENT_BYTES, "gpu_segment_bytes": SEGMENT_BYTES, "gpu_device": "cuda:0"}
    daemon = make(environ=environment, **(sizes | values))
    done = subprocess.run(daemon.command(), env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_a_gpu_that_cannot_export_stops_the_start_with_its_reason(make: Start, emulation: Path) -> None:
    """So do one that is not there and one with less memory than the tier shall have."""
    said = refusal(make, environ(emulation, STUB_CUDA_LACKS="103"))
    assert "Emulated Device 0 cannot export memory as a descriptor (device attribute 103 is 0)" in said
    assert "this process sees 1 GPUs" in refusal(make, environ(emulation), gpu_device="cuda:3")
    said = refusal(make, environ(emulation, STUB_CUDA_BYTES=str(8 << 20)))
    assert "is over the memory of cuda:0 (Emulated Device 0), 8MiB: set it lower" in said


def test_a_segment_too_small_for_the_gpus_units_is_refused_with_the_size_it_needs(
    launch: Callable[..., Daemon], emulation: Path
) -> None:
    """Slots must fill whole units of the driver's granularity."""
    daemon = launch(Gpu(False, environ(emulation, STUB_CUDA_GRANULARITY=str(32 << 20))))
    with pytest.raises(Exception, match=r"raise gpu\.segment_bytes to at least") as refused:
        daemon.peer(tier="gpu", layout=LAYOUT.to_map(), fingerprint=LAYOUT.fingerprint)
    assert "cannot hold 512 blocks of 65536 bytes" in str(refused.value)


def test_a_gpu_without_memory_left_costs_the_tier_its_growth_and_nothing_else(
    launch: Callable[..., Daemon], connect: Any, emulation: Path
) -> None:
    """A reserve is refused, the log has the driver's words, and the daemon goes on serving its other tiers."""
    load(emulation)
    daemon = launch(Gpu(False, environ(emulation)), environ={"STUB_CUDA_ALLOCATION_BYTES_MAX": "4096"})
    client = connect(daemon)
    until(client, lambda: client.alive)
    assert answer(client, client.reserve(1)).failed
    assert "cuMemCreate says CUDA_ERROR_OUT_OF_MEMORY" in daemon.log and "lower gpu.bytes" in daemon.log
    with daemon.peer(layout=LAYOUT.to_map(), fingerprint=LAYOUT.fingerprint) as other:
        assert other.ask("store", hashes=hashes_of(1, 4))["lease"]


# -- GPUDirect Storage, emulated ---------------------------------------------------------------------------------------


def test_where_gds_works_blocks_take_the_way_that_was_faster(
    launch: Callable[..., Daemon], connect: Any, emulation: Path
) -> None:
    """The daemon says which ways there are; every byte to and from NVMe went one of them, as cuFile's own counters say."""
    need_kvikio()
    load(emulation)
    daemon = launch(
        Gpu(False, with_cufile(emulation)), nvme_io_engine="kvikio", nvme_require_gds="true", cpu_bytes=SEGMENT_BYTES
    )
    assert daemon.status()["io"]["gpu"] == "gds" and daemon.get("/readyz")[1].endswith("gpu gds\n")
    assert "digests are computed on the GPU" in daemon.log and "in host memory" not in daemon.log
    with daemon.peer(layout=LAYOUT.to_map(), fingerprint=LAYOUT.fingerprint) as other:
        other.ask("store", hashes=hashes_of(99, SLOTS))
        client = connect(daemon)
        for seed in range(4):
            client.release(store(client, hashes_of(seed, SLOTS)))
            daemon.ask("sync", deadline_ms=60_000)
        found = find(client, hashes_of(0, SLOTS))
        assert found.tiers["nvme"] == found.ready == SLOTS
    operations = {key: value for key, value in daemon.metrics().items() if key.startswith("tierd_cufile_operations_total")}
    for direction, blocks in (("write", 4 * SLOTS), ("read", SLOTS)):
        taken = path_bytes(daemon, direction)
        assert sum(taken.values()) == blocks * LAYOUT.block_bytes and taken["kvikio-host"] == 0
        straight = operations[f'tierd_cufile_operations_total{{direction="{direction}",way="p2p"}}']
        assert straight * LAYOUT.block_bytes == taken["gds"]


def test_a_gpu_that_computes_wrong_digests_costs_no_block(launch: Callable[..., Daemon], connect: Any, emulation: Path) -> None:
    """It is found out before the first block: the daemon says so once, and all blocks come back from NVMe as they were."""
    need_kvikio()
    load(emulation)
    lying = Gpu(False, with_cufile(emulation, STUB_CUDA_KERNELS_LIE="1"))
    daemon = launch(lying, nvme_io_engine="kvikio", nvme_require_gds="true", cpu_bytes=SEGMENT_BYTES)
    client = connect(daemon)
    for seed in range(4):
        client.release(store(client, hashes_of(seed, SLOTS)))
        daemon.ask("sync", deadline_ms=60_000)
    found = find(client, hashes_of(0, SLOTS))
    assert found.ready == found.tiers["nvme"] == SLOTS
    assert daemon.log.count("digests of what goes straight are computed in host memory") == 1
    assert "computed other digests of" in daemon.log


@pytest.mark.parametrize(
    ("values", "settings", "reason"),
    [
        ({"nvme_io_engine": "posix"}, {}, "the io engine is posix (asked for), it needs kvikio"),
        ({}, {"STUB_CUFILE_WAY": "posix"}, "blocks through host memory, in its compatibility mode"),
        ({}, {"KVIKIO_COMPAT_MODE": "ON"}, "kvikio is in its compatibility mode"),
    ],
    ids=["engine", "cufile", "kvikio"],
)
def test_gds_that_is_required_and_does_not_work_stops_the_start(
    make: Start, emulation: Path, values: dict[str, str], settings: dict[str, str], reason: str
) -> None:
    """With the reasons; without the requirement the daemon would serve through host memory."""
    need_kvikio()
    environment = with_cufile(emulation) | settings
    said = refusal(make, environment, **({"nvme_io_engine": "kvikio", "nvme_require_gds": "true"} | values))
    assert "nvme.require_gds = true, but GPUDirect Storage does not work at" in said and reason in said


# -- what only a real GPU can show ---------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_torch_computes_in_pages_without_a_copy(launch: Callable[..., Daemon], connect: Any) -> None:
    """A tensor over all pages, made before any segment is there, is the pages: what it writes is what the daemon hands out."""
    torch = pytest.importorskip("torch")
    tier = pytest.importorskip("tierd_engine.tier")
    daemon = launch(Gpu(True))
    client, other = connect(daemon), connect(daemon)
    tensor = tier.tensor_over(client.memory)
    assert tensor.is_cuda and tensor.data_ptr() == client.memory.address
    until(client, lambda: client.alive)
    hashes = hashes_of(1, SLOTS)
    pages = reserve(client, SLOTS)
    for page, block in zip(pages.tolist(), split(hashes), strict=True):
        tensor[page] = torch.from_numpy(payload_of(block).copy()).cuda()
    torch.cuda.synchronize()
    assert (answer(client, client.commit(pages, (ROOT + hashes)[: len(hashes)], hashes)).codes == -1).all()
    until(other, lambda: other.alive)
    assert find(other, hashes).pages.tolist() == pages.tolist()
