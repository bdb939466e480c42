"""A gpu tier on each of several devices: two parts of host memory, and two GPUs which are emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.build import environ, load
from tests.daemon.conftest import Start
from tests.daemon.harness import LAYOUT, SEGMENT_BYTES, SLOTS, Daemon, hashes_of
from tests.daemon.test_gpu import refusal
from tests.daemon.test_pages import check, find, reserve, reserve_all, store, until
from tests.daemon.test_quota import name_of, quota
from tierd.cli import USAGE
from tierd.client.pages import PageClient
from tierd.errors import Invalid

Connect = Callable[..., PageClient]
MOVED = 'tierd_transfer_bytes_total{{path="memory",reason="demand",source="{}",target="{}"}}'


@pytest.fixture(params=["cpu", "cuda"], autouse=True)
def kind(request: pytest.FixtureRequest) -> str:
    """Where the devices are, for this process and for daemons."""
    if request.param == "cuda":
        request.getfixturevalue("monkeypatch").setenv("STUB_CUDA_DEVICES", "2")
        load(request.getfixturevalue("emulation"))
    return request.param


@pytest.fixture
def launch(start: Start, kind: str, request: pytest.FixtureRequest) -> Callable[..., Daemon]:
    """Starts daemons with two segments on each of two devices, above four of cpu and sixteen of nvme."""
    where: dict[str, Any] = {"gpu_bytes": 2 * SEGMENT_BYTES, "gpu_segment_bytes": SEGMENT_BYTES}
    where["gpu_device"] = f"{kind}:0,{kind}:1"
    if kind == "cuda":
        where["environ"] = environ(request.getfixturevalue("emulation"), STUB_CUDA_DEVICES="2")
    return lambda **options: start(**(where | options))


@pytest.fixture
def connect(kind: str) -> Iterator[Connect]:
    """Makes engines that are connected, each with its pages on the device of a number, and closes them at the end."""
    made: list[PageClient] = []

    def build(daemon: Daemon, number: int) -> PageClient:
        device = f"{kind}:{number}"
        made.append(PageClient(daemon.socket, model="model", layout=LAYOUT, pages_max=2 * SLOTS, device=device))
        until(made[-1], lambda: made[-1].alive)
        return made[-1]

    yield build
    for client in made:
        client.close()


def test_what_one_device_computed_the_other_one_has_by_way_of_cpu(launch: Callable[..., Daemon], connect: Connect) -> None:
    """Its engine is told pages of its own device, with the bytes; what was read is the copy in cpu."""
    daemon = launch()
    one, other = connect(daemon, 0), connect(daemon, 1)
    hashes = hashes_of(1, SLOTS)
    pages = store(one, hashes)
    daemon.ask("sync", deadline_ms=60_000)
    found = find(other, hashes)
    assert found.ready == found.tiers["cpu"] == SLOTS
    check(one, pages, hashes)
    moved = SLOTS * LAYOUT.block_bytes
    metrics = daemon.metrics()
    assert metrics[MOVED.format("cpu", "gpu1")] == moved and metrics[MOVED.format("gpu0", "gpu1")] == 0
    assert find(one, hashes).tiers["gpu"] == find(other, hashes).tiers["gpu"] == SLOTS


def test_what_only_the_other_device_has_comes_from_there(launch: Callable[..., Daemon], connect: Connect) -> None:
    """Without room in cpu, and nothing below: the bytes go from device to device, and are right."""
    daemon = launch(cpu_bytes=SEGMENT_BYTES, nvme_bytes="0")
    with daemon.peer() as copier:
        copier.ask("store", hashes=hashes_of(99, SLOTS))  # fills the cpu tier, and is never committed
        one, other = connect(daemon, 0), connect(daemon, 1)
        hashes = hashes_of(1, SLOTS)
        store(one, hashes)
        found = find(other, hashes)
        assert found.ready == found.tiers["gpu"] == SLOTS
        assert daemon.metrics()[MOVED.format("gpu0", "gpu1")] == SLOTS * LAYOUT.block_bytes


def test_each_device_has_its_own_bytes_and_its_own_order_of_eviction(launch: Callable[..., Daemon], connect: Connect) -> None:
    """Both can be filled at the same time, and what one engine computes evicts nothing on the other's device."""
    daemon = launch()
    one, other = connect(daemon, 0), connect(daemon, 1)
    hashes = hashes_of(1, 2 * SLOTS)
    one.release(store(one, hashes))
    for seed in range(2, 5):
        other.release(store(other, hashes_of(seed, SLOTS)))
        daemon.ask("sync", deadline_ms=60_000)
    other.release(reserve_all(other))
    assert find(one, hashes).tiers["gpu"] == 2 * SLOTS
    tiers, metrics = daemon.status()["tiers"], daemon.metrics()
    assert tiers["gpu0"]["limit_bytes"] == tiers["gpu1"]["limit_bytes"] == 2 * SEGMENT_BYTES
    assert not any(metrics[f'tierd_evicted_blocks_total{{kind="{kind}",tier="gpu0"}}'] for kind in ("clean", "drop"))
    assert metrics['tierd_evicted_blocks_total{kind="clean",tier="gpu1"}'] >= 3 * SLOTS


