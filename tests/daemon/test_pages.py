"""An engine whose pages are the daemon's slots: the client's `PageClient` against a real daemon."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.cuda.build import environ, load
from tests.daemon.conftest import Start
from tests.daemon.harness import LAYOUT, SEGMENT_BYTES, SLOTS, Daemon, hashes_of, payload_of
from tierd.block import ROOT
from tierd.client import Client
from tierd.client.pages import Asked, Named, PageClient, PageLookup
from tierd.clock import monotonic_seconds
from tierd.cuda import DeviceArray
from tierd.errors import Invalid
from tierd.tiers.paths import download, upload

PATIENCE_SECONDS = 20.0
PRIVATE = 4
Connect = Callable[..., PageClient]
A = TypeVar("A", bound=Asked)


@pytest.fixture(params=["cpu", "cuda:0"], autouse=True)
def device(request: pytest.FixtureRequest) -> str:
    """Where the gpu tier is: in host memory, and in that of a GPU which is emulated, for this process and for daemons."""
    if request.param != "cpu":
        load(request.getfixturevalue("emulation"))
    return request.param


@pytest.fixture
def gpu(device: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a daemon with two gpu segments."""
    sizes = {"gpu_bytes": 2 * SEGMENT_BYTES, "gpu_segment_bytes": SEGMENT_BYTES, "gpu_device": device}
    return sizes if device == "cpu" else sizes | {"environ": environ(request.getfixturevalue("emulation"))}


@pytest.fixture
def paged(start: Start, gpu: dict[str, Any]) -> Daemon:
    """A daemon with two gpu segments above four of cpu and sixteen of nvme."""
    return start(**gpu)


@pytest.fixture
def connect(device: str) -> Iterator[Connect]:
    """Makes paged clients that are connected, and closes them at the end."""
    made: list[PageClient] = []

    def build(daemon: Daemon, **options: Any) -> PageClient:
        given = {"model": "model", "layout": LAYOUT, "pages_max": 2 * SLOTS, "private_pages": PRIVATE} | options
        made.append(PageClient(daemon.socket, device=device, **given))
        until(made[-1], lambda: made[-1].alive)
        return made[-1]

    yield build
    for client in made:
        client.close()


def until(client: PageClient, so: Callable[[], bool]) -> None:
    """Poll until something is so."""
    deadline = monotonic_seconds() + PATIENCE_SECONDS
    while not so():
        assert monotonic_seconds() < deadline, f"it is still not so: {client!r}"
        client.poll()
        select.select([], [], [], 0.001)


def answer(client: PageClient, asked: A) -> A:
    """Poll until a request is done."""
    until(client, lambda: asked.done)
    return asked


def reserve(client: PageClient, count: int) -> NDArray[np.int32]:
    """Reserve pages, as many as there are."""
    return answer(client, client.reserve(count)).pages


def reserve_all(client: PageClient) -> NDArray[np.int32]:
    """Reserve the whole tier, once nobody else uses any of it: transfers under way do for a moment."""
    deadline = monotonic_seconds() + PATIENCE_SECONDS
    while len(pages := reserve(client, 2 * SLOTS)) < 2 * SLOTS:
        client.release(pages)
        assert monotonic_seconds() < deadline, f"{len(pages)} of {2 * SLOTS} pages can be had"
    return pages


def compute(client: PageClient, page: int, payload: NDArray[np.uint8]) -> None:
    """Write a block's bytes to a page, wherever it is."""
    row = client.memory[page]
    if isinstance(row, DeviceArray):
        upload([row], [np.resize(payload, len(row))])
    else:
        row[: len(payload)] = payload


def content(client: PageClient, page: int) -> NDArray[np.uint8]:
    """A block's bytes in a page."""
    row = client.memory[page]
    if isinstance(row, DeviceArray):
        device_row, row = row, np.empty(len(row), np.uint8)
        download([row], [device_row])
    return row[: LAYOUT.block_bytes]


