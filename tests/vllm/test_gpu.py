"""vLLM's own scheduler over pages on emulated GPUs: steps and copies are on streams that are behind, and no page is wrong.

What holds on the CPU (test_scheduling) holds here, and in addition: a copy waits for what the engine had asked for, and the
engine for no copy. In both ways of copying: a block that is one run of bytes (BLHNC, which the connector asks vLLM for), and
staged (here LBNHC, which vLLM takes where nobody asks).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.cuda.build import CUDA, load
from tests.cuda.build import build as build_library
from tests.daemon.harness import Daemon
from tests.vllm.conftest import transfer
from tests.vllm.house import BLOCK, House, expected
from tests.vllm.test_scheduling import daemon, leases, prompt  # noqa: F401
from tierd.clock import monotonic_seconds

pytest.importorskip("triton", reason="kernels are in triton, and so are the headers of the driver")

from tests.vllm import gpu

STUB = Path(__file__).parents[1] / "contract/stub_copies.c"
LAYOUTS = ["BLHNC", "LBNHC"]
Build = Callable[..., House]
Switch = Callable[[str, bool], None]
SECONDS_MAX = 20.0


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> None:
    """This process takes the emulation for its driver."""
    load(build_library(tmp_path_factory.mktemp("driver"), CUDA, (STUB,)))


@pytest.fixture
def switch(driver: None, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Has streams stand still ("late"), copies "fail", or the driver "refuse" them, from now on or no more."""
    for name in ("late", "fail", "refuse"):
        monkeypatch.setenv(f"STUB_COPIES_{name.upper()}", str(short_path / name))
    return lambda name, on: (short_path / name).touch() if on else (short_path / name).unlink()


@pytest.fixture
def build(
    switch: Switch,
    daemon: Daemon,  # noqa: F811
    random_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Build]:
    """Builds engines of one or more workers, each on a GPU of its own; at the end each must be empty."""
    gpu.emulate_kernels(monkeypatch)
    built: list[House] = []

    def make(layout: str, load: str = "async", save: str = "async", workers: int = 1, **given: Any) -> House:
        gpus = [gpu.Gpu(number) for number in range(workers)]
        config = transfer(daemon.socket, load=load, save=save)
        built.append(House(random_model, config, workers=workers, gpus=gpus, layout=layout, **given))
        assert all(connector.worker.pool.contiguous == (layout == "BLHNC") for connector in built[-1].connectors)
        return built[-1]

    yield make
    for house in built:
        house.check_empty()
    daemon.wait_until(lambda _: not leases(daemon))
    for house in built:
        house.close()
    assert gpu.problems == []


def until(so: Callable[[], object]) -> None:
    """Wait until it is so."""
    deadline, never = monotonic_seconds() + SECONDS_MAX, Event()
    while not so():
        assert monotonic_seconds() < deadline, "it is still not so"
        never.wait(0.002)


