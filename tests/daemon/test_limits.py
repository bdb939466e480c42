"""Everything has a limit, and whoever reaches one is told so and what to do; nobody else notices."""

from __future__ import annotations

import os
import resource
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import GREETING, SEGMENT_BYTES, SLOTS, Daemon, Wire, hashes_of
from tierd.cli import USAGE
from tierd.errors import Busy, Invalid
from tierd.server import REQUESTS_WAITING_MAX
from tierd.wire.framing import encode

NOBODY = 65534


def as_nobody(work: Callable[[], None]) -> None:
    """Run assertions as another user, in a forked child."""
    child = os.fork()
    if child == 0:
        try:
            os.setuid(NOBODY)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def memory_descriptors(pid: int) -> int:
    """How many memfds a process has open; others may be closed while we look."""
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += os.readlink(path).startswith("/memfd:")
    return count


def test_the_sixty_fifth_session_of_a_namespace_is_busy(daemon: Daemon) -> None:
    """There are 64 holder bits; another namespace has its own, and a bit that comes free is given again."""
    wires = [daemon.peer() for _ in range(64)]
    with Wire(daemon.socket) as late:
        with pytest.raises(Busy, match=r"64 sessions.*(close|share)"):
            late.hello()
        with daemon.peer(model="other") as other:
            assert other.store(hashes_of(1, 3)) == 3
        wires.pop().end()
        late.hello()
        assert late.store(hashes_of(1, 3)) == 3
        assert wires[0].load(hashes_of(1, 3)) == 3
    for wire in wires:
        wire.end()
    assert daemon.status()["sessions"] == 0


def test_greetings_that_nobody_waits_for_lock_nobody_out(daemon: Daemon) -> None:
    """An engine that starts while the daemon is frozen tries again and again; later each of its tries is forgotten."""
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGSTOP)
    for _ in range(70):
        with socket.socket(socket.AF_UNIX) as impatient:
            impatient.connect(str(daemon.socket))
            impatient.sendall(encode({"id": 1, "verb": "hello", **GREETING}))
    daemon.process.send_signal(signal.SIGCONT)
    daemon.wait_until(lambda status: daemon.log.count("session ended") >= 64 and status["sessions"] == 0)
    with daemon.peer() as patient:
        assert patient.store(hashes_of(1, 3)) == 3


def test_a_request_too_many_on_a_connection_is_busy_and_those_that_wait_go_on(daemon: Daemon) -> None:
    """Stores wait for memory that another client maps: one more is refused at once; they are answered when it has gone."""
    holder = daemon.peer(model="holder")
    for seed in range(1, 5):
        holder.store(hashes_of(seed, SLOTS))
    with daemon.peer(model="other") as other:
        numbers = [other.request("store", hashes=hashes_of(5, 1)) for _ in range(REQUESTS_WAITING_MAX + 1)]
        with pytest.raises(Busy, match="256 requests of this connection wait"):
            other.reply(numbers[-1])
        assert daemon.metrics()['tierd_request_errors_total{error="busy",verb="store"}'] == 1
        holder.end()
        assert len(other.reply(numbers[0])["slots"]) == 4


class Limited(Daemon):
    """A daemon whose process may have few descriptors: `soft:hard`."""

    limits = "64:20000"

    def command(self) -> list[str]:
        return ["prlimit", f"--nofile={self.limits}", *super().command()]


def test_the_usual_soft_limit_of_descriptors_is_no_limit(make: Start) -> None:
    """It is raised to the hard one at start; one that is too low for the configuration is refused with the remedy."""
    plain = make(limits_sessions_max=100)
    daemon = Limited(plain.folder, plain.flags).start()
    assert daemon.process is not None
    assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE) == (20_000, 20_000)
    wires = [daemon.peer() for _ in range(30)]
    assert daemon.status()["sessions"] == 30
    daemon.stop()
    for wire in wires:
        wire.close()
    daemon.limits = "64:512"
    daemon.spawn()
    assert daemon.process.wait(20) == USAGE
    says = "4 memory segments, 16 files and 100 sessions need 620 descriptors, the limit is 512: raise it"
    assert says in daemon.log