def test_after_a_kill_every_device_has_its_pages_again(launch: Callable[..., Daemon], connect: Connect) -> None:
    """Segments are adopted into the tier of their device, and sessions resume on it."""
    daemon = launch(held=True, nvme_bytes="0")
    engines = [connect(daemon, 0), connect(daemon, 1)]
    chains = [hashes_of(seed, 2 * SLOTS) for seed in (1, 2)]
    pages = [store(engine, hashes) for engine, hashes in zip(engines, chains, strict=True)]
    daemon.kill()
    for engine in engines:
        until(engine, lambda engine=engine: not engine.alive)  # type: ignore[misc]
    for engine, hashes, mine in zip(engines, chains, pages, strict=True):
        until(engine, lambda engine=engine: engine.alive)  # type: ignore[misc]
        found = find(engine, hashes)
        assert found.pages.tolist() == mine.tolist() and found.tiers["gpu"] == 2 * SLOTS
        engine.release(mine)


def test_an_engine_that_names_no_device_of_the_daemon_is_told_which_there_are(launch: Callable[..., Daemon], kind: str) -> None:
    """So is one that names none at all: with several, nobody can guess where its pages are."""
    daemon = launch()
    first, second = ("host memory cpu:0", "host memory cpu:1") if kind == "cpu" else (f"GPU {'10' * 16}", f"GPU {'11' * 16}")
    there = f"they are in {first}, {second}: see gpu.device"
    with pytest.raises(Invalid, match=f"no gpu tier of this daemon is in host memory, {there}"):
        daemon.peer(tier="gpu")
    with pytest.raises(Invalid, match=f"no gpu tier of this daemon is in GPU {'77' * 16}, {there}"):
        daemon.peer(tier="gpu", device=b"\x77" * 16)
    with daemon.peer(tier="cpu") as copier:
        assert copier.welcome["device"] == b""


def test_a_device_that_cannot_serve_stops_the_start_with_its_name(make: Start, kind: str, emulation: Path) -> None:
    """Also where the others could: who names it would look for it in vain."""
    if kind == "cpu":
        pytest.skip("host memory can always serve")
    said = refusal(make, environ(emulation, STUB_CUDA_DEVICES="2"), gpu_device="cuda:0,cuda:1,cuda:2")
    assert "cuda:2" in said and "this process sees 2 GPUs" in said


def test_a_chain_that_both_devices_computed_has_pages_on_each(launch: Callable[..., Daemon], connect: Connect) -> None:
    """The same hashes under other page numbers: every engine is told its own device's."""
    daemon = launch()
    one, other = connect(daemon, 0), connect(daemon, 1)
    hashes = hashes_of(1, 4)
    store(other, hashes_of(2, 3))
    mine, theirs = store(one, hashes), store(other, hashes)
    assert mine.tolist() != theirs.tolist()
    assert find(one, hashes).pages.tolist() == mine.tolist()
    assert find(other, hashes).pages.tolist() == theirs.tolist()


def test_a_quota_of_one_device_is_none_of_another(launch: Callable[..., Daemon], connect: Connect) -> None:
    """A namespace that may have one segment on the first has both on the second, and is shown and refused by their names."""
    daemon = launch()
    other = connect(daemon, 1)
    name = name_of(daemon, "model")
    quota(daemon, name, "--tier", "gpu0", "--max", str(SEGMENT_BYTES))
    one = connect(daemon, 0)
    assert (len(reserve(one, 2 * SLOTS)), len(reserve_all(other))) == (SLOTS, 2 * SLOTS)
    rows = quota(daemon, name)
    assert [rows[name, tier]["max"] for tier in ("gpu0", "gpu1", "cpu", "nvme")] == [SEGMENT_BYTES, 0, 0, 0]
    assert rows[name, "gpu1"]["used"] == 2 * rows[name, "gpu0"]["used"]
    refused = daemon.run("quota", name, "--tier", "gpu")
    assert refused.returncode == USAGE and "which tier of gpu0, gpu1, cpu, nvme? There is no 'gpu'" in refused.stderr
