"""The shipped units under a real systemd: start, reload, restart, every way to die, drain, and a wrong configuration."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.ops.conftest import MEMORY, Load, Program
from tests.ops.load import CHAIN_BLOCKS, CHAIN_BYTES, LAYOUT
from tests.ops.machine import DISK, Machine, Unit, until
from tests.ops.prometheus import Prometheus, needs_prometheus
from tests.results import Results
from tierd.tiers.host import HostSegment

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(120, func_only=True)]
SEGMENT = HostSegment.geometry(LAYOUT, 64 << 20, "auto")
"""Of the cpu tier with its default size."""
LOST = ("damaged", "stale", "orphans")
"""Why a committed block may be no hit any more; one that was being written is not committed."""
MIB, GIB = 1 << 20, 1 << 30
SMALL_DISK = "/small"
READY_SECONDS_EMPTY, READY_SECONDS_WARM = 1.0, 5.0
MakeLoad = Callable[..., Load]


def status(unit: Unit) -> dict[str, Any]:
    """What `tierd status` says in the machine."""
    return dict(json.loads(unit.machine.run(str(unit.machine.tierd), "status", "--json").stdout))


def accounts(unit: Unit) -> tuple[int, int, int]:
    """Of the cpu tier: used bytes, all slots, and those that are ready."""
    tier = status(unit)["tiers"]["cpu"]
    return tier["used_bytes"], sum(tier["slots"].values()), tier["slots"]["ready"]


def settled(unit: Unit) -> tuple[int, int, int]:
    """The accounts when no segment is on its way: used bytes are those of the segments whose slots there are, to the byte."""

    def exact() -> tuple[int, int, int] | None:
        used_bytes, slots, ready = accounts(unit)
        return (used_bytes, slots, ready) if used_bytes * SEGMENT.slot_count == slots * SEGMENT.total_bytes else None

    found = until(exact, "used bytes are not those of the segments", 20)
    assert found
    return found


def adopted(unit: Unit) -> dict[str, int]:
    """What the latest life has found, from its log."""
    line = [line for line in unit.machine.journal().splitlines() if " adopt: adopted " in line][-1]
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", line)}


def drop_in(unit: Unit, *lines: str) -> None:
    """As `systemctl edit --runtime` does it."""
    unit.machine.run("mkdir", "-p", "/run/systemd/system/tierd.service.d")
    unit.machine.write("/run/systemd/system/tierd.service.d/test.conf", "\n".join(["[Service]", *lines, ""]))
    unit.machine.run("systemctl", "daemon-reload")


def warmed(load: Load, unit: Unit, blocks: int) -> None:
    """Let a live engine work until so many blocks are there."""
    load.run()
    until(lambda: accounts(unit)[2] >= blocks, f"{blocks} blocks are not stored", 60)


def test_an_empty_daemon_is_ready_within_a_second(unit: Unit, results: Results) -> None:
    """From the start of its process, with nothing to adopt, it says READY in under one second."""
    seconds = []
    for _ in range(3):
        unit.systemctl("restart")
        seconds.append(unit.seconds_to_ready())
    results.note("empty start", seconds=round(min(seconds), 2))
    assert min(seconds) < READY_SECONDS_EMPTY


@pytest.mark.parametrize("death", ["restart", "kill -9", "watchdog"])
def test_nothing_in_memory_is_lost_whatever_ends_the_daemon(death: str, unit: Unit, load: MakeLoad, results: Results) -> None:
    """With a live engine no call fails, no byte is wrong, every committed block is a hit again, and the accounts agree."""
    drop_in(unit, "WatchdogSec=2s")
    unit.systemctl("start")
    engine = load()
    warmed(engine, unit, 10 * CHAIN_BLOCKS)
    pid = unit.pid()
    match death:
        case "restart":
            unit.systemctl("restart")
        case "kill -9":
            unit.signal("SIGKILL")
        case "watchdog":
            unit.signal("SIGSTOP")  # a loop that does not turn
    unit.wait_next_life(pid)
    until(lambda: sum(status(unit)["lookup_blocks"].values()) > 0, "the engine does not come to the new life", 30)
    sums, checked, found = engine.pause(), engine.check(), adopted(unit)
    used_bytes, _, ready = settled(unit)
    seconds = round(unit.seconds_to_ready(), 2)
    print(death, sums, checked, found, "seconds to ready:", seconds)
    results.note(death, blocks=checked["asked"], lost=checked["lost"], misses=sums["missed"], seconds=seconds)
    assert sums["failures"] == [] and sums["wrong"] == checked["wrong"] == 0
    assert sums["connects"] >= 2, "the engine has not attached again"
    assert checked["asked"] >= 10 * CHAIN_BLOCKS
    assert checked["lost"] <= sum(found[reason] for reason in LOST), f"{checked['lost']} without a reason: {found}"
    assert ready >= checked["asked"] and used_bytes <= GIB
    assert status(unit)["sessions"] == 1, "the engine's session was resumed, not made anew beside the old one"
    if death == "watchdog":
        assert "Watchdog timeout" in unit.machine.journal()


@pytest.mark.timeout(240, func_only=True)
def test_a_real_engine_says_the_same_whatever_ends_the_daemon_under_it(unit: Unit, talk: Program) -> None:
    """`tierd_engine` goes on while the daemon is restarted, killed and ended by the watchdog; then it has its prompts again."""
    drop_in(unit, "WatchdogSec=2s")
    unit.systemctl("start")
    assert [talk.ask(str(number)) for number in range(8)] == [{"hit": 0, "same": True}] * 8
    for death in ("restart", "SIGKILL", "SIGSTOP"):
        pid = unit.pid()
        with ThreadPoolExecutor(1) as other:
            ending = other.submit(unit.systemctl if death == "restart" else unit.signal, death)
            meanwhile = [talk.ask(str(number % 8)) for number in range(24)]
            ending.result(60)
        unit.wait_next_life(pid)
        assert all(answer["same"] for answer in meanwhile), death
        until(lambda: talk.ask("0")["hit"], "it does not come to the new life", 30)
        assert [talk.ask(str(number)) for number in range(8)] == [{"hit": 192, "same": True}] * 8, death


def test_accounts_are_the_same_to_the_byte_after_a_kill(unit: Unit, load: MakeLoad) -> None:
    """With an engine that is attached and does nothing, used bytes, slots and ready slots are what they were."""
    unit.systemctl("start")
    engine = load(chains=12)
    assert engine.fill() == 12 * CHAIN_BLOCKS
    before, pid = settled(unit), unit.pid()
    unit.signal("SIGKILL")
    unit.wait_next_life(pid)
    assert accounts(unit) == before
    assert engine.check() == {"asked": 12 * CHAIN_BLOCKS, "lost": 0, "wrong": 0}


@pytest.mark.timeout(300, func_only=True)
def test_ten_gigabytes_of_memory_are_served_again_within_five_seconds(unit: Unit, load: MakeLoad, results: Results) -> None:
    """10 GiB of blocks, or two thirds of the available memory, in a tier with a tenth more room: killed, and ready again."""
    available = int(re.findall(r"MemAvailable:\s+(\d+)", unit.machine.run("cat", "/proc/meminfo").stdout)[0]) << 10
    chains = min(10 * GIB, available * 2 // 3) // CHAIN_BYTES
    if chains * CHAIN_BYTES < GIB:
        pytest.skip(f"of this machine's memory {available / GIB:.1f} GiB are available, too few to show anything")
    unit.configure(f'[cpu]\nbytes = "{chains * CHAIN_BYTES * 11 // 10 // MIB}MiB"\n[nvme]\nbytes = 0')
    unit.systemctl("start")
    engine = load(chains=chains, deadline_seconds=5.0)
    assert engine.fill() == chains * CHAIN_BLOCKS
    before, pid = settled(unit), unit.pid()
    unit.signal("SIGKILL")
    unit.wait_next_life(pid)
    seconds = round(unit.seconds_to_ready(), 2)
    results.note("warm start", gib=round(before[0] / GIB, 1), blocks=before[2], seconds=seconds)
    assert seconds < READY_SECONDS_WARM
    assert accounts(unit) == before
    assert engine.check()["lost"] == 0


def test_who_connects_during_a_restart_waits_instead_of_failing(unit: Unit, load: MakeLoad) -> None:
    """While no daemon runs, connecting works: a new engine's first call is answered by the next life, and a scrape too."""
    drop_in(unit, "ExecStartPre=+/bin/sleep 1")
    unit.systemctl("start")
    first = load(chains=4)
    assert first.fill() == 4 * CHAIN_BLOCKS
    pid = unit.pid()
    unit.signal("SIGKILL")
    until(lambda: unit.pid() == 0, "it does not die", 10)
    scrape = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9475/metrics', timeout=20).read().decode())"
    python = str(unit.machine.tierd.with_name("python"))
    with subprocess.Popen(unit.machine.enter(python, "-c", scrape), stdout=subprocess.PIPE, text=True) as scraping:
        second = load(chains=4, deadline_seconds=10.0)
        second.run()
        unit.wait_next_life(pid)
        until(lambda: status(unit)["sessions"] == 2, "both engines are there", 20)
        text, _ = scraping.communicate(timeout=30)
    sums = second.pause()
    assert sums["failures"] == [] and sums["connects"] == 1 and sums["missed"] == 0
    assert "tierd_sessions " in text


