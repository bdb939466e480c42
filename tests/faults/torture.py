"""Kill the daemon at random moments under load, again and again, and see that nothing is wrong and nothing is lost.

    python -m tests.faults.torture --kills 300 [--seed 1]

Three clients load and store all the time, in two namespaces that compete for memory. After each kill the segments are
read by hand before the next life starts, which tells what was under way, and what the next life must find. Most kills
wait for a client to come back first; some are aimed at slots being filled, some at the recovery.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.house import LAYOUT, ROOT, House, kill_process, until
from tests.faults.raw import RawClient
from tests.faults.remains import PLACES, Remains, examine
from tests.faults.worker import SHARED_BY, model_of, universe
from tierd.block import split
from tierd.errors import TierdError
from tierd.tiers.segment import Geometry

SEGMENT_BYTES = Geometry.fit(LAYOUT, 4 << 20).total_bytes
SEGMENT_SLOTS = Geometry.fit(LAYOUT, 4 << 20).slot_count
NAMESPACES = (0, 0, 1)
"""Of the workers."""
IO_THREADS = "2"
"""Of the daemon: few, so that what is asked for waits in line and a kill finds it in flight."""
LIFE_SECONDS_MAX = 0.3
LOADED_SHARE = 0.85
"""Of the lives that last until a client has come back, and so long on top."""
BACK_SECONDS_MAX = 10.0
AIMED_SHARE, AIM_SECONDS_MAX = 0.4, 0.5
"""Of the kills that wait until slots of a tier are being filled."""
RECOVERY_SHARE = 0.1
"""Of the kills that are aimed at a daemon that is not ready yet."""
RECOVERY_SECONDS = 0.3
CHECK_SHARE = 0.25
"""Of the kills after which the clients pause and all is counted."""
IDLE_SHARE = 0.3
"""Of the checks that end with a kill of the idle daemon, after which every block must be found again."""
READY_SECONDS_MAX = 5.0
CALM_SECONDS_MAX = 10.0
ADOPTED = re.compile(r"adopted segments=(\d+) copies=(\d+) sessions=(\d+) damaged=(\d+) stale=(\d+)")


class Torture:
    """One daemon, its clients and the count of kills. Any broken promise is an AssertionError."""

    def __init__(self, house: House, seed: int) -> None:
        self.house = house
        self.random = Random(seed)
        self.kills = self.moving = self.checks = self.blocks_found = 0
        self.places: Counter[str] = Counter()
        self.ready_seconds_max = 0.0
        command = [sys.executable, "-m", "tests.faults.worker", str(house.socket)]
        self.workers = [
            subprocess.Popen([*command, str(seed * 10 + number), str(namespace)], stdin=-1, stdout=-1, text=True, cwd=ROOT)
            for number, namespace in enumerate(NAMESPACES)
        ]

    def close(self) -> None:
        """End the clients."""
        for worker in self.workers:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                assert pipe
                pipe.close()

    def run(self, kills: int, say: Callable[[Torture], None] | None = None, moving: int = 0) -> None:
        """Kill so many times, or up to twice as often until so many kills met transfers in flight (a busy machine lets few
        clients come back between kills), and check everything at the end; `say` is called after each.
        """
        while self.kills < kills or (self.moving < moving and self.kills < 2 * kills):
            self.one_kill()
            if self.random.random() < CHECK_SHARE:
                self.check(idle_kill=self.random.random() < IDLE_SHARE)
            if say:
                say(self)
        self.check(idle_kill=True)

    def one_kill(self) -> None:
        """Kill under load, sometimes during recovery too; the next life must be ready in time and find all that was left."""
        if self.random.random() < LOADED_SHARE:
            until(self.is_asked, "no client came back", BACK_SECONDS_MAX)
        time.sleep(self.random.uniform(0, LIFE_SECONDS_MAX))
        if self.random.random() < AIMED_SHARE:
            tier = self.random.choice(("cpu", "nvme"))
            with suppress(AssertionError):
                until(lambda: self.is_filling(tier), "nothing to aim at", AIM_SECONDS_MAX)
        remains, killed = self.kill()
        self.note("", remains)
        while self.random.random() < RECOVERY_SHARE:
            time.sleep(self.random.uniform(0, RECOVERY_SECONDS))
            was_ready = self.house.status() is not None
            remains, killed = self.kill()
            self.note("" if was_ready else "recovery", remains)
        self.expect(remains, killed)

    def is_asked(self) -> bool:
        """Whether the present life has been asked for blocks."""
        status = self.house.status()
        return status is not None and any(status["lookup_blocks"].values())

    def is_filling(self, tier: str) -> bool:
        """Whether slots of a tier are being filled."""
        status = self.house.status()
        return status is not None and status["tiers"][tier]["slots"].get("filling", 0) > 0

    def kill(self) -> tuple[Remains, float]:
        """Stop the holder, kill the daemon, read what it left, let the holder go on; returns when the kill was, too."""
        house = self.house
        assert house.process
        until(house.child, "the holder has started no daemon")
        os.kill(house.process.pid, signal.SIGSTOP)
        try:
            killed = time.monotonic()
            if child := house.child():
                with suppress(ProcessLookupError):
                    kill_process(child)
            remains = examine(house.process.pid, house.state / "nvme")
        finally:
            os.kill(house.process.pid, signal.SIGCONT)
        self.kills += 1
        return remains, killed

    def note(self, place: str, remains: Remains) -> None:
        """Count where a kill fell: every place where something was under way."""
        places = [place] if place else [place for place in PLACES if remains.places[place]]
        self.places.update(places or ["nothing under way"])
        self.moving += remains.moving and not place  # a life that never began leaves what was under way in the one before

    def expect(self, remains: Remains, killed: float) -> None:
        """The new life is ready in time and has kept exactly what was whole and rooted."""
        while not self.hello():
            assert time.monotonic() - killed < READY_SECONDS_MAX, f"not ready {READY_SECONDS_MAX} s after kill {self.kills}"
            time.sleep(0.005)
        self.ready_seconds_max = max(self.ready_seconds_max, time.monotonic() - killed)
        _, _, life = self.house.log.read_text().rpartition("restarting it with")
        found = ADOPTED.search(life)  # nothing is said where nothing was found
        _, copies, _, damaged, stale = map(int, found.groups()) if found else (0, 0, 0, 0, 0)
        expected = sum(map(len, remains.survivors().values()))
        assert (copies, damaged, stale) == (expected, 0, 0), (
            f"kill {self.kills}: kept {copies} of {expected}, {damaged} damaged"
        )
        self.within_limits(self.house.wait_ready())

    def hello(self) -> bool:
        """Whether a client can open a session."""
        try:
            client = RawClient(self.house.socket, model_of(0))
        except OSError:
            return False
        try:
            client.hello()
            client.ask("bye")
            return True
        except TierdError:
            return False
        finally:
            client.close()

    def within_limits(self, status: dict[str, Any]) -> None:
        """Bytes of each tier, by the daemon's account and by the file system's."""
        for name, tier in status["tiers"].items():
            assert tier["used_bytes"] <= tier["limit_bytes"], f"{name} uses {tier['used_bytes']} of {tier['limit_bytes']} bytes"
        on_disk = sum(file.stat().st_size for file in (self.house.state / "nvme").rglob("*/*") if file.exists())
        limit = status["tiers"]["nvme"]["limit_bytes"]
        assert on_disk <= limit, f"{on_disk} bytes on disk, the limit is {limit}"

    def check(self, idle_kill: bool) -> None:
        """With all clients idle: no wrong byte so far, no slot lost; after one more kill every block is found again."""
        reports = self.pause()
        for report in reports:
            assert not report.get("wrong") and not report["failures"].get("internal"), f"wrong bytes or a bug: {report}"
        status = until(self.calm, f"not calm: {self.house.status()}", CALM_SECONDS_MAX)
        self.within_limits(status)
        for name, tier in status["tiers"].items():
            segments = tier["used_bytes"] // SEGMENT_BYTES
            assert sum(tier["slots"].values()) == segments * SEGMENT_SLOTS, f"slots of {name} are lost: {tier}"
        until(lambda: self.holds_only_what_is_used(status), "the holder keeps more than is used", CALM_SECONDS_MAX)
        assert status["checksum_failures"] == 0, "a block was ready in a file before its bytes were there"
        assert not self.house.errors(), f"the daemon's log shows bugs: {self.house.log.read_text()[-5000:]}"
        self.checks += 1
        if idle_kill:
            remains, killed = self.kill()
            self.note("", remains)
            self.expect(remains, killed)
            self.find_all(remains)
        for worker in self.workers:
            tell(worker, "go")

    def holds_only_what_is_used(self, status: dict[str, Any]) -> bool:
        """Whether the holder has two descriptors a memory segment, one a session and one of the daemon itself."""
        assert self.house.process
        folder = f"/proc/{self.house.process.pid}/fd"
        kept = [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]
        memory = sum(target.startswith("/memfd:tierd-") for target in kept)
        processes = sum("pidfd" in target for target in kept)
        return memory * (SEGMENT_BYTES // 2) == status["tiers"]["cpu"]["used_bytes"] and processes == status["sessions"] + 1

    def pause(self) -> list[dict[str, Any]]:
        """Have the clients finish their turn; returns their counts."""
        for worker in self.workers:
            tell(worker, "pause")
        return [json.loads(worker.stdout.readline()) for worker in self.workers if worker.stdout]

    def calm(self) -> dict[str, Any] | None:
        """The status, once everything is written and nothing is held."""
        with suppress(TierdError):
            self.house.sync()
            status = self.house.wait_ready()
            states = [tier["slots"] for tier in status["tiers"].values()]
            if not any(slots[state] for slots in states for state in ("filling", "retired", "quarantined")):
                return status
        return None

    def find_all(self, remains: Remains) -> None:
        """Every chain's prefix is as long as what NVMe had of it, but for what was evicted since: a new life writes back."""
        survivors = remains.survivors()
        missing = 0
        for namespace in sorted(set(NAMESPACES)):
            client = RawClient(self.house.socket, model_of(namespace))
            name = client.hello()["namespace"]
            for hashes in universe():
                reply = client.ask("lookup", hashes=hashes)
                if reply["lease"]:
                    client.ask("release", lease=reply["lease"])
                found = reply["tiers"]["cpu"] + reply["tiers"]["nvme"]
                least, most = (prefix(name, hashes, kept) for kept in (survivors["nvme"], set().union(*survivors.values())))
                assert found <= most, f"{found} blocks of a chain are found again, {most} were left"
                missing += max(0, least - found)
                self.blocks_found += found
            client.ask("bye")
            client.close()
        evicted = sum(number for kind, number in self.house.wait_ready()["evicted_blocks"].items() if kind.startswith("nvme"))
        assert missing <= SHARED_BY * evicted, f"{missing} blocks are not found again, {evicted} were evicted since"

    def __str__(self) -> str:
        width = 40
        lines = [
            f"{self.kills} kills, {self.moving} with transfers in flight, ready again in at most {self.ready_seconds_max:.2f} s"
        ]
        lines += [f"{self.checks} checks, {self.blocks_found} blocks looked for and found"]
        for place in PLACES:
            count = self.places[place]
            lines.append(f"  {place:24}{count:5}  {'#' * round(width * count / max(1, self.kills))}")
        return "\n".join(lines)


def prefix(namespace: bytes, hashes: bytes, kept: set[bytes]) -> int:
    """How many leading blocks of a chain were kept."""
    return [*(namespace + block in kept for block in split(hashes)), False].index(False)


def tell(worker: subprocess.Popen[str], word: str) -> None:
    """Send a word to a worker."""
    assert worker.stdin
    worker.stdin.write(word + "\n")
    worker.stdin.flush()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.torture", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tierd-", dir="/tmp")))
        house = stack.enter_context(House(folder, nvme__io_threads=IO_THREADS))
        torture = Torture(house, options.seed)
        stack.callback(torture.close)
        started = time.monotonic()
        torture.run(options.kills, lambda t: print(f"\r{t.kills} kills", end="", file=sys.stderr, flush=True))
        print(f"\n{torture}")
        for report in torture.pause():
            print(json.dumps(report))
        print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
