"""From start to stop: quick and small at the start, nothing lost at the end, and clear words when it cannot be."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.contract.test_io_engines import need_kvikio
from tests.daemon.conftest import Start
from tests.daemon.harness import SLOTS, Daemon, Wire, hashes_of, readable
from tierd.cli import FAILED, USAGE
from tierd.clock import monotonic_seconds
from tierd.config import KEYS
from tierd.errors import Closed, TierdError

READY_SECONDS_MAX = 1.0
RESIDENT_BYTES_MAX = 100 << 20
DEFAULT_LISTEN = KEYS["metrics.listen"]["default"]


def refused(daemon: Daemon) -> tuple[int, str]:
    """Exit code and last words of a daemon that does not start."""
    daemon.spawn()
    assert daemon.process is not None
    return daemon.process.wait(30), daemon.log.strip().splitlines()[-1]


def resident_bytes(pid: int) -> int:
    """What a process has in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) << 10


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_it_is_ready_in_a_second_and_small(make: Start) -> None:
    """With default tiers and nothing in them: from exec to the first answer at best of three, and resident.

    Where others use the processors it is the daemon's own seconds that count.
    """
    daemon = make(cpu_bytes="1GiB", cpu_segment_bytes="64MiB", nvme_bytes="4GiB", nvme_segment_bytes="64MiB")
    seconds, computed, resident = [], [], []
    for _ in range(3):
        before = monotonic_seconds()
        daemon.start()
        seconds.append(monotonic_seconds() - before)
        computed.append(cpu_seconds(daemon.pid))
        resident.append(resident_bytes(daemon.pid))
        daemon.stop()
    assert min(computed) < READY_SECONDS_MAX
    if os.getloadavg()[0] < (os.cpu_count() or 1):
        assert min(seconds) < READY_SECONDS_MAX
    assert max(resident) < RESIDENT_BYTES_MAX


def test_the_daemon_loads_no_torch(daemon: Daemon) -> None:
    """Nothing of torch, CUDA or an engine is mapped into the process, even after it has served blocks."""
    with daemon.peer() as wire:
        wire.store(hashes_of(1, 20))
        assert wire.load(hashes_of(1, 20)) == 20
    daemon.ask("sync", deadline_ms=10_000)
    maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    for name in ("torch", "libcuda", "transformers", "tokenizers"):
        assert name not in maps


def test_sigterm_drains_what_was_admitted(daemon: Daemon) -> None:
    """Blocks committed a moment before SIGTERM are in nvme in the next life; the sockets are gone meanwhile."""
    hashes = hashes_of(1, 200)
    with daemon.peer() as wire:
        wire.store(hashes)
        assert daemon.stop() == 0
    assert not daemon.socket.exists() and not daemon.admin.exists()
    assert "stopped unwritten=0" in daemon.log
    daemon.start()
    with daemon.peer() as wire:
        assert wire.lookup(hashes)["tiers"]["nvme"] == 200
        assert wire.load(hashes) == 200


def test_drain_on_the_admin_socket_is_a_stop_too(daemon: Daemon) -> None:
    """`drain` ends the daemon as SIGTERM does."""
    assert daemon.ask("drain")["ok"] is True
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0


class Slow(Daemon):
    """Each call that writes to its disk takes two seconds."""

    serve = ("tests.faults.slow", "2", "serve")


def busy(make: Start, **values: object) -> Daemon:
    """A daemon that has more to write than it can in a while."""
    plain = make(nvme_io_engine="posix", **values)
    daemon = Slow(plain.folder, plain.flags).start()
    with daemon.peer() as wire:
        wire.store(hashes_of(1, 100))
    return daemon


def test_a_disk_that_fails_does_not_keep_it_from_stopping(daemon: Daemon) -> None:
    """Where its files belong is a file: that nothing can be written is found at once, and what was lost is in the log."""
    nvme = daemon.state / "nvme"
    nvme.rename(daemon.state / "gone")
    nvme.write_text("no directory")
    with daemon.peer() as wire:
        wire.store(hashes_of(1, 100))
    before = monotonic_seconds()
    assert daemon.stop() == 0
    assert monotonic_seconds() - before < 5
    assert "stopped unwritten=1" in daemon.log


