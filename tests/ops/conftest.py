"""A booted machine for all tests of the run, and in it an installed service that begins anew in each test."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ops.machine import DISK, Machine, Unit, booted

UNITS = ("tierd.service", "tierd.socket", "tierd-metrics.socket")
MEMORY = '[cpu]\nbytes = "1GiB"\n[nvme]\nbytes = 0'


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """Debian with systemd, in which `tierd install-service` was run."""
    with booted() as up:
        up.run(str(up.tierd), "install-service")
        yield up


@pytest.fixture
def unit(machine: Machine) -> Iterator[Unit]:
    """The service, stopped and without a past, with a cpu tier of 1 GiB and nothing below it; a failure shows its journal."""
    fresh = Unit(machine)
    fresh.configure(MEMORY)
    machine.run("systemctl", "start", *UNITS[1:])
    yield fresh
    print(machine.journal("--lines=40"))
    machine.run("systemctl", "stop", *UNITS)
    machine.run("systemctl", "reset-failed")
    machine.run("sh", "-c", f"rm -rf /run/systemd/system/tierd.service.d /var/lib/tierd/* {DISK}/nvme")
    machine.run("systemctl", "daemon-reload")


class Program:
    """A module of these tests that runs in the machine, and answers each line with one line of JSON."""

    def __init__(self, machine: Machine, *arguments: str) -> None:
        command = machine.enter(str(machine.tierd.with_name("python")), "-m", *arguments)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")

    def ask(self, line: str) -> Any:
        """Its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Load(Program):
    """The program of `load.py`; one method for each of its commands."""

    def __init__(self, machine: Machine, chains: int, deadline_seconds: float) -> None:
        super().__init__(machine, "tests.ops.load", f"--chains={chains}", f"--deadline={deadline_seconds}")

    def run(self) -> None:
        """Store and load in the background."""
        self.ask("run")

    def pause(self) -> dict[str, Any]:
        """Stop that; its sums."""
        return dict(self.ask("pause"))

    def fill(self) -> int:
        """Store every chain once; how many blocks are committed."""
        return int(self.ask("fill"))

    def check(self) -> dict[str, Any]:
        """Load all that was committed."""
        return dict(self.ask("check"))


@pytest.fixture
def load(machine: Machine) -> Iterator[Callable[..., Load]]:
    """Makes live engines, and ends them."""
    made: list[Load] = []

    def make(chains: int = 40, deadline_seconds: float = 1.0) -> Load:
        made.append(Load(machine, chains, deadline_seconds))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.fixture
def talk(machine: Machine) -> Iterator[Program]:
    """A real engine, `talk.py`."""
    engine = Program(machine, "tests.ops.talk")
    yield engine
    engine.end()