def test_a_configuration_that_changed_means_a_cold_start_that_says_why(unit: Unit, load: MakeLoad) -> None:
    """Segments of another size are given up with both geometries in the log, and what they took is free."""
    unit.systemctl("start")
    engine = load(chains=12)
    assert engine.fill() == 12 * CHAIN_BLOCKS
    unit.configure(MEMORY.replace('bytes = "1GiB"', 'bytes = "1GiB"\nsegment_bytes = "32MiB"'))
    unit.systemctl("restart")
    assert (accounts(unit)[2], adopted(unit)["segments"]) == (0, 0)
    log = unit.machine.journal()
    assert re.search(r"segment given up tier=cpu .*its geometry .* is not the configured", log)
    assert int(unit.show("NFileDescriptorStore")[0]) <= 3, (
        "more is kept than the engine's process and a segment that it comes back to"
    )
    warmed(engine, unit, 12 * CHAIN_BLOCKS)
    assert engine.pause()["failures"] == []


def test_tierd_drain_ends_the_service_well_and_an_engine_that_comes_starts_a_warm_one(unit: Unit, load: MakeLoad) -> None:
    """What it says is written is on NVMe: the life that the socket starts for the next call finds all of it."""
    unit.configure(f'[nvme]\nbytes = "2GiB"\npath = "{DISK}/nvme"')
    unit.machine.run(str(unit.machine.tierd), "install-service")
    unit.systemctl("start")
    engine = load(chains=4, deadline_seconds=10.0)
    assert engine.fill() == 4 * CHAIN_BLOCKS
    pid = unit.pid()
    drained = json.loads(unit.machine.run(str(unit.machine.tierd), "drain", "--json").stdout)
    assert (drained["pid"], drained["given_up"]) == (pid, 0)
    assert "tierd.service: Deactivated successfully." in unit.machine.journal()
    all_of_it = {"asked": 4 * CHAIN_BLOCKS, "lost": 0, "wrong": 0}
    until(lambda: engine.check() == all_of_it, "a life that the engine's first call starts does not have all of it", 10)
    assert unit.pid() not in (0, pid) and unit.show("NRestarts") == ["0"]


