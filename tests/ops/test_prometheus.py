"""A real Prometheus and real daemons: every panel shows something, every series is there, alerts fire and resolve."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashboards.build import DASHBOARDS
from dashboards.lint import panels
from dashboards.rules import ALERTS, RECORDED
from tests.daemon.harness import SEGMENT_BYTES, Daemon, hashes_of
from tests.ops.busy import small_daemon, under_load
from tests.ops.prometheus import Prometheus, needs_prometheus
from tests.ops.test_dashboards import EXPORTED
from tierd.series import SERIES

pytestmark = [pytest.mark.prometheus, needs_prometheus, pytest.mark.timeout(290)]
LOAD_SECONDS = 30.0
FIRING_SECONDS_MAX = 120.0


@pytest.fixture(scope="module")
def watched() -> Iterator[Prometheus]:
    """A daemon under load for LOAD_SECONDS, and the Prometheus that watched it."""
    folder = Path(tempfile.mkdtemp(prefix="tierd-", dir="/tmp"))
    daemon = small_daemon(folder / "d").start()
    try:
        with Prometheus(folder / "p", {"busy": daemon.status()["metrics"]}) as prometheus:
            with under_load(daemon):
                begun = prometheus.now()
                prometheus.wait_until(lambda: prometheus.now() > begun + LOAD_SECONDS, "its clock stands", 2 * LOAD_SECONDS)
            yield prometheus
    finally:
        daemon.end()
        print(daemon.log)
        shutil.rmtree(folder)


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board["uid"])
def test_every_panel_shows_something(watched: Prometheus, board: dict[str, object]) -> None:
    """Each expression of each panel, with Grafana's variables filled in, has at least one finite value."""
    end = watched.now()
    empty = [
        f"{panel['title']}: {target['expr']}"
        for panel in panels(board)
        for target in panel["targets"]
        if not any(points for _, points in watched.series(target["expr"], end, 2 * LOAD_SECONDS))
    ]
    assert empty == []


def test_every_rule_is_evaluated_and_every_record_is_there(watched: Prometheus) -> None:
    """No rule of the shipped file has an error, and what is recorded has values under its name."""
    rules = [rule for group in watched.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {alert.name for alert in ALERTS} | RECORDED.keys()
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    end = watched.now()
    assert [name for name in RECORDED if not watched.series(name, end, LOAD_SECONDS)] == []


def test_every_series_that_is_declared_was_scraped(watched: Prometheus) -> None:
    """Under load everything that the document lists has samples, and nothing else has tierd's name."""
    found = {name for name in watched.names() if name.startswith("tierd_")}
    assert found <= EXPORTED
    whole = {series.exported for series in SERIES if series.type != "histogram"}
    assert whole - found == set()
    assert {name for name in EXPORTED if name.endswith("_bucket")} <= found


@pytest.fixture
def disk(short_path: Path) -> Iterator[Path]:
    """A file system with room for two segments."""
    folder = short_path / "disk"
    folder.mkdir()
    options = f"size={2 * SEGMENT_BYTES + (256 << 10)},mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tierd-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if os.getuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip() if done else 'not root'}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_daemon_that_is_gone_and_a_full_disk_fire_and_resolve(short_path: Path, disk: Path) -> None:
    """TierdDown after kill -9 and TierdTierCannotGrow on a full disk, each of its own daemon only, with the shipped rules and
    their own times; both are over when there is a daemon again, and room.
    """
    gone = small_daemon(short_path / "gone", metrics_listen="127.0.0.1:0")
    full = small_daemon(short_path / "full", nvme_path=disk / "nvme")
    down, cannot_grow = ("TierdDown", "gone"), ("TierdTierCannotGrow", "full")
    try:
        targets = {name: daemon.start().status()["metrics"] for name, daemon in (("gone", gone), ("full", full))}
        with Prometheus(short_path / "p", targets) as prometheus:
            fill(full)
            prometheus.wait_until(lambda: len(prometheus.ask("targets")["activeTargets"]) == 2, "no targets", 30)
            prometheus.wait_until(lambda: prometheus.ask("query", query='up{instance="gone"} == 1')["result"], "not up", 30)
            assert down not in prometheus.alerts()
            gone.stop(signal.SIGKILL)
            wanted = {down: "firing", cannot_grow: "firing"}
            prometheus.wait_until(lambda: wanted.items() <= prometheus.alerts().items(), "they do not fire", FIRING_SECONDS_MAX)
            assert prometheus.alerts().keys() <= {down, cannot_grow, ("TierdNvmeFailures", "full")}
            gone.flags += ["--set", f"metrics.listen={targets['gone']}"]
            gone.start()
            subprocess.run(["mount", "-o", f"remount,size={64 * SEGMENT_BYTES}", str(disk)], check=True)
            fill(full)
            prometheus.wait_until(lambda: not wanted.keys() & prometheus.alerts().keys(), "they do not resolve", 60)
    finally:
        for daemon in (gone, full):
            daemon.end()
            print(daemon.log)


def fill(daemon: Daemon) -> None:
    """Store more than two segments hold, and wait until what can be written is."""
    with daemon.peer() as wire:
        for seed in range(1, 9):
            wire.store(hashes_of(seed, 50))
            daemon.run("sync")
