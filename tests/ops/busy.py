"""A daemon with everything to do: two namespaces, more blocks than fit, a disk that lies, requests that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from select import select
from threading import Event

from tests.daemon.harness import SEGMENT_BYTES, Daemon, hashes_of, settings
from tierd.clock import monotonic_seconds
from tierd.errors import TierdError

PROMPTS, BLOCKS_MAX = 40, 120
PAUSE_SECONDS = 0.02
DAMAGE_EVERY_SECONDS = 10.0


def small_daemon(folder: Path, **values: object) -> Daemon:
    """A daemon in a folder of its own, not started: one MiB of memory, four of disk."""
    folder.mkdir(exist_ok=True)
    sizes = {
        "cpu_bytes": 4 * SEGMENT_BYTES,
        "cpu_segment_bytes": SEGMENT_BYTES,
        "cpu_huge_pages": "off",
        "nvme_bytes": 16 * SEGMENT_BYTES,
        "nvme_segment_bytes": SEGMENT_BYTES,
        "metrics_per_namespace": "true",
    }
    return Daemon(folder, settings(**{**sizes, **values}))


@contextmanager
def under_load(daemon: Daemon) -> Iterator[None]:
    """Two engines of different models work as long as this lasts; at the end it is seen that nothing went wrong with them."""
    stop = Event()
    with ThreadPoolExecutor(3) as pool:
        at_work = [pool.submit(converse, daemon, model, stop) for model in ("llama", "qwen")]
        at_work.append(pool.submit(damage, daemon, stop))
        try:
            yield
        finally:
            stop.set()
        for worker in at_work:
            worker.result()


def converse(daemon: Daemon, model: str, stop: Event) -> None:
    """Prompts of which some are much more frequent than others: look up, load, store what is missing; every byte that is loaded
    is checked.
    """
    random = Random(model)
    turns = 0
    while not stop.is_set():
        with daemon.peer(model=model, client=f"engine {model}") as wire:
            daemon.ask("quota", namespace=wire.welcome["namespace"].hex(), tier="cpu", min=SEGMENT_BYTES)
            for _ in range(200):
                if stop.is_set():
                    break
                prompt = int(PROMPTS * random.random() ** 3)
                chain = hashes_of(1000 * (model == "qwen") + prompt + 1, random.randrange(20, BLOCKS_MAX))
                if turns % 5 == 0:
                    wire.ask("prefetch", hashes=chain, parent=bytes(32))
                with suppress(TierdError):  # busy, or a block that the disk lost: a miss
                    wire.load(chain)
                    wire.store(chain)
                if turns % 20 == 0:
                    with suppress(TierdError):
                        wire.ask("commit", lease=1 << 40)
                turns += 1
                select([], [], [], PAUSE_SECONDS * random.random())


def damage(daemon: Daemon, stop: Event) -> None:
    """Once in a while the middle of a segment file is zeros; scrubbing finds it, unless a load did."""
    due = monotonic_seconds() + DAMAGE_EVERY_SECONDS / 2
    while not stop.wait(0.1):
        files = sorted((daemon.state / "nvme").rglob("*.slots"))
        if monotonic_seconds() > due and files:
            with open(files[0], "r+b", buffering=0) as file:
                file.seek(SEGMENT_BYTES // 4)
                file.write(bytes(SEGMENT_BYTES // 2))
            daemon.run("scrub", "start")
            due += DAMAGE_EVERY_SECONDS