def test_stop_drains_and_the_next_start_finds_nvme_warm(unit: Unit, load: MakeLoad, results: Results) -> None:
    """After stop and start memory is cold, and all that was committed comes back from disk, outside of /var/lib/tierd."""
    machine = unit.machine
    unit.configure(f'[nvme]\nbytes = "2GiB"\npath = "{DISK}/nvme"\n[limits]\ndrain_seconds_max = 60')
    machine.run(str(machine.tierd), "install-service")
    unit.systemctl("start")
    engine = load(chains=12, deadline_seconds=10.0)
    assert engine.fill() == 12 * CHAIN_BLOCKS
    machine.run("systemctl", "stop", "tierd.socket", "tierd-metrics.socket", "tierd.service")
    assert unit.show("Result", "ExecMainStatus", "NFileDescriptorStore") == ["success", "0", "0"]
    assert "daemon: stopped unwritten=0" in machine.journal()
    unit.systemctl("start")
    assert accounts(unit)[2] == 0
    assert engine.check() == {"asked": 12 * CHAIN_BLOCKS, "lost": 0, "wrong": 0}
    results.note("stop and start", blocks=12 * CHAIN_BLOCKS)


@pytest.fixture
def small_disk(machine: Machine) -> Iterator[str]:
    """A file system in the machine with room for two segments of 16 MiB; the drop-in that opens it goes with it."""
    machine.run("mkdir", "-p", SMALL_DISK)
    machine.run("mount", "-t", "tmpfs", "-o", f"size={2 * 16 * MIB + MIB}", "tierd-test", SMALL_DISK)
    yield SMALL_DISK
    machine.run("systemctl", "stop", "tierd.socket", "tierd-metrics.socket", "tierd.service")
    machine.run("umount", "-l", SMALL_DISK)