def test_a_disk_that_is_slow_does_not_keep_it_from_stopping(make: Start) -> None:
    """Draining ends after its limit, with the number of runs that were lost in the log; meanwhile it is not ready."""
    daemon = busy(make, limits_drain_seconds_max=1.5)
    with daemon.peer() as wire:
        assert wire.load(hashes_of(1, 100)) == 100
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_until(lambda _: "draining" in daemon.log)
        assert daemon.get("/readyz") == (503, "draining\n")
        assert daemon.get("/livez") == (200, "alive\n")
        for verb in ("store", "prefetch"):
            with pytest.raises(Closed, match="stopping: go on without"):
                wire.ask(verb, hashes=hashes_of(2, 1))
        with Wire(daemon.socket) as late, pytest.raises(Closed, match="stopping"):
            late.hello()
        assert wire.load(hashes_of(1, 100)) == 100
        assert daemon.process.wait(20) == 0
    assert re.search("stopped unwritten=[1-9]", daemon.log)


def test_a_second_sigterm_stops_now(make: Start) -> None:
    """Whoever cannot wait for a drain does not have to; the next life starts as after any crash."""
    daemon = busy(make, limits_drain_seconds_max=600)
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_until(lambda _: "draining" in daemon.log)
    assert daemon.stop() == 128 + signal.SIGTERM
    daemon.start()
    with daemon.peer() as wire:
        assert wire.store(hashes_of(2, 100)) == 100
    daemon.stop(signal.SIGKILL)


