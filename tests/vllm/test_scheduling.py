"""The connector under vLLM's own scheduler: whatever happens to a request, its KV is that of its tokens, and nothing leaks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import Daemon
from tests.vllm.conftest import transfer
from tests.vllm.house import BLOCK, Flaky, House, chain

Build = Callable[..., House]


def prompt(seed: int, blocks: int, more: int = 5) -> list[int]:
    """So many full blocks and some tokens."""
    return random.Random(seed).choices(range(500), k=blocks * BLOCK + more)


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """Room for some thousand blocks."""
    return start(cpu_bytes=16 << 20, cpu_segment_bytes=1 << 20, nvme_bytes=16 << 20, nvme_segment_bytes=1 << 20)


@pytest.fixture
def build(daemon: Daemon, random_model: Path) -> Iterator[Build]:
    """Builds engines on that daemon; at the end each must be empty."""
    built: list[House] = []

    def make(*, load: str = "async", save: str = "async", options: dict[str, Any] | None = None, **given: Any) -> House:
        config = transfer(daemon.socket, load=load, save=save, **(options or {}))
        built.append(House(random_model, config, **given))
        return built[-1]

    yield make
    for house in built:
        house.check_empty()
        house.close()
    if daemon.process is not None and daemon.process.poll() is None:
        for space in daemon.wait_until(lambda status: not status["sessions"])["namespaces"]:
            assert space["slots"]["cpu"].get("held", 0) == 0, space


MODES = [(load, save, ahead) for load in ("async", "sync") for save in ("async", "sync") for ahead in (False, True)]


@pytest.mark.parametrize(("load", "save", "ahead"), MODES)
def test_a_second_engine_computes_only_what_is_not_in_tierd(build: Build, load: str, save: str, ahead: bool) -> None:
    """The first stores while it computes and speaks; the second loads all full blocks but never the last token."""
    first, second = build(load=load, save=save, asynchronous=ahead), build(load=load, save=save, asynchronous=ahead)
    text = prompt(1, 10)
    assert first.run(text, max_tokens=70) == len(text) + 69
    assert second.run(text, max_tokens=70) == 5 + 69
    whole = first.tokens["r1"]
    assert second.run(whole[: 12 * BLOCK + 1]) == 1, "what was said is stored, too"


def test_of_a_full_hit_the_last_block_is_computed(build: Build) -> None:
    """As with vLLM's own prefix cache: somebody has to say what comes next."""
    text = prompt(2, 6, more=0)
    build().run(text)
    assert build().run(text) == BLOCK


@pytest.mark.parametrize("load", ["async", "sync"])
@pytest.mark.parametrize("good", [0, 1, 4, 9])
def test_blocks_that_do_not_arrive_are_computed_once_and_not_asked_for_again(build: Build, load: str, good: int) -> None:
    """The first, one in the middle or the last is lost: the request never sees rubbish, and does not ask for ever."""
    text = prompt(3, 10)
    build().run(text)
    house = build(load=load)
    flaky = house.connector.worker.client = Flaky(house.connector.worker.client, good)  # type: ignore[assignment]
    computed = house.run(text, max_tokens=3)
    assert computed >= len(text) + 2 - good * BLOCK
    assert flaky.loads == 1
    flaky.good = 10
    house.forget()
    assert house.run(text, max_tokens=3) == 5 + 2, "what one request lost is offered to the next"


def test_a_lost_block_is_stored_again(build: Build, daemon: Daemon) -> None:
    """The daemon loses everything between look-up and load: it is recomputed, stored, and found by the next."""
    text = prompt(4, 8)
    build().run(text)
    house = build()
    house.add(text)
    house.scheduler.schedule  # noqa: B018
    daemon.kill()
    daemon.start()
    house.finish()
    house.forget()
    house.run(text)


def test_the_head_may_be_in_vllms_cache_and_the_rest_in_tierd(build: Build) -> None:
    """Only what is missing is loaded, behind the parent that is there."""
    text = prompt(5, 12)
    build().run(text)
    house = build()
    house.run(text[: 5 * BLOCK])
    house.connector.worker.client = Flaky(house.connector.worker.client, 100)  # type: ignore[assignment]
    assert house.run(text) == 5
    assert house.side.stats.data  # looked up


def test_an_abort_while_blocks_come_leaks_nothing(build: Build) -> None:
    """The pages stay until the copy has ended, the lease until then, and both go."""
    text = prompt(6, 10)
    build().run(text)
    house = build()
    name = house.add(text)
    house.step()
    assert house.side._loading
    house.abort(name)
    house.finish()
    assert house.computed[name] == 0
    assert house.run(text) == 5


def test_an_abort_between_look_up_and_load_gives_the_lease_back(build: Build) -> None:
    """No pages for it: the request waits with a lease, until its client has gone."""
    text = prompt(7, 10)
    build().run(text)
    house = build(pages=16)
    long = house.add(prompt(8, 12), max_tokens=20)
    house.step()
    name = house.add(text)
    house.step()
    house.abort(name)
    house.abort(long)
    house.finish()


def test_preempted_requests_come_back_with_the_right_kv(build: Build) -> None:
    """More than there are pages for, all at once: everyone says what they would have said alone, stored and loaded meanwhile."""
    house = build(pages=24)
    texts = [prompt(seed, 4) for seed in range(10, 16)]
    names = [house.add(text, max_tokens=3 * BLOCK) for text in texts]
    house.finish()
    assert sum(house.computed[name] for name in names) > 0
    for name, text in zip(names, texts, strict=True):
        assert len(house.tokens[name]) == len(text) + 3 * BLOCK
        tokens = house.tokens[name]
        assert all(token == chain(tokens[:at])[-1] % 500 for at, token in list(enumerate(tokens))[len(text) :: 17])


def test_salts_do_not_share(build: Build) -> None:
    """The same text under another salt, or none, is another text."""
    text = prompt(9, 5)
    house = build()
    house.run(text, salt="a")
    house.forget()
    assert house.run(text, salt="b") == len(text)
    house.forget()
    assert house.run(text) == len(text)
    house.forget()
    assert house.run(text, salt="a") == 5


def test_a_request_may_decline(build: Build) -> None:
    """`kv_transfer_params`: do not store, do not load."""
    text = prompt(17, 5)
    house = build()
    house.run(text, store=False)
    house.forget()
    assert house.run(text) == len(text)
    house.forget()
    assert house.run(text, load=False) == len(text)
    house.forget()
    assert house.run(text) == 5


def test_nothing_waits_for_a_daemon_that_is_not_there(build: Build, daemon: Daemon) -> None:
    """Before, during and after: the same tokens, and what could be stored is a hit when it is back."""
    text, other = prompt(18, 5), prompt(19, 5)
    house = build()
    house.run(text)
    daemon.kill()
    house.forget()
    assert house.run(text) == len(text)
    daemon.start()
    house.finish()
    assert house.run(other) == len(other)
