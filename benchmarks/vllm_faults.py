"""What a damaged, full or killed store does to vLLM's answers: `python -m benchmarks.vllm_faults`, after `make test-vllm`.

tierd and vLLM's ExampleConnector, which keeps a prompt in files, get the same prompts of a model whose every block matters.
What they say is compared with an engine that has no store.

damaged     in every 128 KiB of the store's files a sector is overwritten with another one of that file, as by a write that went
            to a wrong place, between two lives of the engine
full disk   the store's folder is a file system with room for a third of what the prompts need; needs root
kill -9     of the engine and of the store while it writes
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.daemon.harness import Daemon, settings
from tests.vllm.conftest import BLOCK_TOKENS, transfer, write_random_model
from tests.vllm.engine import Engine
from tierd.clock import monotonic_seconds

MEBI = 1 << 20
PROMPTS = [random.Random(seed).choices(range(512), k=20 * BLOCK_TOKENS + 3) for seed in range(24)]
"""Of 20 blocks of 64 KiB, 30 MiB in all."""
SAID = 8
FULL_BYTES = 10 * MEBI
STRIDE_BYTES, HEAD_BYTES, SECTOR_BYTES = 128 << 10, 64 << 10, 512
WRITES_SECONDS_MAX = 30.0


class Tierd:
    """A daemon with 48 MiB of memory, and files in `folder`."""

    def __init__(self, folder: Path) -> None:
        (folder / "state").mkdir(parents=True, exist_ok=True)
        flags = {"cpu_bytes": 48 * MEBI, "nvme_bytes": 64 * MEBI, "cpu_segment_bytes": 4 * MEBI, "nvme_segment_bytes": 4 * MEBI}
        self.files = folder / "state"
        self._daemon = Daemon(folder, settings(**flags, cpu_huge_pages="off")).start()
        self.transfer = transfer(self._daemon.socket)

    def has_written(self) -> bool:
        """Whether anything was stored."""
        return bool(self._daemon.slots("cpu").get("ready"))

    def restart(self) -> None:
        """A new life; what it had in memory is in files."""
        self.end()
        self._daemon.start()

    def kill(self) -> None:
        """kill -9, and a new life."""
        self._daemon.kill()
        self._daemon.start()

    def end(self) -> None:
        """Stop."""
        self._daemon.end()


class Files:
    """ExampleConnector's folder: nothing runs."""

    def __init__(self, folder: Path) -> None:
        self.files = folder / "state"
        self.files.mkdir(parents=True, exist_ok=True)
        extra = {"shared_storage_path": str(self.files)}
        self.transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}

    def has_written(self) -> bool:
        """Whether there is a file."""
        return any(file.stat().st_size > HEAD_BYTES for file in self.files.rglob("*.safetensors"))

    def restart(self) -> None:
        """Nothing to restart."""

    kill = end = restart


Store = Tierd | Files


def damaged(bench: Bench, store: Store) -> None:
    """Filled, damaged, and asked by the next life."""
    bench.life("filled", store)
    store.end()
    sectors = 0
    for file in store.files.rglob("*"):
        if file.is_file():
            with open(file, "r+b") as opened:
                for at in range(HEAD_BYTES, file.stat().st_size - SECTOR_BYTES, STRIDE_BYTES):
                    opened.seek(at - HEAD_BYTES // 2)
                    other = opened.read(SECTOR_BYTES)
                    opened.seek(at)
                    opened.write(other)
                    sectors += 1
    print(f"    {sectors} sectors were overwritten")
    store.restart()
    bench.life("asked again", store)


def full_disk(bench: Bench, store: Store) -> None:
    """Filled beyond what there is room for, and asked again, the last prompts first: what was asked for last is kept."""
    bench.life("filled", store)
    store.restart()
    kept = sum(file.stat().st_blocks * 512 for file in store.files.rglob("*") if file.is_file())
    print(f"    {kept / MEBI:.1f} of {FULL_BYTES / MEBI:.1f} MiB are in files")
    bench.life("asked again", store, step=-1)


def killed(bench: Bench, store: Store) -> None:
    """Killed as soon as the store has written something, and asked by the next life."""
    with bench.engine(store.transfer) as engine:
        engine.run([[1, 2, 3]])  # what is set up with the first request
        engine.ask(PROMPTS, max_tokens=SAID)
        deadline = monotonic_seconds() + WRITES_SECONDS_MAX
        while not store.has_written():
            assert monotonic_seconds() < deadline, "nothing was written"
        engine.kill()
    store.kill()
    bench.life("asked again", store)


SCENES: dict[str, Callable[[Bench, Store], None]] = {"damaged": damaged, "full disk": full_disk, "kill -9": killed}


class Bench:
    """Engines of one model, and what one without a store says."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lives = folder, 0
        (folder / "model").mkdir()
        self._model = write_random_model(folder / "model")
        with self.engine(None) as plain:
            self._expected = plain.run(PROMPTS, max_tokens=SAID)["tokens"]

    def engine(self, kv_transfer: dict[str, Any] | None) -> Engine:
        """One that computes prompt by prompt, and keeps few itself."""
        given = {"kv_transfer_config": kv_transfer} if kv_transfer else {}
        return Engine(
            self._folder / "log",
            model=str(self._model),
            skip_tokenizer_init=True,
            dtype="float32",
            block_size=BLOCK_TOKENS,
            max_model_len=1024,
            max_num_seqs=1,
            kv_cache_memory_bytes=4 * MEBI,
            enforce_eager=True,
            **given,
        )

    def life(self, what: str, store: Store, step: int = 1) -> None:
        """An engine that is asked prompt by prompt, backwards with `step` -1; prints what became of it."""
        right = wrong = cached = 0
        ended = ""
        with self.engine(store.transfer) as engine:
            for prompt, expected in zip(PROMPTS[::step], self._expected[::step], strict=True):
                try:
                    answer = engine.run([prompt], max_tokens=SAID)
                except (AssertionError, OSError):
                    ended = f", and the engine ended at prompt {right + wrong + 1}"
                    break
                right += answer["tokens"] == [expected]
                wrong += answer["tokens"] != [expected]
                cached += answer["cached"][0]
        print(f"    {what}: {right} right and {wrong} wrong answers, {cached} tokens from the store{ended}", flush=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own on the folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES},mode=0700", "tierd-bench", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def main() -> None:
    """The command."""
    with tempfile.TemporaryDirectory(prefix="tierd-", dir="/tmp") as name:
        bench = Bench(Path(name))
        for scene in sys.argv[1:] or SCENES:
            for make in (Tierd, Files):
                print(f"{scene}, {make.__name__.lower()}", flush=True)
                folder = Path(name, f"{scene.split()[0]}-{make.__name__.lower()}")
                with ExitStack() as stack:
                    if scene == "full disk":
                        stack.enter_context(small_disk(folder / "state"))
                    store = make(folder)
                    stack.callback(store.end)
                    SCENES[scene](bench, store)


if __name__ == "__main__":
    main()
