"""`tierd pin` and `unpin`, and pins of clients: on a real daemon, under pressure, over restarts."""

from __future__ import annotations

import json
from typing import Any

from tests.daemon.conftest import Start
from tests.daemon.harness import SLOTS, Daemon, Wire, hashes_of
from tierd.cli import FAILED, OK, USAGE

KEPT = hashes_of(1, SLOTS // 2)
LAST = KEPT[-32:].hex()


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
        assert pinned(daemon, "pin", name, LAST) == {LAST: {"cpu": SLOTS // 2}}
        press(wire, 1)
        assert wire.load(KEPT) == SLOTS // 2
        assert daemon.run("pin", name).stdout == f"{LAST}  {SLOTS // 2} blocks in cpu\n"
        assert pinned(daemon, "unpin", name, LAST) == {}
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
        both = {LAST: {"cpu": SLOTS // 2, "nvme": SLOTS // 2}}
        assert pinned(daemon, "pin", name, LAST) == both
    daemon.kill()
    assert pinned(daemon, "pin", name) == both
    with daemon.peer() as wire:
        press(wire, 1)
        assert wire.lookup(KEPT)["tiers"]["cpu"] == SLOTS // 2
    daemon.stop()
    daemon.start()
    assert pinned(daemon, "pin", name) == {LAST: {"cpu": 0, "nvme": SLOTS // 2}}
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
            (["unpin", name, LAST], FAILED, "is not pinned"),
            (["pin", name, hashes_of(2, 2 * SLOTS)[-32:].hex()], FAILED, "policy.pinned_share"),
            (["pin", name, "abcd"], USAGE, "64 hexadecimal digits"),
            (["pin", "0000", LAST], FAILED, "no namespace begins with"),
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
    (daemon.state / "pins.json").write_text(json.dumps({"pins": {name: ["00" * 32], "11" * 32: [LAST]}}))
    daemon.start()
    assert "is not known here" in daemon.log and "nothing of its namespace is left" in daemon.log
    assert pinned(daemon, "pin", name) == {}
    daemon.stop()
    (daemon.state / "pins.json").write_text("not JSON")
    daemon.start()
    assert "what was pinned is not known" in daemon.log and pinned(daemon, "pin", name) == {}