MODES = [(load, save, ahead) for load in ("async", "sync") for save in ("async", "sync") for ahead in (False, True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("load", "save", "ahead"), MODES)
def test_a_second_engine_computes_only_what_is_not_there(build: Build, layout: str, load: str, save: str, ahead: bool) -> None:
    """The first stores what its stream will have computed; the second loads all full blocks but never the last token."""
    first, second = (build(layout, load, save, asynchronous=ahead) for _ in range(2))
    text = prompt(1, 10)
    assert first.run(text, max_tokens=40) == len(text) + 39
    assert second.run(text, max_tokens=40) == 5 + 39
    assert all(house.connector.worker.client.statistics["failures"] == {} for house in (first, second))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_engine_computes_only_what_is_not_there_on_a_real_gpu(
    daemon: Daemon,  # noqa: F811
    random_model: Path,
    layout: str,
) -> None:
    """The same with nothing emulated, for an environment that has vLLM for CUDA: streams and copy engines are the driver's."""
    first, second = (
        House(random_model, transfer(daemon.socket), asynchronous=True, layout=layout, device="cuda") for _ in range(2)
    )
    text = prompt(1, 10)
    assert first.run(text, max_tokens=40) == len(text) + 39
    assert second.run(text, max_tokens=40) == 5 + 39
    for house in (first, second):
        assert house.connector.worker.client.statistics["failures"] == {}
        house.check_empty()
        house.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ahead", [False, True])
def test_workers_that_share_a_model_copy_with_their_own_gpus(build: Build, layout: str, ahead: bool) -> None:
    """Two devices, whose contexts do not take each other's streams: each worker finds what it wrote."""
    first, second = (build(layout, workers=2, asynchronous=ahead) for _ in range(2))
    text = prompt(2, 10)
    assert first.run(text, max_tokens=40) == len(text) + 39
    assert second.run(text, max_tokens=40) == 5 + 39
    assert all(connector.worker.client.statistics["failures"] == {} for connector in second.connectors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
def test_pages_that_change_hands_are_never_wrong(build: Build, layout: str, seed: int) -> None:
    """Few pages for many requests, and steps that are not computed when the next is planned: what a load overwrites is still
    read, what a save reads is not written yet, and who gives up comes back.
    """
    rng = random.Random(seed)
    house = build(layout, asynchronous=True, pages=24)
    texts = [prompt(seed * 10 + number, 4) for number in range(8)]
    asked: dict[str, tuple[list[int], int]] = {}
    for _ in range(10):
        for text in rng.sample(texts, 4):
            tokens = rng.randint(1, 2 * BLOCK)
            asked[house.add(text, max_tokens=tokens)] = text, tokens
        for _ in range(rng.randint(1, 60)):
            house.step()
    house.finish()
    for name, (text, tokens) in asked.items():
        assert house.tokens[name] == expected(text, tokens), name
    assert house.connector.worker.client.statistics["blocks_loaded"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_load_comes_behind_steps_that_still_write_to_its_pages(build: Build, layout: str) -> None:
    """A request is aborted while the GPU has not come to its step, and its pages are another's at once."""
    text = prompt(8, 10)
    build(layout).run(text)
    house = build(layout, asynchronous=True, pages=13)
    gone = house.add(prompt(9, 9), max_tokens=10, store=False)
    house.step()
    house.abort(gone)
    name = house.add(text)
    house.step(behind=lambda: until(house.connector.worker._ended.qsize))
    house.finish()
    assert house.computed[name] == 5 and house.tokens[name] == expected(text, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("load", ["async", "sync"])
@pytest.mark.parametrize("how", ["fail", "refuse"])
def test_copies_that_fail_are_computed(build: Build, switch: Switch, layout: str, load: str, how: str) -> None:
    """On their way, or refused by the driver: what is not loaded is computed, what is not stored is not found, and vLLM hears
    of no error. When copies work again, so does all.
    """
    text, other = prompt(3, 10), prompt(4, 6)
    build(layout).run(text)
    house = build(layout, load=load)
    switch(how, True)
    assert house.run(text, max_tokens=3) >= len(text) + 2
    assert house.run(other) == len(other)
    assert house.side._failures == 1
    switch(how, False)
    house.forget()
    assert house.run(text, max_tokens=3) == 5 + 2
    assert house.run(other) == len(other)
    house.forget()
    assert house.run(other) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_engine_waits_for_no_copy(build: Build, switch: Switch, layout: str) -> None:
    """While streams stand still it plans and gives work; nothing is said to be loaded, nobody finds what is not stored yet."""
    text, other = prompt(5, 10), prompt(6, 6)
    build(layout).run(text)
    house = build(layout, asynchronous=True)
    switch("late", True)
    loading = house.add(text)
    house.step()
    computing = house.add(other)
    house.step()
    copies = house.connector.worker.client.session.segments._copies
    until(lambda: len(copies) == 2)
    assert house.side._loading and house.side._saving and not house.computed[loading]
    found = house.side.shards.lookup(b"".join(house.scheduler.requests[computing].block_hashes))
    assert found.blocks == 0
    found.release()
    switch("late", False)
    house.finish()
    assert (house.computed[loading], house.computed[computing]) == (5, len(other))
    house.forget()
    assert house.run(other) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_of_a_request_that_is_aborted_stay_until_their_copies_have_ended(
    build: Build, switch: Switch, layout: str
) -> None:
    """While its load is late nobody else gets them."""
    text = prompt(7, 10)
    build(layout).run(text)
    house = build(layout)
    free = house.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    before = free()
    switch("late", True)
    name = house.add(text)
    house.step()
    house.abort(name)
    for _ in range(5):
        house.step()
    assert free() == before - 10
    switch("late", False)
    house.finish()
    assert free() == before and house.run(text) == 5
