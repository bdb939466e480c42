"""docs/promises.md: what holds when something fails, how that is tried, and what the last `make promises` has seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

HEAD = """\
<!-- Made by `make promises` from pages/promises.py and benchmarks/results/promises.json, which the tests write. -->
# What is promised when something fails

Every figure below was written by the tests that are named beside it, in the run of {date} on a machine with {cores} cores,
{memory_gib} GiB and Linux {kernel} (Python {python}): counts and times of one run, no averages, and the machine may have had
other work. `make promises` runs them again and makes this page; it makes none after a run in which a test failed. Of every
change it is asked that these tests pass, not that the figures stay. In the tests of the service the engine is a client that
stores, loads and checks every byte (`tests/ops/load.py`): neither vLLM nor `tierd-engine` has been run beside it.
"""
TAIL = """\
## What is not promised

- **Memory over a stop.** `systemctl stop` and a reboot lose the memory tiers; what was drained to NVMe is a hit again.
- **A hit.** tierd is a cache: the coldest blocks go when room is needed, and everything that goes wrong is a miss.
- **Secrecy from root, and from users of the same trust domain.** See [security](security.md).
- **GPU memory.** None of the tests above has a GPU.
"""


class Promise(NamedTuple):
    """A row: what is promised, the file of the tests that try it, and what they have seen; figures are filled in by name."""

    event: str
    promise: str
    tests: str
    seen: str = ""
    note: str = ""
    """The name under which the tests have noted the figures of `seen`."""


LIFE = "{blocks} committed blocks asked for, {lost} lost, {misses} misses while nobody answered; ready in {seconds} s"
PROMISES = (
    Promise(
        "`systemctl restart` under load",
        "no call of an engine fails, no byte is wrong, committed blocks in memory are hits again",
        "tests/ops/test_systemd.py",
        LIFE,
        "restart",
    ),
    Promise("`kill -9` under load", "the same", "tests/ops/test_systemd.py", LIFE, "kill -9"),
    Promise("the event loop hangs", "the watchdog ends it; then the same", "tests/ops/test_systemd.py", LIFE, "watchdog"),
    Promise(
        "`kill -9` with a large memory tier",
        "served again within 5 s",
        "tests/ops/test_systemd.py",
        "{gib} GiB, {blocks} blocks, all found; ready in {seconds} s",
        "warm start",
    ),
    Promise("start with nothing", "ready within 1 s", "tests/ops/test_systemd.py", "{seconds} s", "empty start"),
    Promise(
        "`systemctl stop`, then `start`",
        "what was committed comes back from NVMe",
        "tests/ops/test_systemd.py",
        "{blocks} blocks, all found",
        "stop and start",
    ),
    Promise(
        "`kill -9` at random moments",
        "no wrong byte, no slot lost, no block lost that was whole",
        "tests/faults/test_torture.py",
        "{kills} kills, {moving} with transfers in flight; {blocks} blocks looked for and found; ready within {seconds} s",
        "torture",
    ),
    Promise(
        "the service itself is attacked",
        "exposure by `systemd-analyze security` at most 1.6 (0 is best)",
        "tests/ops/test_systemd.py",
        "{score}",
        "exposure",
    ),
    Promise("dying at each write call of a store", "nothing that was answered is lost", "tests/faults/test_write_calls.py"),
    Promise("a bit flips on NVMe", "a miss, counted; never served", "tests/faults/test_flipped_bits.py"),
    Promise(
        "`kill -9` at any call of a purge",
        "what was answered for comes back in no later life",
        "tests/faults/test_purge.py",
    ),
    Promise("a block is damaged, and nobody asks", "a scrub finds it and gives it up", "tests/faults/test_scrub.py"),
    Promise(
        "the disk of the service is full for a while",
        "no call of an engine fails; an alert fires, and is over with room again; then all comes to NVMe",
        "tests/ops/test_systemd.py",
        "alert after {fired} s, over after {resolved} s; {blocks} blocks found after stop and start",
        "full disk",
    ),
    Promise("the disk is full", "reads go on, new blocks replace the coldest", "tests/faults/test_full_disk.py"),
    Promise("the disk is slow", "no store waits for it; the coldest go unwritten", "tests/faults/test_slow_disk.py"),
    Promise("the daemon is away", "every call is a miss in time; engines need no restart", "tests/faults/test_daemon_away.py"),
    Promise("an engine dies", "what it held is free at once", "tests/faults/test_clients_die.py"),
    Promise(
        "a slot is read while it should go", "it is not reused before its reader lets go", "tests/faults/test_ownership.py"
    ),
    Promise("an engine gives nothing back", "others get memory all the same", "tests/faults/test_handover.py"),
    Promise("another user connects", "blocks of trust domains never cross", "tests/faults/test_two_users.py"),
)


def page(results: dict[str, Any]) -> str:
    """The document; raises ValueError where a test has failed, or has not run."""
    if results["failed"]:
        raise ValueError(f"tests have failed, there is nothing to promise: {', '.join(results['failed'])}")
    if untried := [promise.note for promise in PROMISES if promise.note and promise.note not in results["figures"]]:
        raise ValueError(f"nothing was noted of {', '.join(untried)}: these tests were skipped, or have another name")
    return "\n".join((HEAD.format(date=results["date"], **results["machine"]), *rows(results), "", TAIL))


def rows(results: dict[str, Any]) -> Iterator[str]:
    """The table."""
    yield "| what happens | what holds | seen | tests |\n|---|---|---|---|"
    for promise in PROMISES:
        figures = {name: f"{value:,}" for name, value in results["figures"].get(promise.note, {}).items()}
        seen, passed = promise.seen.format(**figures), results["passed"][promise.tests]
        yield f"| {promise.event} | {promise.promise} | {seen} | `{promise.tests}`: {passed} passed |"
