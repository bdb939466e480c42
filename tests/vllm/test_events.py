"""KV events under vLLM's own scheduler: whoever believes them believes of tierd what is so, or less."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from tests.daemon.conftest import Start
from tests.daemon.harness import Daemon
from tests.vllm.conftest import transfer
from tests.vllm.house import BLOCK, House
from tests.vllm.test_scheduling import prompt
from tierd.clock import monotonic_seconds

Build = Callable[..., House]
SECONDS_MAX = 20.0


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """Memory only, a segment of it for each of two workers: what is evicted is gone."""
    return start(cpu_bytes=2 << 20, cpu_segment_bytes=1 << 20, nvme_bytes=0)


@pytest.fixture
def build(daemon: Daemon, random_model: Path) -> Iterator[Build]:
    """Builds engines on that daemon which publish events."""
    built: list[House] = []

    def make(events: bool = True, **given: Any) -> House:
        built.append(House(random_model, transfer(daemon.socket), events=events, **given))
        return built[-1]

    yield make
    for house in built:
        house.close()


def believed(house: House) -> set[Any]:
    """What somebody thinks that tierd has, who has read all events so far."""
    blocks: set[bytes] = set()
    for event in house.published:
        name = type(event).__name__
        if name == "AllBlocksCleared":
            blocks.clear()
        elif event.medium == "STORAGE":
            assert (event.locality, event.ownership, event.group_idx) == ("LOCAL", "tierd", 0)
            if name == "BlockStored":
                blocks.update(event.block_hashes)
            else:
                blocks.difference_update(event.block_hashes)
    return blocks


def in_tierd(house: House, hashes: list[bytes]) -> list[bytes]:
    """The leading blocks that a look-up finds."""
    found = house.side.shards.lookup(b"".join(hashes))
    found.release()
    return hashes[: found.blocks]


def until(house: House, so: Callable[[], bool]) -> None:
    """Step, as an engine that others keep busy, until it is so."""
    deadline = monotonic_seconds() + SECONDS_MAX
    while not so():
        assert monotonic_seconds() < deadline, "the events do not come"
        house.step()
        select.select([], [], [], 0.005)


def hashes_of(house: House, text: list[int]) -> list[bytes]:
    """The block hashes of a prompt, which is run."""
    name = house.add(text)
    hashes = [bytes(block) for block in house.scheduler.requests[name].block_hashes]
    house.finish()
    return hashes


def test_what_is_stored_is_announced_as_vllm_announces_its_own(build: Build) -> None:
    """The same blocks, tokens and parents, but for where they are; and what is said to the prompt."""
    house = build()
    house.run(prompt(1, 4), max_tokens=40)
    own = [event for event in house.published if event.medium == "GPU"]
    ours = [event for event in house.published if event.medium == "STORAGE"]
    parents = {block: parent for event in own for block, parent in parents_of(event)}
    assert {block: parent for event in ours for block, parent in parents_of(event)} == parents
    assert sorted(token for event in ours for token in event.token_ids) == sorted(t for event in own for t in event.token_ids)
    assert all(
        len(event.token_ids) == len(event.block_hashes) * event.block_size == len(event.extra_keys) * BLOCK for event in ours
    )


def parents_of(event: Any) -> list[tuple[bytes, bytes | None]]:
    """The blocks of an event, and the one before each."""
    return list(zip(event.block_hashes, [event.parent_block_hash, *event.block_hashes[:-1]], strict=True))


def test_salts_are_in_the_keys_of_the_first_block(build: Build) -> None:
    """So that a reader who hashes tokens itself does not take one salt's blocks for another's."""
    house = build()
    house.run(prompt(2, 3), salt="a")
    [event] = [event for event in house.published if event.medium == "STORAGE"]
    assert event.extra_keys == [("a",), None, None]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_another_engine_evicts_is_taken_back(build: Build, workers: int) -> None:
    """The daemon's memory is full of one prompt after another; no block stays believed, and none was told too early."""
    house, other = build(workers=workers), build(events=False, workers=workers)
    hashes = hashes_of(house, prompt(3, 10))
    assert believed(house) == set(map(maybe_convert_block_hash, hashes))
    deadline = monotonic_seconds() + SECONDS_MAX
    for seed in count(100):
        assert monotonic_seconds() < deadline, f"{len(believed(house))} blocks are still believed"
        other.run(prompt(seed, 40))
        other.forget()
        house.step()
        if not believed(house):
            break
    assert in_tierd(other, hashes) == []


def test_a_second_engine_announces_what_it_loads(build: Build) -> None:
    """It had no part in storing it, and can have it."""
    text = prompt(4, 6)
    build().run(text)
    second = build()
    assert second.run(text) == 5
    assert len(believed(second)) == 6


def test_after_a_restart_of_the_daemon_nothing_is_believed_that_is_not_there(build: Build, daemon: Daemon) -> None:
    """Its memory is gone, and so is what was announced; what is stored after that is announced again."""
    house = build()
    text = prompt(5, 6)
    house.run(text)
    assert len(believed(house)) == 6
    daemon.kill()
    daemon.start()
    until(house, lambda: not believed(house))
    house.forget()
    house.run(text)
    assert len(believed(house)) == 6


def test_a_block_that_goes_while_its_run_is_under_way_is_not_announced(build: Build, daemon: Daemon) -> None:
    """The worker says that it was stored, the daemon that it is gone, and the daemon is heard first."""
    house = build()
    house.add(prompt(6, 4))
    while not house.side._saving:
        house.step()
    daemon.wait_until(lambda status: status["tiers"]["cpu"]["slots"]["ready"] == 4)
    [namespace] = daemon.status()["namespaces"]
    daemon.ask("purge", namespace=namespace["id"])
    events = house.side.events
    deadline = monotonic_seconds() + SECONDS_MAX
    while any(events._under_way.values()):
        assert monotonic_seconds() < deadline, "the purge is not heard"
        events._hear()
        select.select([], [], [], 0.005)
    house.finish()
    assert not believed(house)


def test_without_events_the_daemon_is_not_asked(build: Build, daemon: Daemon) -> None:
    """Nothing is published, and no session listens."""
    house = build(events=False)
    house.run(prompt(7, 3))
    assert house.published == [] and house.side.events is None
    assert house.scheduler.connector.take_events() == []