@needs_prometheus
@pytest.mark.timeout(290, func_only=True)
def test_a_full_disk_alerts_and_recovers_while_engines_go_on(
    unit: Unit, load: MakeLoad, small_disk: str, short_path: Path, results: Results
) -> None:
    """A Prometheus in the machine's network fires TierdTierCannotGrow; with room again it is over, and all comes to NVMe."""
    unit.configure(f'[cpu]\nbytes = "1GiB"\n[nvme]\nbytes = "1GiB"\nsegment_bytes = "16MiB"\npath = "{small_disk}/nvme"')
    unit.machine.run(str(unit.machine.tierd), "install-service")
    unit.systemctl("start")
    engine, alert = load(chains=24), ("TierdTierCannotGrow", "service")
    with unit.machine.network(), Prometheus(short_path / "p", {"service": "127.0.0.1:9475"}) as prometheus:
        warmed(engine, unit, 24 * CHAIN_BLOCKS)
        begun = prometheus.now()
        prometheus.wait_until(lambda: prometheus.alerts().get(alert) == "firing", "it does not fire", 150)
        fired, full, fired_at = prometheus.alerts(), status(unit)["tiers"]["nvme"], prometheus.now()
        unit.machine.run("mount", "-o", "remount,size=1G", small_disk)
        prometheus.wait_until(lambda: alert not in prometheus.alerts(), "it does not resolve", 60)
        resolved_at = prometheus.now()
    sums = engine.pause()
    print(fired, full, sums)
    assert fired.keys() <= {alert, ("TierdNvmeFailures", "service")}
    assert full["used_bytes"] <= 2 * 16 * MIB
    assert sums["failures"] == [] and sums["wrong"] == 0
    unit.systemctl("stop")
    unit.systemctl("start")
    assert engine.check() == {"asked": 24 * CHAIN_BLOCKS, "lost": 0, "wrong": 0}
    results.note("full disk", blocks=24 * CHAIN_BLOCKS, fired=round(fired_at - begun), resolved=round(resolved_at - fired_at))


