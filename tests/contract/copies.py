"""What a process does whose pages are on a GPU; the driver is the stub.

`python -m tests.contract.copies SCENARIO SOCKET KIND` prints JSON.

A scenario returns what its test wants to know. Files in the folder `$STUB` make copies late, fail or be refused.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.measure import Machine
from benchmarks.gpu.service import STAGED, through_daemon
from tests.daemon.harness import LAYOUT, hashes_of, payload_of
from tests.unit import fake_daemon
from tests.unit.test_client_mapping import mapped
from tierd.block import split
from tierd.client import Client
from tierd.client.pinned import CopyEngines
from tierd.client.transfer import Copier, locate
from tierd.clock import monotonic_seconds
from tierd_engine.copying import CopyingMemory
from tierd_engine.device import DevicePages, views_of
from tierd_engine.llm import LLM
from tierd_kernels.pages import Pages, scatter_twin

BLOCKS, PAGES = 20, 48
STREAMS = (17, 18)
SECONDS_MAX = 20.0
STUB = Path(os.environ.get("STUB", "."))


def make_pages(kind: str, layout: Any = LAYOUT, dtype: torch.dtype = torch.float16) -> DevicePages:
    """Pages of zeros: "one run" has a block in one piece, "staged" has keys and values in tensors of their own."""
    shape = layout.kv_heads, layout.block_tokens, layout.head_dim
    if kind == "one run":
        views = views_of(torch.zeros(PAGES, layout.layers, 2, *shape, dtype=dtype))
    else:
        views = [torch.zeros(PAGES, *shape, dtype=dtype) for _ in range(2 * layout.layers)]
    pool = DevicePages(Pages(views), CopyEngines(0), STREAMS, lambda: 0)
    assert pool.contiguous == (kind == "one run")
    return pool


def put(pool: DevicePages, hashes: bytes, first: int = 0) -> list[int]:
    """Compute blocks in pages from `first` on; returns these."""
    blocks = torch.from_numpy(np.stack([payload_of(name) for name in split(hashes)]))
    pages = torch.arange(first, first + len(blocks))
    scatter_twin(blocks, torch.arange(len(blocks)), pool._pages, pages)
    return pages.tolist()


def right(pool: DevicePages, hashes: bytes, pages: list[int]) -> list[bool]:
    """Which pages hold the blocks that they should."""
    rows = [torch.stack([view[page] for view in pool._pages.views]).contiguous() for page in pages]
    found = [row.view(-1).view(torch.uint8).numpy() for row in rows]
    return [bool((row == payload_of(name)).all()) for row, name in zip(found, split(hashes), strict=True)]


def until(so: Callable[[], object]) -> None:
    """Wait until it is so."""
    deadline, never = monotonic_seconds() + SECONDS_MAX, Event()
    while not so():
        assert monotonic_seconds() < deadline, "it is still not so"
        never.wait(0.002)


def settled(client: Client) -> None:
    """Wait until every segment that is mapped is registered, or refused."""
    segments = client.session.segments
    until(lambda: segments._mappings and not any(mapping.users for mapping in segments._mappings.values()))


def calls() -> dict[str, int]:
    """Calls that the driver took so far."""
    library = ctypes.CDLL("libcuda.so.1")
    return {name: ctypes.c_int.in_dll(library, f"stub_{name}").value for name in ("batches", "singles")}


def switch(name: str, on: bool) -> None:
    """Change what the driver does."""
    (STUB / name).touch() if on else (STUB / name).unlink()


def in_thread(call: Callable[..., Any], *given: Any) -> Future[Any]:
    """A worker's call."""
    return ThreadPoolExecutor(1).submit(call, *given)