def test_more_memory_than_the_holder_can_keep_is_refused(make: Start) -> None:
    """Before the first segment is made: what is not kept would be lost with the daemon, or held by nobody for ever."""
    daemon = make(held=True, cpu_bytes="1GiB", nvme_bytes=0)
    daemon.spawn()
    assert daemon.process is not None and daemon.process.wait(20) == USAGE
    assert "are 8448 descriptors to keep, the manager keeps 4096: raise that (FileDescriptorStoreMax=" in daemon.log


def test_what_the_service_manager_does_not_take_is_said_and_counted(start: Start) -> None:
    """A manager that does not answer: the daemon serves, and its operator can see that a crash will cost more."""
    daemon = start(environ={"NOTIFY_SOCKET": "/nobody/listens"}, nvme_bytes=0)
    with daemon.peer() as wire:
        assert wire.store(hashes_of(1, 5)) == 5
        counted = daemon.metrics()
        assert counted['tierd_descriptors_not_kept_total{kind="session"}'] == 1
        assert counted['tierd_descriptors_not_kept_total{kind="segment"}'] >= 2
    assert "the service manager does not keep a session" in daemon.log


def test_a_moment_without_descriptors_is_over_when_it_is_over(daemon: Daemon) -> None:
    """A client that cannot be given its segments is cut off each time, nothing leaks, and later it reads its blocks."""
    hashes = hashes_of(1, 2 * SLOTS)
    wire = daemon.peer()
    with daemon.peer() as other, Wire(daemon.admin) as admin:
        other.store(hashes)
        admin.ask("sync", deadline_ms=10_000)
        memory = memory_descriptors(daemon.pid)
        open_now = sorted(int(path.name) for path in Path(f"/proc/{daemon.pid}/fd").iterdir())
        before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        gap = next(at for at, number in enumerate([*open_now, -1]) if at != number)
        beyond = next((number for number in open_now if number > gap), gap + 1)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (min(gap + 1, beyond), before[1]))
        with pytest.raises((Busy, EOFError)):
            wire.lookup(hashes)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        assert "segments cannot be given" in daemon.log
        wire.close()
        daemon.wait_until(lambda status: status["sessions"] == 1)
        assert memory_descriptors(daemon.pid) == memory
        wire = daemon.peer()
        assert wire.load(hashes) == 2 * SLOTS
        wire.end()


def test_a_session_with_too_many_leases_is_busy(start: Start) -> None:
    """The message has the number, and one release later it goes on; other sessions never noticed."""
    daemon = start(limits_leases_per_session_max=5)
    hashes = hashes_of(1, 8)
    with daemon.peer() as greedy, daemon.peer() as other:
        greedy.store(hashes)
        leases = [greedy.lookup(hashes)["lease"] for _ in range(5)]
        for verb in ("lookup", "store"):
            with pytest.raises(Busy, match=r"maximum of 5 leases: release some"):
                greedy.ask(verb, hashes=hashes_of(2, 2))
        assert other.load(hashes) == 8
        greedy.ask("release", lease=leases[0])
        assert greedy.lookup(hashes)["lease"]


def test_too_many_connections_are_refused_and_the_others_stay(start: Start) -> None:
    """Two connections a session; the next one gets an error frame that names the setting."""
    daemon = start(limits_sessions_max=2)
    first = daemon.peer()
    others = [Wire(daemon.socket) for _ in range(3)]
    with Wire(daemon.socket) as late:
        message = late.receive()
        assert (message["id"], message["error"]) == (0, "busy")
        assert "limits.sessions_max" in message["message"]
    for wire in others:
        wire.close()
    assert first.store(hashes_of(1, 3)) == 3
    first.end()


def test_too_many_namespaces_are_busy(start: Start) -> None:
    """The limit is named; namespaces that are known go on."""
    daemon = start(limits_namespaces_max=2)
    with daemon.peer(model="a") as first, daemon.peer(model="b"), Wire(daemon.socket) as third:
        with pytest.raises(Busy, match="maximum of 2 namespaces"):
            third.hello(model="c")
        third.hello(model="b")
        assert first.store(hashes_of(1, 3)) == 3