def test_sigterm_while_clients_are_busy_ends_in_time_and_loses_nothing(daemon: Daemon) -> None:
    """Clients in the middle of loads and stores are told; all that was committed is there in the next life."""
    committed: dict[int, int] = {}
    chains_max = 4 * SLOTS // 3 // 4  # of each client: together they fit into memory, so nothing has to go unwritten
    midway = Event()

    def client(number: int) -> None:
        with daemon.peer() as wire:
            try:
                for turn in range(100_000):
                    seed = number * 1000 + turn % chains_max
                    if stored := wire.store(hashes_of(seed, 3)):
                        committed[seed] = stored
                    wire.load(hashes_of(seed, 3))
                    if turn == chains_max // 2:
                        midway.set()
            except (TierdError, OSError, EOFError):
                return
            raise AssertionError("the daemon did not stop")

    threads = [Thread(target=client, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    assert midway.wait(20)
    assert daemon.stop() == 0
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    daemon.start()
    with daemon.peer() as wire:
        assert {seed: wire.load(hashes_of(seed, 3)) for seed in committed} == committed
        assert daemon.metrics()["tierd_checksum_failures_total"] == 0


def test_without_nvme_it_serves_from_memory_alone(start: Start) -> None:
    """nvme.bytes = 0: no tier, no files, no io engine; stop and start is a cold start."""
    daemon = start(nvme_bytes=0)
    with daemon.peer() as wire:
        assert wire.store(hashes_of(1, 20)) == 20
        assert wire.load(hashes_of(1, 20)) == 20
        assert wire.ask("prefetch", hashes=hashes_of(1, 20))["blocks"] == 20
        lease = wire.lookup(hashes_of(1, 20))["lease"]
        assert wire.ask("load", lease=lease, first=0, count=7)["count"] >= 7
    assert daemon.run("sync").returncode == 0
    status = daemon.status()
    assert list(status["tiers"]) == ["cpu"]
    assert status["io"] == {"engine": "none", "path": "none", "gpu": "none"}
    assert "no nvme" in daemon.run("status").stdout
    assert not list(daemon.state.rglob("*.directory"))
    assert daemon.get("/readyz") == (200, "ready\nio none none\ngpu none\n")


def test_a_second_daemon_on_the_same_state_is_refused(daemon: Daemon, make: Start) -> None:
    """It says whose the directory is and what to do, ends with 1, and does the first one no harm."""
    second = make(name="second")
    second.state = daemon.state
    code, says = refused(second)
    assert code == FAILED
    assert f"{daemon.state} is used by the tierd with pid {daemon.pid}: stop that one, or give" in says
    with daemon.peer() as wire:
        assert wire.store(hashes_of(1, 5)) == 5


def test_a_second_daemon_on_the_same_socket_is_refused(daemon: Daemon, make: Start) -> None:
    """A live socket is not replaced: a wrong configuration, which ends with 2."""
    second = make(name="second")
    second.runtime = daemon.runtime
    code, says = refused(second)
    assert code == USAGE
    assert f"another daemon listens on {daemon.admin}: stop it, or set another" in says
    with daemon.peer() as wire:
        assert wire.store(hashes_of(1, 5)) == 5


def test_sockets_of_a_dead_daemon_are_replaced(daemon: Daemon) -> None:
    """After kill -9 the files are still there, and no reason not to start."""
    daemon.kill()
    assert daemon.socket.exists()
    daemon.start()
    with daemon.peer() as wire:
        assert wire.store(hashes_of(1, 5)) == 5


def test_kvikio_that_does_not_work_is_refused_with_the_reason(make: Start) -> None:
    """Asked for by name, it is not silently replaced: code 2, the reason, and what to use instead."""
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("kvikio works here")
    code, says = refused(make(nvme_io_engine="kvikio"))
    assert code == USAGE
    assert "nvme.io_engine 'kvikio' does not work at" in says
    assert says.endswith("use 'auto' or 'posix'")


def test_kvikio_serves_as_io_engine(start: Start, emulation: Path) -> None:
    """The real library on host memory, with an emulated driver: blocks go to nvme and come back."""
    need_kvikio()
    environ = {"LD_LIBRARY_PATH": str(emulation.parent), "KVIKIO_COMPAT_MODE": "ON"}
    daemon = start(nvme_io_engine="kvikio", environ=environ)
    assert daemon.status()["io"]["engine"] == "kvikio"
    hashes = hashes_of(1, 100)
    with daemon.peer() as wire:
        assert wire.store(hashes) == 100
        daemon.ask("sync", deadline_ms=10_000)
    daemon.stop()
    daemon.start()
    with daemon.peer() as wire:
        assert wire.lookup(hashes)["tiers"]["nvme"] == 100
        assert wire.load(hashes) == 100


def test_a_taken_default_port_is_a_warning_and_another_one_an_error(make: Start) -> None:
    """Who never chose the metrics' address gets a daemon without metrics; who did is told that it cannot be had."""
    host, _, port = DEFAULT_LISTEN.rpartition(":")
    with socket.socket() as taken, socket.socket() as other:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, int(port)))
            taken.listen()
        except OSError:
            pass  # somebody else has it: taken is taken
        other.bind((host, 0))
        other.listen()
        daemon = make(metrics_listen=DEFAULT_LISTEN).start()
        assert f"metrics.listen = {DEFAULT_LISTEN} cannot be bound" in daemon.log
        assert "no metrics and no health checks" in daemon.log
        assert daemon.status()["metrics"] == ""
        assert "metrics  off" in daemon.run("status").stdout
        code, says = refused(make(name="second", metrics_listen=f"{host}:{other.getsockname()[1]}"))
        assert code == USAGE
        assert "set metrics.listen to another port" in says


def test_metrics_can_be_off(start: Start) -> None:
    """metrics.listen = '' serves no HTTP and warns of nothing."""
    daemon = start(metrics_listen="")
    assert daemon.status()["metrics"] == ""
    assert "warning" not in daemon.log


def test_what_a_dead_client_held_is_free_at_once(daemon: Daemon) -> None:
    """A process that is killed while it reads and writes: its pidfd frees everything, no timer involved."""
    told, telling = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            wire = daemon.peer()
            wire.store(hashes_of(1, 50))
            wire.lookup(hashes_of(1, 50))
            wire.place(hashes_of(2, 50))
            os.write(telling, b"x")
            signal.pause()
        finally:
            os._exit(1)
    assert readable(told, 20)
    status = daemon.status()
    assert (status["sessions"], status["tiers"]["cpu"]["slots"]["filling"]) == (1, 50)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    slots = daemon.wait_until(lambda status: status["sessions"] == 0)["tiers"]["cpu"]["slots"]
    assert (slots["ready"], slots["filling"], slots["retired"]) == (50, 0, 0)
    assert sum(slots.values()) % SLOTS == 0
    for descriptor in (told, telling):
        os.close(descriptor)
