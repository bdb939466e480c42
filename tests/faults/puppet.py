"""A client process on strings: it does one step when told, and stops, is killed or forks wherever a test likes.

`python -m tests.faults.puppet SOCKET MODEL UID` (another user's id, or 0 for none) reads one JSON list (a method and
its arguments) per line and answers with one JSON value.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.content import chain, fill, payload, wrong
from tests.faults.house import LAYOUT, ROOT, kill_process
from tests.faults.raw import RawClient
from tierd.block import split
from tierd.client import Client
from tierd.wire.messages import READING, WRITING


class Puppet:
    """The test's end of a puppet: `do("store", "name", 8)` returns what `Stage.store` does."""

    def __init__(self, path: Path, *steps: tuple[Any, ...], model: str = "faults", uid: int = 0) -> None:
        command = [sys.executable, "-m", "tests.faults.puppet", str(path), model, str(uid)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for step in steps:
            self.do(*step)

    def __enter__(self) -> Puppet:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()

    def do(self, *step: Any) -> Any:
        """Take one step and return its result."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(step) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the puppet died at {step}"
        return json.loads(answer)

    def kill(self) -> None:
        """SIGKILL, as the out-of-memory killer does it."""
        if self.process.poll() is None:
            kill_process(self.process.pid)
            self.process.wait()


class Stage:
    """What a puppet can do."""

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, model
        self.hashes, self.lease, self.told = b"", 0, [-1]

    @cached_property
    def client(self) -> RawClient:
        """A client by hand."""
        return RawClient(self.path, self.model)

    @cached_property
    def engine(self) -> Client:
        """The library that engines use."""
        return Client(self.path, model=self.model, layout=LAYOUT, deadline_seconds=5.0)

    def connect(self) -> bool:
        """Open a connection, and say nothing."""
        return self.client.socket.fileno() >= 0

    def hello(self) -> int:
        """Open the session."""
        return int(self.client.hello()["slots_per_segment"])

    def store(self, name: str, blocks: int) -> list[int]:
        """Take slots for a chain."""
        self.hashes = chain(name, blocks)
        self.lease, self.told = self.client.store(self.hashes)
        return self.told

    def fill(self, flavour: int, blocks: int) -> None:
        """Write the first blocks of the chain into the slots that were told, whoever has them now."""
        for block, slot in list(zip(split(self.hashes), self.told, strict=True))[:blocks]:
            if slot >= 0:
                self.client.slot(slot)[:] = payload(block, self.client.layout.block_bytes, flavour)

    def commit(self) -> int:
        """Publish what was written."""
        return int(self.client.ask("commit", lease=self.lease)["committed"])

    def lookup(self, name: str, blocks: int) -> list[int]:
        """Lease a chain; returns how many blocks there are and how many can be read at once."""
        self.hashes = chain(name, blocks)
        self.lease, found, self.told = self.client.lookup(self.hashes)
        return [found, len(self.told)]

    def load(self, first: int, count: int) -> int:
        """Wait for blocks of the lease; returns how many came."""
        return int(self.client.ask("load", lease=self.lease, first=first, count=count)["count"])

    def ask_to_load(self, first: int, count: int) -> None:
        """The same without waiting for the answer."""
        self.client.send({"id": 77, "verb": "load", "lease": self.lease, "first": first, "count": count})

    def spoiled(self) -> int:
        """How many of the slots that were told do not hold their blocks now."""
        pairs = zip(split(self.hashes), self.told, strict=False)
        size = self.client.layout.block_bytes
        return sum(bool((self.client.slot(slot) != payload(block, size)).any()) for block, slot in pairs)

    def release(self) -> None:
        """Give the reading lease back."""
        self.client.ask("release", lease=self.lease)

    def resume(self, kind: str) -> int:
        """Connect again, holding on to what was told ("reading", "writing") or not ("nothing")."""
        kinds = {"reading": READING, "writing": WRITING}
        held = self.client.held([slot for slot in self.told if slot >= 0], kinds[kind]) if kind in kinds else []
        self.client.close()
        self.client.connect()
        self.lease = self.client.resume(held)
        return self.lease

    def disconnect(self) -> None:
        """Lose the connection."""
        self.client.close()

    def work(self, name: str, chains: int, blocks: int, flavour: int) -> list[int]:
        """Load chains as an engine does and store what is missing; returns blocks had, of them wrong, and refused."""
        had = bad = refused = 0
        pool = np.empty((blocks, LAYOUT.block_bytes), np.uint8)
        pages = list(range(blocks))
        for number in range(chains):
            hashes = chain(f"{name} {number}", blocks)
            hits = self.engine.load(hashes, pool, pages)
            had, bad = had + hits, bad + len(wrong(pool, hashes, hits, flavour))
            fill(pool, hashes, flavour)
            refused += self.engine.store(hashes, pool, pages).refused
        return [had, bad, refused]

    def fork(self) -> int:
        """Leave a child that has the sockets and mappings open, and does nothing; returns its pid."""
        child = os.fork()
        if child == 0:
            for descriptor in (0, 1):
                os.close(descriptor)
            signal.pause()
            os._exit(0)
        return child


def main() -> None:
    """Obey until standard input ends."""
    stage = Stage(Path(sys.argv[1]), sys.argv[2])
    if uid := int(sys.argv[3]):
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(stage, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
