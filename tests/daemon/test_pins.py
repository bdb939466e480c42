"""`tierd pin` and `unpin`, and pins of clients: on a real daemon, under pressure, over restarts."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import LAYOUT, SLOTS, Daemon, Wire, hashes_of
from tierd.cli import FAILED, OK, USAGE
from tierd.client import Client
from tierd.errors import Invalid

KEPT = hashes_of(1, SLOTS // 2)
LAST = KEPT[-32:]


def pinned(daemon: Daemon, *arguments: str) -> dict[str, dict[str, int]]:
    """What `tierd pin` says: blocks by tier, of each chain's last block."""
    done = daemon.run(*arguments, "--json")
    assert (done.returncode, done.stderr) == (OK, "")
    return {pin["block"]: pin["blocks"] for pin in json.loads(done.stdout)["pins"]}


def press(wire: Wire, life: int) -> None:
    """Store many times what the tier has."""
    for seed in range(2, 20):
        wire.store(hashes_of(1000 * life + seed, 2 * SLOTS))


def commit_pinned(wire: Wire, hashes: bytes) -> dict[str, Any]:
    """Store blocks, and have their chain pinned with the commit."""
    lease, _ = wire.place(hashes)
    return wire.ask("commit", lease=lease, pin=True)


def test_a_pinned_prompt_is_there_after_everything_else_has_gone(start: Start) -> None:
    """It is in memory however much is stored; when it is unpinned it goes like everything else."""
    daemon = start(nvme_bytes=0)
    with daemon.peer() as wire:
        wire.store(KEPT)
        name = daemon.status()["namespaces"][0]["id"][:16]
        assert pinned(daemon, "pin", name, LAST.hex()) == {LAST.hex(): {"cpu": SLOTS // 2}}
        press(wire, 1)
        assert wire.load(KEPT) == SLOTS // 2
        assert daemon.run("pin", name).stdout == f"{LAST.hex()}  {SLOTS // 2} blocks in cpu\n"
        assert pinned(daemon, "unpin", name, LAST.hex()) == {}
        press(wire, 2)
        assert wire.load(KEPT) == 0
        assert daemon.run("pin", name).stdout == "nothing is pinned\n"


def test_a_pin_outlives_the_daemon_where_its_blocks_do(start: Start) -> None:
    """After kill -9 with memory kept it is in cpu again, after a stop and a start on nvme, and no life evicts it."""
    daemon = start(held=True)
    with daemon.peer() as wire:
        wire.store(KEPT)
        daemon.ask("sync")
        name = daemon.status()["namespaces"][0]["id"]
        both = {LAST.hex(): {"cpu": SLOTS // 2, "nvme": SLOTS // 2}}
        assert pinned(daemon, "pin", name, LAST.hex()) == both
    daemon.kill()
    assert pinned(daemon, "pin", name) == both
    with daemon.peer() as wire:
        press(wire, 1)
        assert wire.lookup(KEPT)["tiers"]["cpu"] == SLOTS // 2
    daemon.stop()
    daemon.start()
    assert pinned(daemon, "pin", name) == {LAST.hex(): {"cpu": 0, "nvme": SLOTS // 2}}
    with daemon.peer() as wire:
        for seed in range(2, 40):
            wire.store(hashes_of(2000 + seed, SLOTS))
            daemon.ask("sync")
        assert wire.load(KEPT) == SLOTS // 2


def test_a_client_pins_what_it_commits_within_the_budget(start: Start) -> None:
    """The answer says how many blocks are pinned. What is over the budget is committed and not pinned, and is counted."""
    daemon = start(nvme_bytes=0)
    with daemon.peer() as wire:
        assert commit_pinned(wire, KEPT)["pinned"] == SLOTS // 2
        reply = commit_pinned(wire, hashes_of(2, 2 * SLOTS))
        assert (reply["committed"], reply["pinned"]) == (2 * SLOTS, 0)
        assert wire.ask("stats")["counters"]["pin_refused"] == 1
        lease, _ = wire.place(hashes_of(3, 1))
        assert "pinned" not in wire.ask("commit", lease=lease)
        press(wire, 1)
        assert wire.load(KEPT) == SLOTS // 2


def test_what_a_request_keeps_is_there_until_its_time_is_over(start: Start) -> None:
    """However much is stored in between. The list says until when; then it goes like everything else."""
    daemon = start(nvme_bytes=0)
    with daemon.peer() as wire:
        wire.store(KEPT)
        before = time.time()
        assert wire.ask("keep", block=LAST, ttl_ms=3_600_000, priority=4)["kept"] == SLOTS // 2
        name = daemon.status()["namespaces"][0]["id"]
        (pin,) = json.loads(daemon.run("pin", name, "--json").stdout)["pins"]
        assert pin["priority"] == 4 and before + 3600 <= pin["until"] / 1000 + 0.001 <= time.time() + 3600.001
        assert "priority 4" in daemon.run("pin", name).stdout
        press(wire, 1)
        assert wire.load(KEPT) == SLOTS // 2
        other = hashes_of(999, 1)
        wire.store(other)
        wire.ask("keep", block=other, ttl_ms=1)
        daemon.wait_until(lambda _: other.hex() not in pinned(daemon, "pin", name))
        assert LAST.hex() in pinned(daemon, "pin", name)


def test_what_cannot_be_kept_is_no_error(start: Start) -> None:
    """A chain that is not there, or is larger than what pins may hold: 0 blocks. A time or priority that cannot be is one."""
    daemon = start(nvme_bytes=0)
    with daemon.peer() as wire:
        assert wire.ask("keep", block=LAST, ttl_ms=1000)["kept"] == 0
        large = hashes_of(2, 2 * SLOTS)
        wire.store(large)
        assert wire.ask("keep", block=large[-32:], ttl_ms=1000, priority=100)["kept"] == 0
        for wrong in ({"ttl_ms": 0}, {"ttl_ms": 604_800_001}, {"ttl_ms": 1, "priority": 101}):
            with pytest.raises(Invalid):
                wire.ask("keep", block=LAST, **wrong)


def test_what_is_kept_outlives_the_daemon_for_as_long(start: Start) -> None:
    """After kill -9 it has the same priority and end as before; the file has it after seconds."""
    daemon = start(held=True)
    with daemon.peer() as wire:
        wire.store(KEPT)
        wire.ask("keep", block=LAST, ttl_ms=3_600_000, priority=4)
        name = daemon.status()["namespaces"][0]["id"]
        (before,) = json.loads(daemon.run("pin", name, "--json").stdout)["pins"]
        daemon.wait_until(lambda _: (daemon.state / "pins.json").exists())
    daemon.kill()
    with daemon.peer():
        (after,) = json.loads(daemon.run("pin", name, "--json").stdout)["pins"]
        assert [after[key] for key in ("block", "until", "priority")] == [before[key] for key in ("block", "until", "priority")]


def test_a_stop_notes_what_is_kept_by_then(start: Start) -> None:
    """Also what was asked for just before; an end that is further away than one can be is cut."""
    daemon = start()
    with daemon.peer() as wire:
        wire.store(KEPT)
        daemon.ask("sync")
        name = daemon.status()["namespaces"][0]["id"]
        for block in (KEPT[:32], LAST):
            wire.ask("keep", block=block, ttl_ms=3_600_000)
            daemon.wait_until(lambda _: (daemon.state / "pins.json").exists())
    daemon.stop()
    assert len(json.loads((daemon.state / "pins.json").read_text())["kept"][name]) == 2
    (daemon.state / "pins.json").write_text(json.dumps({"pins": {}, "kept": {name: {LAST.hex(): [3, 10**15]}}}))
    daemon.start()
    (pin,) = json.loads(daemon.run("pin", name, "--json").stdout)["pins"]
    assert pin["until"] / 1000 <= time.time() + 604_800


def test_the_client_keeps_what_it_stored(start: Start) -> None:
    """The library's call does what the verb does, and refuses what the daemon would refuse."""
    daemon = start(nvme_bytes=0)
    with Client(daemon.socket, model="model", layout=LAYOUT, deadline_seconds=10) as client:
        pool = np.zeros((1, LAYOUT.block_bytes), np.uint8)
        assert client.store(KEPT, pool, [0] * (SLOTS // 2)).stored == SLOTS // 2
        client.keep(LAST, 60, priority=1)
        client.keep(hashes_of(5, 1), 60)
        name = daemon.status()["namespaces"][0]["id"]
        daemon.wait_until(lambda _: pinned(daemon, "pin", name) == {LAST.hex(): {"cpu": SLOTS // 2}})
        with pytest.raises(Invalid, match="seconds must be"):
            client.keep(LAST, 0)


def test_another_namespace_takes_no_segment_that_has_pins(start: Start) -> None:
    """It takes over the others, and lives in these; an idle namespace keeps what is pinned."""
    daemon = start(nvme_bytes=0)
    with daemon.peer(model="quiet") as quiet:
        assert commit_pinned(quiet, KEPT)["pinned"] == SLOTS // 2
    with daemon.peer(model="busy") as busy:
        press(busy, 1)
    with daemon.peer(model="quiet") as quiet:
        assert quiet.load(KEPT) == SLOTS // 2


def test_a_purge_ends_pins_for_every_later_life(start: Start) -> None:
    """Nothing is held back by them, and nothing of them is back after a restart."""
    daemon = start()
    with daemon.peer() as wire:
        assert commit_pinned(wire, KEPT)["pinned"] == SLOTS // 2
        name = daemon.status()["namespaces"][0]["id"]
        assert daemon.ask("purge", namespace=name)["blocks"] == SLOTS // 2
        assert pinned(daemon, "pin", name) == {}
        wire.store(KEPT)
    daemon.stop()
    daemon.start()
    assert pinned(daemon, "pin", name) == {}


def test_a_pin_that_cannot_be_is_refused(start: Start) -> None:
    """1 for a chain that is not there, and for one that would hold too much; 2 for what is no hash."""
    daemon = start(nvme_bytes=0)
    with daemon.peer() as wire:
        wire.store(KEPT)
        wire.store(hashes_of(2, 2 * SLOTS))
        name = daemon.status()["namespaces"][0]["id"]
        for arguments, code, says in (
            (["pin", name, "00" * 32], FAILED, "is not known here"),
            (["unpin", name, LAST.hex()], FAILED, "is not pinned"),
            (["pin", name, hashes_of(2, 2 * SLOTS)[-32:].hex()], FAILED, "policy.pinned_share"),
            (["pin", name, "abcd"], USAGE, "64 hexadecimal digits"),
            (["pin", "0000", LAST.hex()], FAILED, "no namespace begins with"),
        ):
            done = daemon.run(*arguments)
            assert done.returncode == code and says in done.stderr
        assert pinned(daemon, "pin", name) == {}


def test_what_was_pinned_and_is_not_known_costs_no_start(start: Start) -> None:
    """A damaged file, or one that names what is gone: the daemon serves, and the log says that pins are lost."""
    daemon = start()
    with daemon.peer() as wire:
        wire.store(KEPT)
        name = daemon.status()["namespaces"][0]["id"]
    daemon.stop()
    (daemon.state / "pins.json").write_text(json.dumps({"pins": {name: ["00" * 32], "11" * 32: [LAST.hex()]}}))
    daemon.start()
    assert "is not known here" in daemon.log and "nothing of its namespace is left" in daemon.log
    assert pinned(daemon, "pin", name) == {}
    daemon.stop()
    for damaged in ("not JSON", f'{{"pins": {{}}, "kept": {{"{name}": {{"{LAST.hex()}": [1, Infinity]}}}}}}', "[" * 100_000):
        (daemon.state / "pins.json").write_text(damaged)
        daemon.start()
        assert "what was pinned is not known" in daemon.log and pinned(daemon, "pin", name) == {}
        daemon.stop()
