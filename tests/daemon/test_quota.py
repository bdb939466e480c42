"""`tierd quota`: two namespaces on a real daemon, one promised what it has, one limited; over restarts too."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import LAYOUT, SEGMENT_BYTES, SLOTS, Daemon, hashes_of
from tierd.cli import FAILED, OK, USAGE
from tierd.errors import Gone, Invalid
from tierd.tiers.segment import Geometry

SEGMENT = Geometry.fit(LAYOUT, SEGMENT_BYTES).total_bytes
QUIET, GREEDY = "quiet", "greedy"


def quota(daemon: Daemon, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What the command says, by namespace and tier."""
    done = daemon.run("quota", *arguments, "--json")
    assert (done.returncode, done.stderr) == (OK, "")
    return {(row["namespace"], row["tier"]): row for row in json.loads(done.stdout)["quotas"]}


def name_of(daemon: Daemon, model: str) -> str:
    """The id of the namespace of a model."""
    return str(next(one["id"] for one in daemon.status()["namespaces"] if one["model"] == model))


def test_a_greedy_neighbour_leaves_what_was_promised_and_stays_in_its_maximum(daemon: Daemon) -> None:
    """It stores many times what it may have: the quiet one still has every block, in memory, also after a restart."""
    kept = hashes_of(1, 2 * SLOTS)
    with daemon.peer(model=QUIET) as quiet:
        assert quiet.store(kept) == 2 * SLOTS
    promised = name_of(daemon, QUIET)
    has = quota(daemon)[promised, "cpu"]["used"]
    quota(daemon, promised, "--tier", "cpu", "--min", str(has))
    for life in range(2):
        with daemon.peer(model=GREEDY) as greedy:
            limited = name_of(daemon, GREEDY)
            if not life:
                quota(daemon, limited, "--tier", "nvme", "--max", str(3 * SEGMENT))
            for seed in range(2, 22):
                assert greedy.store(hashes_of(life * 100 + seed, SLOTS)) > 0
                daemon.ask("sync")
        found = quota(daemon)
        assert found[promised, "cpu"]["min"] == has
        assert life or found[promised, "cpu"]["used"] == has
        assert found[limited, "nvme"]["used"] == found[limited, "nvme"]["max"] == 3 * SEGMENT
        for tier, about in daemon.status()["tiers"].items():
            assert about["used_bytes"] == sum(row["used"] for (_, name), row in found.items() if name == tier)
        with daemon.peer(model=QUIET) as quiet:
            reply = quiet.lookup(kept)
            assert reply["tiers"]["cpu" if not life else "nvme"] == 2 * SLOTS
        if not life:
            assert daemon.stop() == 0
            daemon.start()


def test_a_lower_maximum_is_asked_about_and_then_holds(daemon: Daemon) -> None:
    """Without --yes nothing is done and the command says what would go; with it bytes are given back."""
    with daemon.peer() as peer:
        assert peer.store(hashes_of(1, 4 * SLOTS)) == 4 * SLOTS
    name = name_of(daemon, "model")
    done = daemon.run("quota", name, "--tier", "cpu", "--max", str(SEGMENT))
    assert done.returncode == USAGE
    assert f"{name[:16]} has " in done.stderr and "say --yes" in done.stderr
    assert quota(daemon)[name, "cpu"]["max"] == 0
    quota(daemon, name, "--tier", "cpu", "--max", str(SEGMENT), "--yes")
    daemon.wait_until(lambda status: status["tiers"]["cpu"]["used_bytes"] == SEGMENT)
    page = daemon.run("quota", name[:8]).stdout.splitlines()
    assert page[0].split() == ["namespace", "tier", "used", "min", "max"]
    assert [line.split()[:2] for line in page[1:]] == [[name[:16], "cpu"], [name[:16], "nvme"]]
    assert quota(daemon, name, "--tier", "cpu", "--max", "0")[name, "cpu"]["max"] == 0


def test_a_namespace_that_is_not_served_keeps_its_quota(start: Start) -> None:
    """In a life in which nobody has named it yet, it is listed, and can be cleared."""
    daemon = start(nvme_bytes=0)
    with daemon.peer():
        name = name_of(daemon, "model")
        quota(daemon, name, "--tier", "cpu", "--min", str(SEGMENT), "--max", str(2 * SEGMENT))
    daemon.stop()
    daemon.start()
    row = {"namespace": name, "tier": "cpu", "min": SEGMENT, "max": 2 * SEGMENT, "used": 0}
    assert quota(daemon) == {(name, "cpu"): row}
    with daemon.peer() as peer:
        for seed in range(1, 9):
            peer.store(hashes_of(seed, SLOTS))
        assert quota(daemon)[name, "cpu"]["used"] == 2 * SEGMENT
    quota(daemon, name[:6], "--tier", "cpu", "--min", "0", "--max", "0")
    daemon.stop()
    daemon.start()
    assert quota(daemon) == {}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"min": 1, "tier": "cpu"}, Invalid, "which namespace, and which tier of cpu, nvme"),
        ({"min": 1}, Invalid, "which namespace"),
        ({"min": SEGMENT, "tier": "tape", "namespace": "known"}, Invalid, "which tier"),
        ({"min": 1, "tier": "cpu", "namespace": "known"}, Invalid, "less than a segment"),
        ({"max": SEGMENT - 1, "tier": "cpu", "namespace": "known"}, Invalid, "less than a segment"),
        ({"min": 2 * SEGMENT, "max": SEGMENT, "tier": "cpu", "namespace": "known"}, Invalid, "over the maximum"),
        ({"min": 5 * SEGMENT_BYTES, "tier": "cpu", "namespace": "known"}, Invalid, "cannot be promised"),
        ({"min": SEGMENT, "tier": "cpu", "namespace": "0000"}, Gone, "no namespace begins with"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(
    daemon: Daemon, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    """The answer says what is wrong with it, and nothing has changed."""
    with daemon.peer():
        name = name_of(daemon, "model")
        known = {"namespace": name} if arguments.get("namespace") == "known" else {}
        with pytest.raises(error, match=says):
            daemon.ask("quota", **{**arguments, **known})
        assert all(row["min"] == row["max"] == 0 for row in quota(daemon).values())


def test_bounds_need_a_namespace_and_a_tier(daemon: Daemon) -> None:
    """2 for a command line that says too little, 1 for a namespace that is not there."""
    assert daemon.run("quota", "--min", "1GiB").returncode == USAGE
    assert daemon.run("quota", "--min", "much").returncode == USAGE
    assert daemon.run("quota", "0000").returncode == FAILED
    assert daemon.run("quota").stdout == "no namespace was opened yet, and none has a quota\n"