def test_reload_takes_all_of_a_configuration_or_nothing(unit: Unit) -> None:
    """`systemctl reload` and SIGHUP change what can change, name what cannot, and refuse a mistake with all its rest."""
    unit.systemctl("start")
    pid = unit.pid()
    unit.configure(MEMORY.replace("1GiB", "2GiB"), '[log]\nlevel = "debug"')
    unit.systemctl("reload")
    assert unit.show("StatusText", "ActiveState") == ["serving; a restart is needed for cpu.bytes", "active"]
    assert "reload: configuration reloaded changed=log.level restart=cpu.bytes" in unit.machine.journal()
    unit.configure(MEMORY, '[log]\nlevel = "info"\nlevle = "debug"')
    assert unit.systemctl("reload", check=False).returncode == 1
    unit.signal("SIGHUP")
    until(lambda: "reload: configuration not reloaded" in unit.machine.journal(), "SIGHUP is not answered", 10)
    assert "log.levle = 'debug' is no key of tierd: did you mean log.level?" in unit.machine.journal().replace('\\"', "'")
    unit.configure(MEMORY, '[log]\nlevel = "warning"')
    unit.signal("SIGHUP")
    until(lambda: unit.show("StatusText") == ["serving"], "SIGHUP does not reload", 10)
    assert (unit.pid(), unit.show("ActiveState")[0]) == (pid, "active")


def test_a_wrong_configuration_is_not_started_again(unit: Unit) -> None:
    """Exit status 2, no restart, and the message in the journal; corrected, it starts."""
    unit.configure('[cpu]\nbytes = "lots"')
    assert unit.systemctl("start", check=False).returncode
    result = unit.show("Result", "ExecMainStatus", "NRestarts", "ActiveState")
    assert result == ["exit-code", "2", "0", "failed"]
    message = "tierd serve: /etc/tierd/tierd.toml: cpu.bytes = 'lots' must be a number of bytes"
    assert message in unit.machine.journal()
    unit.configure(MEMORY)
    unit.systemctl("start")
    assert unit.show("ActiveState") == ["active"]


def test_a_store_that_is_too_small_for_the_configuration_is_refused_at_start(unit: Unit) -> None:
    """Whatever systemd's version, more segments than FileDescriptorStoreMax= are refused before one can be lost."""
    unit.configure('[cpu]\nbytes = "1GiB"\nsegment_bytes = "128KiB"\n[nvme]\nbytes = 0')
    assert unit.systemctl("start", check=False).returncode
    assert "are 16640 descriptors to keep, the manager keeps 4096" in unit.machine.journal()
    assert unit.show("ExecMainStatus") == ["2"]


def test_systemctl_status_says_how_the_service_is(unit: Unit, load: MakeLoad, machine: Machine, results: Results) -> None:
    """That it runs and serves, by whom it can be started, and its last lines: an engine has come."""
    unit.systemctl("start")
    assert load(chains=4).fill() == 4 * CHAIN_BLOCKS
    said = unit.systemctl("status").stdout
    assert "Active: active (running)" in said and 'Status: "serving"' in said and "service: session client=load" in said
    results.quote("systemctl --version", machine.run("systemctl", "--version").stdout)
    results.quote("systemctl status tierd", said)


def test_only_members_of_the_group_can_connect(unit: Unit, machine: Machine) -> None:
    """The data socket is tierd's with mode 0660, the admin socket its alone, and nobody else's state can be read."""
    unit.systemctl("start")
    names = ["/run/tierd/tierd.sock", "/run/tierd/admin.sock", "/run/tierd", "/var/lib/tierd"]
    found = machine.run("stat", "--format=%A %U %G", *names).stdout.split("\n")[:4]
    assert found == ["srw-rw---- tierd tierd", "srw------- tierd tierd", "drwxr-xr-x tierd tierd", "drwx------ tierd tierd"]


def test_the_installed_unit_is_as_closed_as_the_shipped_one(machine: Machine, results: Results) -> None:
    """`systemd-analyze security` on the installed files, with an environment in somebody's home, stays at 1.6 or less."""
    machine.run("systemd-analyze", "verify", *(f"/etc/systemd/system/{name}" for name in ("tierd.service", "tierd.socket")))
    scored = machine.run("systemd-analyze", "security", "--offline=true", "--threshold=16", "tierd.service").stdout
    results.note("exposure", score=float(re.findall(r"level for tierd.service: ([\d.]+)", scored)[0]))
    results.quote("systemd-analyze security --offline=true --threshold=16 tierd.service", scored)