def there_and_back(socket: str, kind: str) -> Any:
    """Store before segments are registered and after; load all."""
    hashes, late = hashes_of(1, BLOCKS), hashes_of(2, BLOCKS)
    with Client(socket, model="model", layout=LAYOUT, deadline_seconds=5) as client:
        pool = make_pages(kind)
        first = client.store(hashes, pool.now(), put(pool, hashes))
        before = calls()
        client.pin(pool.pins)
        settled(client)
        second = client.store(late, pool.now(), put(pool, late))
        pages = list(range(PAGES - BLOCKS, PAGES))
        loaded = client.load(hashes, pool.now(), pages)
        good = right(pool, hashes, pages)
        loaded_too = client.load(late, pool.now(), pages[::-1])
        good += right(pool, late, pages[::-1])
        after, statistics = calls(), client.statistics
    return {
        "stored": [first.stored, second.stored],
        "loaded": [loaded, loaded_too],
        "good": all(good),
        "before": before,
        "after": after,
        "pinned": statistics["segments_pinned"],
        "refused": statistics["pins_refused"],
        "failures": statistics["failures"],
        "left": pool.pins.statistics()["segments_pinned"],
    }


def late_load(socket: str, kind: str) -> Any:
    """While copies do not end, the load does not, and the client says that it holds their slots."""
    hashes = hashes_of(1, BLOCKS)
    with Client(socket, model="model", layout=LAYOUT, deadline_seconds=5) as client:
        pool = make_pages(kind)
        client.pin(pool.pins)
        client.store(hashes, pool.now(), put(pool, hashes))
        settled(client)
        switch("late", True)
        pages = list(range(PAGES - BLOCKS, PAGES))
        load = in_thread(client.load, hashes, pool.now(), pages)
        until(lambda: client.session.segments._copies)
        until(lambda: calls()["batches"])
        early, held = load.done(), len([1 for copy in client.session.segments._copies for _ in copy.held()])
        any_right = any(right(pool, hashes, pages))
        switch("late", False)
        loaded = load.result(SECONDS_MAX)
        return {"early": early, "held": held, "any": any_right, "loaded": loaded, "good": all(right(pool, hashes, pages))}


def late_store(socket: str, kind: str) -> Any:
    """While copies do not end, nothing is committed: nobody finds the blocks."""
    hashes, known = hashes_of(1, BLOCKS), hashes_of(2, 1)
    with (
        Client(socket, model="model", layout=LAYOUT, deadline_seconds=5) as client,
        Client(socket, model="model", layout=LAYOUT, deadline_seconds=5) as other,
    ):
        pool = make_pages(kind)
        client.pin(pool.pins)
        client.store(known, pool.now(), put(pool, known))
        settled(client)
        switch("late", True)
        store = in_thread(client.store, hashes, pool.now(), put(pool, hashes))
        until(lambda: client.session.segments._copies)
        until(lambda: calls()["batches"])
        with other.lookup(hashes) as found:
            early = found.blocks
        early_done = store.done()
        switch("late", False)
        stored = store.result(SECONDS_MAX).stored
        rows = np.zeros((BLOCKS, LAYOUT.block_bytes), np.uint8)
        loaded = other.load(hashes, rows, range(BLOCKS))
        expected = np.stack([payload_of(name) for name in split(hashes)])
        return {"early": early, "done": early_done, "stored": stored, "loaded": loaded, "good": bool((rows == expected).all())}


def failing(socket: str, kind: str) -> Any:
    """Copies fail, then are refused half-way, then work again."""
    hashes, others = hashes_of(1, BLOCKS), hashes_of(2, BLOCKS)
    result: dict[str, Any] = {}
    with Client(socket, model="model", layout=LAYOUT, deadline_seconds=5) as client:
        pool = make_pages(kind)
        client.pin(pool.pins)
        client.store(hashes, pool.now(), put(pool, hashes))
        settled(client)
        for how in ("fail", "refuse"):
            switch(how, True)
            result[how] = [
                client.load(hashes, pool.now(), range(BLOCKS)),
                client.store(others, pool.now(), range(BLOCKS)).refused,
            ]
            switch(how, False)
        result["failures"] = client.statistics["failures"]
        pages = list(range(BLOCKS))
        result["after"] = [client.load(hashes, pool.now(), pages), all(right(pool, hashes, pages))]
        result["after"] += [client.store(others, pool.now(), put(pool, others)).stored, repr(client.session.segments)]
    return result


