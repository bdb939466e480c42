"""Several clients at once over tiers much smaller than what they use: right bytes or a miss, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from threading import Thread
from typing import Any

from tests.daemon.conftest import Start
from tests.daemon.harness import SEGMENT_BYTES, SLOTS, Daemon, Wire, hashes_of
from tierd.errors import Busy, Gone

CHAINS = 12
CHAIN_BLOCKS = 80


def at_once(*works: Callable[[], None]) -> None:
    """Run all in threads; raises the first error of any."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a client hangs"
    if errors:
        raise errors[0]


def turns(wire: Wire, random: Random, count: int) -> None:
    """One client's life: prefixes of shared chains are loaded and verified, stored, aborted, prefetched and held."""
    held: list[int] = []
    for _ in range(count):
        hashes = hashes_of(random.randrange(CHAINS), CHAIN_BLOCKS)[: 32 * random.randint(1, CHAIN_BLOCKS)]
        try:
            match random.randrange(6):
                case 0 | 1:
                    wire.load(hashes)
                case 2 | 3:
                    wire.store(hashes)
                case 4:
                    lease, _ = wire.place(hashes)
                    if lease:
                        wire.ask(random.choice(["commit", "abort"]), lease=lease)
                    wire.ask("prefetch", hashes=hashes)
                case 5:
                    reply = wire.lookup(hashes)
                    wire.read(hashes, 0, reply["slots"])
                    held += [reply["lease"]] if reply["lease"] else []
        except (Busy, Gone):
            pass  # an answer too; what counts is that no answer is wrong
        if len(held) > 2:
            wire.ask("release", lease=held.pop(random.randrange(3)))


def nothing_is_left(daemon: Daemon) -> None:
    """No session, no lease, nothing filling or retired; slots sum to segments; all is in nvme that should be."""

    def are_whole(status: dict[str, Any]) -> bool:
        """A segment has bytes before it has slots, and after it has lost them."""
        tiers = status["tiers"].values()
        return all(sum(tier["slots"].values()) == -(-tier["used_bytes"] // SEGMENT_BYTES) * SLOTS for tier in tiers)

    def is_quiet(status: dict[str, Any]) -> bool:
        filling = sum(tier["slots"]["filling"] for tier in status["tiers"].values())  # a prefetch that nobody waits for
        return bool(status["sessions"] == status["unwritten_runs"] == filling == 0) and are_whole(status)

    status = daemon.wait_until(is_quiet)
    for tier in status["tiers"].values():
        assert tier["slots"]["filling"] == tier["slots"]["retired"] == tier["slots"]["quarantined"] == 0
        assert tier["used_bytes"] <= tier["limit_bytes"]
    assert sum(daemon.metrics()[f'tierd_leases{{kind="{kind}"}}'] for kind in ("reading", "writing")) == 0
    assert status["checksum_failures"] == 0


def test_clients_of_one_namespace_get_right_bytes_under_pressure(start: Start) -> None:
    """Six sessions share a dozen chains of four times the memory, in every order; each byte read is checked."""
    daemon = start(nvme_bytes=8 * SEGMENT_BYTES)

    def client(seed: int) -> Callable[[], None]:
        def work() -> None:
            with daemon.peer() as wire:
                turns(wire, Random(seed), 60)

        return work

    at_once(*(client(seed) for seed in range(6)))
    nothing_is_left(daemon)
    assert daemon.status()["lookup_blocks"]["nvme"] > 0


def test_two_that_store_the_same_at_once_store_it_once(daemon: Daemon) -> None:
    """Sessions race to store the same new chains: each block is committed by exactly one, and all can read it."""
    committed = [0, 0, 0, 0]

    def client(number: int) -> Callable[[], None]:
        def work() -> None:
            with daemon.peer() as wire:
                for seed in range(20):
                    committed[number] += wire.store(hashes_of(seed, 8))

        return work

    at_once(*(client(number) for number in range(4)))
    assert sum(committed) == 20 * 8
    with daemon.peer() as wire:
        assert all(wire.load(hashes_of(seed, 8)) == 8 for seed in range(20))
    nothing_is_left(daemon)


def test_namespaces_under_pressure_stay_apart(start: Start) -> None:
    """Two namespaces work at once with the same hashes; memory goes back and forth, and no byte does."""
    daemon = start(nvme_bytes=8 * SEGMENT_BYTES)

    def client(model: str, seed: int) -> Callable[[], None]:
        def work() -> None:
            with daemon.peer(model=model) as wire:
                turns(wire, Random(seed), 40)

        return work

    at_once(client("a", 1), client("a", 2), client("b", 3), client("b", 4))
    nothing_is_left(daemon)
