"""SGLang's loops over a real daemon: what one engine saved the others load, and whatever happens no page is wrong."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed in this environment: make test-sglang")

from sglang.srt.environ import envs
from sglang.srt.observability.metrics_collector import StorageMetricsCollector

from tests.daemon.conftest import Start
from tests.sglang.house import Engine, host_pool, keys_of, prompt, serve
from tierd.clock import monotonic_seconds

MEBI = 1 << 20
ROOM = {"cpu_bytes": 16 * MEBI, "cpu_segment_bytes": 2 * MEBI, "nvme_bytes": 16 * MEBI, "nvme_segment_bytes": 2 * MEBI}
PAGES = 300
"""Three of SGLang's batches."""
Begin = Callable[..., Engine]


@pytest.fixture
def engine() -> Iterator[Begin]:
    """Starts engines: `engine(socket, "page_first")`, each with host memory of its own."""
    serve()
    begun: list[Engine] = []

    def begin(socket: Path, layout: str = "page_first", kind: str = "mha", *, pool: Any = None, **options: Any) -> Engine:
        begun.append(Engine(socket, pool if pool is not None else host_pool(layout, kind), **options))
        return begun[-1]

    yield begin
    for each in begun:
        each.close()


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_what_one_engine_saved_another_loads(start: Start, engine: Begin, layout: str, kind: str) -> None:
    """In pages of its own; saved again it is there already; a longer sequence has what it has in common."""
    daemon = start(**ROOM)
    one, other = (engine(daemon.socket, layout, kind) for _ in range(2))
    text = prompt(1, PAGES)
    assert (one.load(text), one.save(text)) == (0, PAGES)
    assert one.pages("save") == {"stored": PAGES, "present": 0, "refused": 0}
    assert other.load(text) == PAGES
    assert other.load(text[: 40 * 4] + prompt(2, 9)) == 40
    assert other.save(text) == PAGES and other.pages("save") == {"stored": 0, "present": PAGES, "refused": 0}


def test_pages_survive_a_restart_of_everything(start: Start, engine: Begin) -> None:
    """They come from disk, the pages asked for later, too."""
    daemon = start(**ROOM)
    text = prompt(3, PAGES)
    engine(daemon.socket).save(text)
    daemon.ask("sync")
    daemon.kill()
    daemon.start()
    assert engine(daemon.socket).load(text) == PAGES


def test_a_prompt_that_comes_once_is_seen_once(start: Start, engine: Begin) -> None:
    """However many batches it is asked for and saved in: on second sight nothing is written, then all of it."""
    daemon = start(**ROOM, nvme_admission="second-sight")
    one, text = engine(daemon.socket), prompt(6, PAGES)
    written = 'tierd_slots{state="ready",tier="nvme"}'
    assert (one.load(text), one.save(text)) == (0, PAGES)
    daemon.ask("sync")
    assert daemon.metrics()[written] == 0
    assert one.load(text) == PAGES
    daemon.ask("sync")
    assert daemon.metrics()[written] == PAGES


def test_engines_whose_bytes_differ_share_nothing(start: Start, engine: Begin) -> None:
    """The same tokens have the same keys in all of them."""
    daemon = start(**ROOM)
    text = prompt(4, 20)
    assert engine(daemon.socket).save(text) == 20
    others = [
        engine(daemon.socket, pool=host_pool("page_first", dtype=torch.float16)),
        engine(daemon.socket, "layer_first"),
        engine(daemon.socket, tp_size=2, tp_rank=1),
        engine(daemon.socket, extra={"tierd": {"socket": str(daemon.socket), "model_id": "finetuned"}}),
    ]
    assert [other.load(text) for other in others] == [0] * len(others)
    assert engine(daemon.socket).load(text) == 20


def test_a_suffix_is_saved_and_loaded_behind_its_prefix(start: Start, engine: Begin) -> None:
    """SGLang saves what it has computed, and loads what follows what it has."""
    daemon = start(**ROOM)
    one, other = engine(daemon.socket), engine(daemon.socket)
    text = prompt(5, PAGES)
    assert one.save(text[: 100 * 4]) == 100
    assert other.save(text, computed=100) == PAGES - 100
    assert one.load(text, computed=30) == PAGES - 30
    assert one.load(text) == PAGES


def test_pages_whose_parent_is_unknown_are_counted_and_not_stored(start: Start, engine: Begin) -> None:
    """Nobody could find them: what is there of a sequence begins at its start."""
    daemon = start(**ROOM)
    one = engine(daemon.socket)
    text = prompt(6, 50)
    assert one.save(text, computed=10) == 0
    assert one.pages("save") == {"stored": 0, "present": 0, "unknown_parent": 40}
    assert one.load(text, computed=10) == 0
    assert daemon.slots("cpu")["ready"] == 0
    assert one.save(text) == 50
    assert one.load(text, computed=10) == 40


