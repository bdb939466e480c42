"""The connector under vLLM's own scheduler: whatever happens to a request, its KV is that of its tokens, and nothing leaks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from tests.daemon.conftest import Start
from tests.daemon.harness import Daemon
from tests.vllm.conftest import transfer
from tests.vllm.house import BLOCK, Flaky, House, chain, expected
from tierd.clock import monotonic_seconds

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
    if daemon.process is not None and daemon.process.poll() is None:
        daemon.wait_until(lambda _: not leases(daemon))
    for house in built:
        house.close()


def leases(daemon: Daemon) -> float:
    """How many the daemon knows of."""
    return sum(value for name, value in daemon.metrics().items() if name.startswith("tierd_leases"))


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


@pytest.mark.parametrize("ahead", [False, True])
def test_workers_that_share_a_model_load_their_own_parts(build: Build, ahead: bool) -> None:
    """Tensor parallelism: every worker finds what it wrote, and none what another did."""
    first, second = build(workers=2, asynchronous=ahead), build(workers=2, asynchronous=ahead)
    text = prompt(30, 10)
    assert first.run(text, max_tokens=70) == len(text) + 69
    assert second.run(text, max_tokens=70) == 5 + 69
    assert build().run(text) == len(text), "the whole of a block is not the part of it"


@pytest.mark.parametrize("good", [(0, 10), (10, 4), (3, 7)])
def test_a_block_of_which_one_part_did_not_arrive_is_computed(build: Build, good: tuple[int, int]) -> None:
    """Whichever worker it is that lost it, and whenever it says so."""
    text = prompt(31, 10)
    build(workers=2).run(text)
    house = build(workers=2)
    for connector, blocks in zip(house.connectors, good, strict=True):
        connector.worker.client = Flaky(connector.worker.client, blocks)  # type: ignore[assignment]
    assert house.run(text, max_tokens=3) >= len(text) + 2 - min(good) * BLOCK
    assert house.side._failures == 1


def test_a_block_of_which_one_part_was_not_stored_is_not_offered(build: Build) -> None:
    """It is there for nobody until both are, and then for everybody."""
    text = prompt(32, 10)
    house = build(workers=2)
    client = house.connectors[1].worker.client
    house.connectors[1].worker.client = Flaky(client, 10, stored=4)  # type: ignore[assignment]
    house.run(text)
    assert build(workers=2).run(text) == 6 * BLOCK + 5
    assert build(workers=2).run(text) == 5


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


@pytest.mark.parametrize("good", [0, 4, 9])
def test_where_a_failed_load_fails_the_request_nothing_leaks(build: Build, good: int) -> None:
    """vLLM's other policy, which is refused at start: the request ends with an error, its pages and lease are free."""
    text = prompt(33, 10)
    build().run(text)
    house = build()
    house.scheduler.recompute_kv_load_failures = False
    house.connector.worker.client = Flaky(house.connector.worker.client, good)  # type: ignore[assignment]
    name = house.add(text)
    house.finish()
    assert house.ended[name] == "error" and house.computed[name] == 0


def test_a_daemon_killed_between_look_up_and_load_costs_a_computation(build: Build, daemon: Daemon) -> None:
    """What was promised is gone: it is computed, nobody notices, and hits return with the daemon, without a new engine."""
    text = prompt(4, 8)
    build().run(text)
    house = build()
    name = house.add(text)
    house.step(between=daemon.kill)
    house.finish()
    assert house.computed[name] == len(text) and house.tokens[name] == expected(text, 1)
    daemon.start()
    deadline = monotonic_seconds() + 20
    while True:  # the client leaves a daemon that was away alone for a while
        assert monotonic_seconds() < deadline, "no hits after the daemon is back"
        house.forget()
        if house.run(text) == 5:
            break


def test_the_head_may_be_in_vllms_cache_and_the_rest_in_tierd(build: Build) -> None:
    """Only what is missing is loaded, behind the parent that is there."""
    text = prompt(5, 12)
    build().run(text)
    house = build()
    house.run(text[: 5 * BLOCK + 1])
    house.connector.worker.take()
    assert house.run(text) == 5
    loaded = house.connector.worker.client.statistics["blocks_loaded"]
    assert loaded == 12, "the head with the first request, what is behind it with the second"


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
    """More than there are pages for, all at once: everyone says what they would have said alone."""
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


def test_adapters_do_not_share(build: Build) -> None:
    """The same text by another adapter, by one of that name from elsewhere, or by none, is another text."""
    text, house = prompt(9, 5), build()
    adapter = LoRARequest("legal", 1, "/adapters/legal")
    house.run(text, lora=adapter)
    for other in (LoRARequest("medical", 2, "/adapters/medical"), LoRARequest("legal", 3, "/adapters/legal-2"), None):
        house.forget()
        assert house.run(text, lora=other) == len(text)
    house.forget()
    assert house.run(text, lora=LoRARequest("legal", 4, "/adapters/legal")) == 5


def test_images_do_not_share_from_the_block_on_where_they_begin(build: Build) -> None:
    """Behind the same three blocks of text, placeholders of another image are another text."""
    text, house = prompt(9, 5), build()
    house.scheduler.max_num_encoder_input_tokens = len(text)  # the model of these tests sees nothing
    house.scheduler.encoder_cache_manager = EncoderCacheManager(len(text))
    house.run(text, image=picture("one"))
    house.forget()
    assert house.run(text, image=picture("two")) == len(text) - 3 * BLOCK
    house.forget()
    assert house.run(text, image=picture("one")) == 5