def killed(socket: str, kind: str) -> Any:
    """Say when a store is on its way, which never ends."""
    hashes, known = hashes_of(1, BLOCKS), hashes_of(2, 1)
    client = Client(socket, model="model", layout=LAYOUT, deadline_seconds=5)
    pool = make_pages(kind)
    client.pin(pool.pins)
    client.store(known, pool.now(), put(pool, known))
    settled(client)
    switch("late", True)
    store = in_thread(client.store, hashes, pool.now(), put(pool, hashes))
    until(lambda: client.session.segments._copies)
    print("under way", flush=True)
    store.result(600)


def rewritten(socket: str, kind: str) -> Any:
    """Blocks 7 on are given to others while their copies are late: not a daemon's doing, so the segment is our own."""
    layout = fake_daemon.LAYOUT
    segment = fake_daemon.make_segment(BLOCKS)
    segment.slots[:] = 5
    segment.directory.begin(np.arange(BLOCKS), bytes(32 * BLOCKS), bytes(32 * BLOCKS))
    segment.directory.ready(np.arange(BLOCKS))
    mapping = mapped(segment)
    pool = make_pages(kind, layout, torch.float32)
    registered = Event()
    pool.pins.add(mapping, registered.set)
    registered.wait(SECONDS_MAX)
    switch("late", True)
    parts = locate(np.arange(BLOCKS, dtype=np.int32), len(segment.slots), {0: mapping})
    load = in_thread(Copier(layout.block_bytes, 1).load, parts, pool.now(), np.arange(BLOCKS))
    until(lambda: calls()["batches"])
    segment.directory.free([7])
    switch("late", False)
    counted = load.result(SECONDS_MAX)
    mapping.close()
    segment.close()
    return {"counted": counted, "left": pool.pins.statistics()["segments_pinned"]}


def measured(socket: str, kind: str) -> Any:
    """The measurements of `make gpu` that go through client and daemon, which is their own; small: no figure means anything."""

    def pools(_: Machine, whole: torch.Tensor) -> dict[str, Any]:
        views = {"one run": views_of(whole), STAGED: [view.clone() for view in views_of(whole)]}
        return {name: DevicePages(Pages(some), CopyEngines(0), STREAMS, lambda: 0) for name, some in views.items()}

    return {"names": [result.name for result in through_daemon(Machine("cpu", scale=1e-3), pools)], "calls": calls()}


def engine(socket: str, path: str) -> Any:
    """A cold and a warm answer of engines whose pages are said to be on a GPU, in either dtype; the model is random."""
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        answers, hits = [], []
        for _ in range(2):
            with LLM(path, pages=32, dtype=dtype, chunk_tokens=96, connect=partial(Client, socket)) as llm:
                assert isinstance(llm.memory, CopyingMemory)
                pages = Pages(views_of(llm.memory.tensor))
                llm.memory.use(DevicePages(pages, CopyEngines(0), STREAMS, lambda: 0))
                for _ in range(2):
                    llm.engine.scheduler.prefill_tokens_per_second = 0.0  # not measured yet: every load is worth its time
                    answer = llm.generate(list(range(100)), 10)
                    answers.append(answer.tokens)
                    hits.append(answer.hit_tokens)
                    llm.check()
                pinned = llm.client.statistics["segments_pinned"] if llm.client else 0
        found[dtype] = {"hits": hits, "different": len({tuple(tokens) for tokens in answers}), "pinned": pinned}
    return found | {"calls": calls()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    scenario: Callable[[str, str], Any] = globals()[sys.argv[1]]
    print(json.dumps(scenario(sys.argv[2], sys.argv[3])), flush=True)