def test_without_prefix_keys_nothing_is_stored_and_the_log_says_why(
    start: Start, engine: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the key to add: SGLang does not tell by itself which pages follow which."""
    daemon = start(**ROOM)
    one = engine(daemon.socket)
    with caplog.at_level(logging.ERROR, "tierd_engine.connectors.sglang"):
        assert one.save(prompt(7, 20), tell_prefix=False) == one.save(prompt(8, 20), tell_prefix=False) == 0
    assert one.pages("save")["unknown_parent"] == 40
    [message] = [record.message for record in caplog.records if record.name == "tierd_engine.connectors.sglang"]
    assert '"hicache_storage_pass_prefix_keys": true' in message


def test_random_delays_and_failures_cost_hits_only(start: Start, engine: Begin) -> None:
    """With SGLang's own fault wrapper around the backend, everything that arrives is right, and every page is accounted for."""
    daemon = start(**ROOM)
    with (
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.002),
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.3),
    ):
        flaky = [engine(daemon.socket) for _ in range(2)]
    assert all(each.backend is not each.storage_backend for each in flaky)
    rng = random.Random(9)
    arrived = 0
    for _ in range(120):
        each, text, computed = rng.choice(flaky), prompt(rng.randrange(10, 16), 150), rng.choice((0, 0, 20, 130))
        arrived += each.load(text, computed)
        each.save(text, computed)
    assert arrived > 0
    counts = [each.pages(what) for each in flaky for what in ("save", "load")]
    assert any(count.get("unknown_parent") for count in counts), "a chain with a hole was never continued: no test"
    steady = engine(daemon.socket)
    for seed in range(10, 16):
        steady.save(prompt(seed, 150))
        assert steady.load(prompt(seed, 150)) == 150


def test_a_daemon_killed_in_the_middle_costs_hits_only(start: Start, engine: Begin) -> None:
    """kill -9 again and again under two engines: nothing is raised, no page is wrong, and hits come back by themselves."""
    daemon = start(**ROOM)
    engines = [engine(daemon.socket), engine(daemon.socket, "layer_first")]
    over, failures, rounds = Event(), list[BaseException](), [0, 0]

    def use(number: int) -> None:
        rng = random.Random(number)
        try:
            while not over.is_set():
                text = prompt(20 + rng.randrange(4), 200)
                engines[number].load(text)
                engines[number].save(text)
                rounds[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=use, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for life in range(4):
            wait_until(lambda: bool(failures) or min(rounds) > 3 * life)  # noqa: B023
            daemon.kill()
            daemon.start()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failures == []
    for each in engines:
        text = prompt(30, 60)
        wait_until(lambda: each.save(text) == 60)  # noqa: B023
        assert each.load(text) == 60


def test_without_a_daemon_everything_is_a_miss(engine: Begin, tmp_path: Path) -> None:
    """At once, counted, and nothing is raised."""
    alone = engine(tmp_path / "none.sock")
    text = prompt(31, PAGES)
    began = monotonic_seconds()
    assert (alone.load(text), alone.save(text), alone.load(text)) == (0, 0, 0)
    assert monotonic_seconds() - began < 5
    assert alone.pages("lookup") == {"hit": 0, "miss": 256} and alone.pages("save")["refused"] == 128, "one batch each"


def test_a_damaged_page_is_never_served(start: Start, engine: Begin) -> None:
    """One wrong bit on disk: what is before it is loaded, the rest is computed and saved again."""
    daemon = start(**ROOM)
    one = engine(daemon.socket)
    text = prompt(32, 80)
    one.save(text)
    daemon.ask("sync")
    daemon.kill()
    flip_bit_of(one.content(keys_of(text)[33]).numpy().tobytes(), daemon.state)
    daemon.start()
    other = engine(daemon.socket)
    assert other.load(text) == 33
    assert other.save(text) == 80 and other.load(text) == 80


def flip_bit_of(content: bytes, folder: Path) -> None:
    """Turn over one bit of the only place in a folder's files that has this content."""
    found = [(file, file.read_bytes().find(content)) for file in folder.rglob("*") if file.is_file()]
    [(file, at)] = [(file, at) for file, at in found if at >= 0]
    with file.open("r+b") as opened:
        opened.seek(at + len(content) // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


def test_keys_that_are_no_hashes_are_a_miss(start: Start, engine: Begin) -> None:
    """Also indices that are no whole pages: said in the log, counted, and not raised."""
    one = engine(start(**ROOM).socket)
    pages = torch.arange(8)
    assert one.backend.batch_exists(["short", "keys"]) == 0
    assert one.backend.batch_get_v1(["no" * 32] * 2, pages) == [False, False]
    assert one.backend.batch_get_v1(keys_of(prompt(33, 2)), pages + 1) == [False, False]
    assert not one.backend.exists(keys_of(prompt(33, 1))[0])
    assert one.pages("lookup") == {"hit": 0, "miss": 3} and one.pages("load") == {"loaded": 0, "failed": 4}


def test_counts_are_on_the_servers_metrics(start: Start, engine: Begin) -> None:
    """Ours by their names and ranks, and SGLang's own series about its storage."""
    from prometheus_client import REGISTRY, generate_latest

    one = engine(start(**ROOM).socket, enable_storage_metrics=True)
    text = prompt(34, 30)
    one.save(text)
    one.load(text)
    ranks = {"tp_rank": "0", "pp_rank": "0", "dp_rank": "0"}
    sampled = {
        series: REGISTRY.get_sample_value(f"sglang:tierd_{series}_total", {**ranks, label: value})
        for series, label, value in (
            ("lookup_pages", "result", "hit"),
            ("load_pages", "result", "loaded"),
            ("save_pages", "result", "stored"),
            ("copied_bytes", "direction", "stored"),
        )
    }
    page_bytes = one.content("any").nbytes
    assert sampled == {"lookup_pages": 30, "load_pages": 30, "save_pages": 30, "copied_bytes": 30 * page_bytes}
    told = one.storage_backend.get_stats()
    assert (told.prefetch_pgs, told.backup_pgs) == ([30], [30])
    collector = StorageMetricsCollector({"model_name": "model"})
    collector.log_storage_metrics(told)
    assert b'sglang:backup_pgs_count{model_name="model"} 1.0' in generate_latest()
    assert one.storage_backend.get_stats().backup_pgs == []


def wait_until(so: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that other threads or processes do."""
    deadline = monotonic_seconds() + seconds
    while not so():
        assert monotonic_seconds() < deadline, f"it is still not so after {seconds} s"
        Event().wait(0.01)