def picture(name: str) -> MultiModalFeatureSpec:
    """An image whose placeholders are a block and a half of tokens, from the fourth block on."""
    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=3 * BLOCK + 2, length=BLOCK * 3 // 2))


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


def kept_by(daemon: Daemon, namespace: bytes) -> dict[int, int]:
    """Priorities of what is kept, by the number of its blocks in memory."""
    return {pin["blocks"]["cpu"]: pin["priority"] for pin in daemon.ask("pin", namespace=namespace)["pins"]}


def test_a_request_may_ask_to_be_kept(build: Build, daemon: Daemon) -> None:
    """`kv_transfer_params`: its whole chain is, as far as it is stored; a hit that stores nothing may ask as well. What cannot
    be understood is no error, and nothing is kept.
    """
    house = build()
    house.run(prompt(30, 5), max_tokens=BLOCK + 1, ttl_seconds=60, priority=7)
    house.run(prompt(31, 3))
    house.forget()
    house.run(prompt(31, 3), ttl_seconds=90.5)
    house.run(prompt(32, 2), ttl_seconds="long")
    house.run(prompt(33, 2), ttl_seconds=60, store=False)
    name = daemon.status()["namespaces"][0]["id"]
    deadline = monotonic_seconds() + 20  # the daemon is told, and does not answer
    while kept_by(daemon, name) != {6: 7, 3: 0}:
        assert monotonic_seconds() < deadline, kept_by(daemon, name)


def test_a_request_that_ends_before_its_saves_is_kept_whole(build: Build, daemon: Daemon) -> None:
    """The runs of its prompt and of its answer are both still under way when it ends."""
    house, held = build(), Event()
    house.connector.worker._saver.submit(held.wait, 20)
    house.add(prompt(35, 5), max_tokens=BLOCK + 1, ttl_seconds=60, priority=7)
    while house.scheduler.requests:
        house.step()
    assert [keeping.saves for keeping in house.side._keeping.values()] == [2]
    held.set()
    house.finish()
    name = daemon.status()["namespaces"][0]["id"]
    deadline = monotonic_seconds() + 20
    while kept_by(daemon, name) != {6: 7}:
        assert monotonic_seconds() < deadline, kept_by(daemon, name)


def test_a_prompt_that_comes_once_is_seen_once(start: Start, random_model: Path) -> None:
    """Scheduler and worker ask, for prompts and their chunks, before and after: on second sight nothing of it is written."""
    daemon = start(nvme_admission="second-sight")
    house = House(random_model, transfer(daemon.socket), max_num_batched_tokens=64)
    text = prompt(36, 9)
    house.run(text, max_tokens=40)
    daemon.run("sync")
    assert daemon.metrics()['tierd_slots{state="ready",tier="nvme"}'] == 0
    house.forget()
    house.run(text)
    daemon.run("sync")
    assert daemon.metrics()['tierd_slots{state="ready",tier="nvme"}'] == 9
    house.check_empty()
    house.close()


def test_without_a_daemon_everything_is_computed(build: Build, daemon: Daemon) -> None:
    """Before, during and after: the same tokens; what is held for saves that fail is given back."""
    daemon.kill()
    house = build()
    assert house.run(prompt(18, 5), max_tokens=40) == 5 * BLOCK + 5 + 39
    house.forget()
    assert house.run(prompt(18, 5)) == 5 * BLOCK + 5


def test_what_tierd_did_not_take_is_offered_again(build: Build, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that outlives the daemon's absence stores its whole chain with one of its next blocks."""
    monkeypatch.setattr("tierd_engine.connectors.vllm.scheduler.AGAIN_SECONDS", 0.0)
    daemon.kill()
    text = prompt(20, 3)
    house = build()
    name = house.add(text, max_tokens=800)
    while house.computed[name] < 6 * BLOCK:
        house.step()
    daemon.start()
    deadline = monotonic_seconds() + 20
    while not daemon.status()["namespaces"]:
        assert monotonic_seconds() < deadline and name in house.scheduler.requests
        house.step()
    house.finish()
    house.forget()
    assert house.run(text) == 5


def test_saves_take_no_more_pages_than_their_share(build: Build) -> None:
    """What does not fit is skipped now and offered again; the request does not wait."""
    house = build(pages=64, options={"saving_share": 0.1})
    text = prompt(21, 14)
    house.add(text, max_tokens=2)
    most = 0
    while house.scheduler.has_requests():
        house.step()
        most = max(most, house.side._saving_pages)
    assert 0 < most <= 6
    house.forget()
    assert house.run(text) < len(text)


@pytest.mark.parametrize("chunk", [64, 96, 512])
def test_chunks_of_a_prompt_are_stored_as_they_come(build: Build, chunk: int) -> None:
    """Whatever the budget of a step, the chain is whole."""
    text = prompt(22, 9)
    build(max_num_batched_tokens=chunk).run(text, max_tokens=3)
    assert build(max_num_batched_tokens=chunk).run(text, max_tokens=3) == 5 + 2