def test_a_namespace_that_has_lost_all_makes_room_for_another(start: Start) -> None:
    """One without clients and blocks is forgotten when the limit asks for it; what it counted is not."""
    daemon = start(limits_namespaces_max=2, cpu_bytes=SEGMENT_BYTES, nvme_bytes=0)
    with daemon.peer(model="a") as first:
        first.lookup(hashes_of(1, 7))
    with daemon.peer(model="b") as second:
        assert second.store(hashes_of(2, 5)) == 5
        with daemon.peer(model="c"):
            assert {space["model"] for space in daemon.status()["namespaces"]} == {"b", "c"}
            assert daemon.status()["lookup_blocks"]["miss"] == 7
            with Wire(daemon.socket) as late, pytest.raises(Busy, match="maximum of 2 namespaces, all in use: raise"):
                late.hello(model="a")
        assert second.load(hashes_of(2, 5)) == 5


def test_the_namespace_that_was_left_first_makes_room_for_another(start: Start) -> None:
    """At the limit a new one is told to try again, and soon gets in; who has a client, or was left later, keeps all blocks."""
    daemon = start(limits_namespaces_max=3)
    for model in ("first", "later"):
        with daemon.peer(model=model) as peer:
            assert peer.store(hashes_of(1, 5)) == 5
    with daemon.peer(model="used") as used:
        assert used.store(hashes_of(2, 5)) == 5

        def join() -> bool:
            try:
                with daemon.peer(model="new") as peer:
                    return peer.store(hashes_of(3, 5)) == 5
            except Busy as refused:
                assert "one that nobody uses is being given up" in str(refused)
                return False

        assert not join()
        daemon.wait_until(lambda _: join())
        assert {space["model"] for space in daemon.status()["namespaces"]} == {"later", "used", "new"}
        assert used.load(hashes_of(2, 5)) == 5
        with daemon.peer(model="later") as peer:
            assert peer.load(hashes_of(1, 5)) == 5


def test_a_connection_that_says_nothing_is_closed(start: Start) -> None:
    """Without hello within the limit it gets a reason and its end."""
    daemon = start(limits_wait_seconds_max=0.2)
    with Wire(daemon.socket) as silent:
        message = silent.receive()
        assert (message["error"], message["message"]) == ("busy", "no hello within 0.2 s")
        with pytest.raises(EOFError):
            silent.receive()


def test_a_wait_ends_at_its_deadline(daemon: Daemon) -> None:
    """A store that finds all memory mapped by another namespace is busy when its time is over, not later."""
    with daemon.peer(model="a") as first:
        assert (first.place(hashes_of(1, 4 * SLOTS))[1] >= 0).all()
        second = daemon.peer(model="b")
        with pytest.raises(Busy, match=r"no answer within 0\.05 s; go on without"):
            second.ask("store", hashes=hashes_of(2, 1), deadline_ms=50)
        assert second.ask("stats")["blocks"] == 0
        assert daemon.metrics()['tierd_request_errors_total{error="late",verb="store"}'] == 1
        second.end()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_a_domain_is_open_only_to_whom_the_configuration_says(start: Start) -> None:
    """Another user has a domain of his own; a domain that is not his is refused with both names."""
    daemon = start(server_socket_mode="0666", server_domains=f"{NOBODY}=team-a")
    daemon.folder.chmod(0o755)
    daemon.folder.parent.chmod(0o755)

    def work() -> None:
        for domain in ("uid:0", "team-b", f"uid:{NOBODY}"):
            with Wire(daemon.socket) as wire, pytest.raises(Invalid) as refused:
                wire.hello(domain=domain)
            assert f"domain {domain!r} is not open to uid {NOBODY}, whose domain is 'team-a'" in str(refused.value)
        with Wire(daemon.socket) as wire:
            wire.hello(domain="team-a")
            assert wire.store(hashes_of(1, 3)) == 3
        with Wire(daemon.socket) as wire:
            wire.hello()
            assert wire.load(hashes_of(1, 3)) == 3
        with pytest.raises(PermissionError):
            Wire(daemon.admin)

    as_nobody(work)
    (space,) = daemon.status()["namespaces"]
    assert (space["domain"], space["blocks"]) == ("team-a", 3)