def name(client: PageClient, pages: NDArray[np.int32], hashes: bytes, parent: bytes = ROOT) -> Named:
    """Compute the blocks of a chain in pages, and name them."""
    for at, page in enumerate(pages.tolist()):
        compute(client, page, payload_of(hashes[at * 32 : at * 32 + 32]))
    return answer(client, client.commit(pages, (parent + hashes)[: len(hashes)], hashes))


def store(client: PageClient, hashes: bytes, parent: bytes = ROOT) -> NDArray[np.int32]:
    """Store a chain as an engine does; returns the pages it is in."""
    pages = reserve(client, len(hashes) // 32)
    assert len(pages) == len(hashes) // 32
    assert (name(client, pages, hashes, parent).codes == -1).all()
    return pages


def check(client: PageClient, pages: NDArray[np.int32], hashes: bytes) -> None:
    """The pages hold the bytes that belong to the first of these hashes."""
    for at, page in enumerate(pages.tolist()):
        assert (content(client, page) == payload_of(hashes[at * 32 : at * 32 + 32])).all()


def find(client: PageClient, hashes: bytes, parent: bytes = ROOT) -> PageLookup:
    """Look a chain up, wait for all of it, and check its bytes."""
    found = answer(client, client.lookup(hashes, parent))
    check(client, found.pages, hashes)
    return found


# -- hits and stores --------------------------------------------------------------------------------------------------


def test_a_hit_is_the_page_that_it_was_computed_in(paged: Daemon, connect: Connect) -> None:
    """Another engine reads the same memory under the same page number, and no byte was copied for it."""
    one, two = connect(paged), connect(paged)
    hashes = hashes_of(1, 6)
    pages = store(one, hashes)
    found = find(two, hashes)
    assert found.pages.tolist() == pages.tolist() and found.tiers["gpu"] == 6
    assert paged.metrics()['tierd_transfer_bytes_total{path="memory",reason="demand",source="cpu",target="gpu"}'] == 0
    found.release()
    one.ended(hashes[-32:], "end_turn", "c")
    one.release(pages)
    two.ended(hashes_of(2, 2)[-32:], "tool_use")
    two.release(store(two, hashes_of(2, 2)))
    paged.wait_until(lambda status: status["tiers"]["gpu"]["slots"]["filling"] == 0)
    assert paged.metrics()['tierd_turns_total{turn="tool_use"}'] == 1


def test_two_engines_that_compute_the_same_end_with_one_page(paged: Daemon, connect: Connect) -> None:
    """The second is told the first one's page and holds it; its own can be used for something else."""
    one, two = connect(paged), connect(paged)
    hashes = hashes_of(1, 3)
    pages, spare = store(one, hashes), reserve(two, 3)
    assert name(two, spare, hashes).codes.tolist() == pages.tolist()
    one.release(pages)
    check(two, pages, hashes)
    assert (name(two, spare, hashes_of(2, 3)).codes == -1).all()
    two.release(np.concatenate((pages, spare)))
    reserve_all(one)


def test_a_block_without_a_parent_is_not_named(paged: Daemon, connect: Connect) -> None:
    """Its page stays the engine's own."""
    client = connect(paged)
    assert name(client, reserve(client, 1), hashes_of(2, 1), hashes_of(1, 1)).codes.tolist() == [-2]


def test_more_than_the_tier_comes_back_from_below(paged: Daemon, connect: Connect) -> None:
    """Chains of five times the tier are evicted, and are right again when they are brought up from cpu and nvme."""
    client = connect(paged)
    chains = [hashes_of(seed, SLOTS // 2) for seed in range(20)]
    for hashes in chains:
        client.release(store(client, hashes))
        paged.ask("sync", deadline_ms=20_000)
    tiers: dict[str, int] = {}
    for hashes in chains:
        found = find(client, hashes)
        assert found.blocks == found.ready == SLOTS // 2
        tiers = {tier: tiers.get(tier, 0) + number for tier, number in found.tiers.items()}
        found.release()
    assert tiers["cpu"] and tiers["nvme"] and not tiers["miss"]
    assert paged.status()["evicted_blocks"]["gpu.clean"] and not paged.status()["evicted_blocks"]["gpu.drop"]


def test_copying_clients_and_engines_share_blocks(paged: Daemon, connect: Connect) -> None:
    """What an engine computed is copied down for a client of the cpu tier, and what that stores is brought up for it."""
    engine = connect(paged)
    computed, copied = hashes_of(1, 5), hashes_of(2, 5)
    store(engine, computed)
    pool = np.zeros((5, LAYOUT.block_bytes), np.uint8)
    with Client(paged.socket, model="model", layout=LAYOUT, deadline_seconds=PATIENCE_SECONDS) as client:
        assert client.load(computed, pool, range(5)) == 5
        assert all((pool[at] == payload_of(computed[at * 32 : at * 32 + 32])).all() for at in range(5))
        pool[:] = [payload_of(copied[at * 32 : at * 32 + 32]) for at in range(5)]
        assert client.store(copied, pool, range(5)).stored == 5
        client.ended(copied[-32:], "tool_use", "c")
        paged.wait_until(lambda _: paged.metrics()['tierd_turns_total{turn="tool_use"}'] == 1)
    assert find(engine, copied).ready == 5


def test_a_lookup_may_be_given_up_at_any_time(paged: Daemon, connect: Connect) -> None:
    """Before its answer, between its loads or after them: nothing stays held."""
    client = connect(paged)
    hashes = hashes_of(1, SLOTS)
    client.release(store(client, hashes))
    paged.ask("sync", deadline_ms=20_000)
    client.release(reserve_all(client))  # now it is only below
    for polls in range(30):
        found = client.lookup(hashes)
        for _ in range(polls):
            client.poll()
        if polls % 2:
            found.stop()
            assert found.done and found.blocks == found.ready
            check(client, found.pages, hashes)
        found.release()
        found.release()
    until(client, lambda: not client._asked)
    assert paged.status()["lookup_blocks"]["cpu"] > 0
    reserve_all(client)


def test_pages_that_an_engine_holds_do_not_change_hands(paged: Daemon, connect: Connect) -> None:
    """Another namespace is refused while all are held, and is given a segment when nobody uses one any more."""
    one = connect(paged)
    pages = reserve_all(one)
    other = connect(paged, model="other")
    assert answer(other, other.reserve(1)).failed
    one.release(pages[pages < SLOTS])
    asked = other.reserve(SLOTS)
    until(other, lambda: one.poll() or asked.done)  # type: ignore[func-returns-value]
    assert len(asked.pages) == SLOTS
    assert (name(one, pages[pages >= SLOTS][:2], hashes_of(1, 2)).codes == -1).all()


def test_misuse_is_refused_where_it_happens(paged: Daemon, connect: Connect) -> None:
    """Pages of nobody, too often, or with too few hashes; and the daemon refuses pages to who copies."""
    client = connect(paged)
    pages = reserve(client, 2)
    with pytest.raises(Invalid, match="more often"):
        client.release([pages[0], pages[0]])
    with pytest.raises(Invalid, match="32 for each page"):
        client.commit(pages, ROOT, hashes_of(1, 1))
    with pytest.raises(Invalid, match="private"):
        client.release([client.private[0]])
    with paged.peer() as copier, pytest.raises(Invalid, match="only sessions of the gpu tier"):
        copier.ask("reserve", count=1)
    with paged.peer() as raw, pytest.raises(Invalid, match="is not one of tool_use"):
        raw.ask("ended", block=ROOT, turn="bored")
    client.release(pages)


def test_without_a_gpu_tier_there_are_no_pages(daemon: Daemon) -> None:
    """A daemon without one says what to do."""
    with pytest.raises(Invalid, match="set gpu"):
        daemon.peer(tier="gpu")


# -- deaths -----------------------------------------------------------------------------------------------------------

ENGINE = """
import sys
from tests.daemon.test_pages import LAYOUT, SLOTS, PageClient, reserve, until
client = PageClient(sys.argv[1], model="model", layout=LAYOUT, pages_max=2 * SLOTS, device=sys.argv[2])
until(client, lambda: client.alive)
print(len(reserve(client, 2 * SLOTS)), flush=True)
sys.stdin.read()
"""


def test_the_death_of_an_engine_frees_its_pages(paged: Daemon, gpu: dict[str, Any], connect: Connect) -> None:
    """All that it had reserved can be had by another one at once."""
    command = [sys.executable, "-c", ENGINE, str(paged.socket), gpu["gpu_device"]]
    environment = os.environ | gpu.get("environ", {})
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as engine:
        assert engine.stdout and int(engine.stdout.readline()) == 2 * SLOTS
        client = connect(paged)
        asked = answer(client, client.reserve(1))
        assert asked.failed and not len(asked.pages)
        engine.kill()
    paged.wait_until(lambda status: status["tiers"]["gpu"]["slots"]["free"] == 2 * SLOTS)
    reserve_all(client)


def test_pages_survive_the_daemon_where_its_memory_is_kept(start: Start, gpu: dict[str, Any], connect: Connect) -> None:
    """After kill -9 the engine's pages have their numbers and bytes; reserved ones can be named, named ones are hits."""
    daemon = start(held=True, **gpu)
    one, two = connect(daemon), connect(daemon)
    hashes, more = hashes_of(1, SLOTS + 4), hashes_of(1, SLOTS + 6)[-64:]
    pages = store(one, hashes)
    reserved = reserve(one, 2)
    looked = find(two, hashes[:64])
    for life in range(3):
        daemon.kill()
        for client in (one, two):
            until(client, lambda client=client: not client.alive)  # type: ignore[misc]
        check(one, pages, hashes)
        one.release(pages[-1:])  # while it is away
        hashes, pages = hashes[:-32], pages[:-1]
        for client in (one, two):
            until(client, lambda client=client: client.alive)  # type: ignore[misc]
        assert find(two, hashes).pages.tolist() == pages.tolist()
        if life == 2:
            assert (name(one, reserved, more, hashes_of(1, SLOTS + 4)[-32:]).codes == -1).all()
    assert find(two, hashes_of(1, SLOTS + 4) + more).ready == SLOTS + 6
    check(two, looked.pages, hashes)
    looked.release()
    one.release(np.concatenate((pages, reserved)))
    two.close()
    reserve_all(one)


def test_the_log_says_once_that_tierd_is_away_and_once_that_it_is_back(
    start: Start, gpu: dict[str, Any], connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """However often an engine polls meanwhile."""
    daemon = start(**gpu)
    client = connect(daemon, name="engine-7")
    for _ in range(2):
        daemon.kill()
        until(client, lambda: not client.alive)
        for _ in range(1000):
            client.poll()
        daemon.start()
        until(client, lambda: client.alive)
    said = [record.getMessage() for record in caplog.records if record.name == "tierd.client"]
    assert [one[: len("tierd is back")] for one in said] == ["tierd is away", "tierd is back"] * 2
    assert all("engine-7" in one for one in said)


def test_engines_under_pressure_keep_right_bytes_through_kills(start: Start, gpu: dict[str, Any], connect: Connect) -> None:
    """Engines that share prefixes, store five times the tier and let go at random, while the daemon is killed again and again:
    whatever they hold has its bytes after every step, and at the end nothing is held."""
    daemon = start(held=True, **gpu)
    clients = [connect(daemon) for _ in range(3)]
    dice = random.Random(7)
    held: list[tuple[PageClient, PageLookup | NDArray[np.int32], bytes]] = []
    for step in range(240):
        client = dice.choice(clients)
        if step % 60 == 59:
            daemon.kill()
            for one in clients:
                until(one, lambda one=one: not one.alive)  # type: ignore[misc]
                until(one, lambda one=one: one.alive)  # type: ignore[misc]
        hashes = hashes_of(dice.randrange(12), dice.randint(1, SLOTS // 2))
        found = client.lookup(hashes)
        until(client, lambda found=found: found.done or found.starved)  # type: ignore[misc]
        if found.starved and dice.random() < 0.5:  # else it goes on waiting while it is held
            found.stop()
        held.append((client, found, hashes))
        rest, parent = hashes[found.ready * 32 :], (ROOT + hashes)[found.ready * 32 :][:32]
        if rest and len(pages := reserve(client, len(rest) // 32)):
            rest = rest[: len(pages) * 32]
            codes = name(client, pages, rest, parent).codes
            twins = codes >= 0
            held.append((client, np.where(twins, codes, pages), rest))
            client.release(pages[twins])
        while held and (len(held) > 6 or dice.random() < 0.3):
            owner, what, _ = held.pop(dice.randrange(len(held)))
            what.release() if isinstance(what, PageLookup) else owner.release(what)
        for owner, what, hashes in held:
            check(owner, what.pages if isinstance(what, PageLookup) else what, hashes)
    for owner, what, _ in held:
        what.release() if isinstance(what, PageLookup) else owner.release(what)
    reserve_all(clients[0])


def test_pages_outlive_a_daemon_whose_memory_is_gone(start: Start, gpu: dict[str, Any], connect: Connect) -> None:
    """They are the engine's alone then: readable until released, unknown to the new daemon, in nobody's way for long."""
    daemon = start(**gpu)
    client = connect(daemon)
    hashes = hashes_of(1, SLOTS)
    pages = store(client, hashes)
    looked = find(client, hashes[:32])
    daemon.ask("sync", deadline_ms=20_000)
    daemon.kill()
    until(client, lambda: not client.alive)
    assert answer(client, client.reserve(1)).failed and not answer(client, client.lookup(hashes)).blocks
    daemon.start()
    until(client, lambda: client.alive)
    check(client, pages, hashes)
    assert (answer(client, client.commit(pages, (ROOT + hashes)[: len(hashes)], hashes)).codes == -2).all()
    other = reserve(client, 2 * SLOTS)
    assert len(other) == SLOTS and not set(other.tolist()) & set(pages.tolist()), "orphans are in the way of new pages"
    client.release(other)
    client.release(pages)
    looked.release()
    assert find(client, hashes).tiers["nvme"] == SLOTS
    assert len(reserve(client, 2 * SLOTS)) == SLOTS


def test_an_engine_never_waits_for_a_daemon_that_does_not_answer(paged: Daemon, connect: Connect) -> None:
    """Requests fail at the deadline, no call takes long, and the engine joins again when the daemon goes on."""
    client = connect(paged, deadline_seconds=0.2)
    pages = store(client, hashes_of(1, 2))
    pid = paged.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        asked: list[Asked] = [client.reserve(3), client.lookup(hashes_of(1, 2))]
        spare, longest, started = client.commit(pages, ROOT + hashes_of(1, 1), hashes_of(1, 2)), 0.0, monotonic_seconds()
        while monotonic_seconds() < started + 2:
            before = monotonic_seconds()
            client.poll()
            longest = max(longest, monotonic_seconds() - before)
            select.select([], [], [], 0.001)
        assert all(one.failed for one in [*asked, spare]) and not client.alive
        assert spare.codes.tolist() == [-1, -1]
        assert longest < 0.2, f"poll took {longest} s"
    finally:
        os.kill(pid, signal.SIGCONT)
    until(client, lambda: client.alive)
    assert find(client, hashes_of(1, 2)).pages.tolist() == pages.tolist()
    client.release(pages)
