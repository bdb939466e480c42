"""`tierd-engine bench`: modes and workloads, interleaved, in one process with one copy of the weights."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console

from tierd.block import HASH_BYTES, ROOT
from tierd.client import Client
from tierd.client.pages import Asked, PageClient
from tierd.clock import monotonic_seconds
from tierd.errors import Busy, Invalid
from tierd.layout import Layout
from tierd.values import size
from tierd_engine.bench.measure import Measured, measure
from tierd_engine.bench.pairs import paired
from tierd_engine.bench.report import html, table
from tierd_engine.bench.workloads import Workload, workloads
from tierd_engine.copying import CopyingMemory
from tierd_engine.demo.processes import Daemon
from tierd_engine.engine import Engine
from tierd_engine.memory import Memory, PrivateMemory
from tierd_engine.model import fingerprint, layout_of, load_model, write_safetensors
from tierd_engine.request import Limits
from tierd_engine.tier import SLOTS_MAX, TierMemory

MODES: dict[str, dict[str, str]] = {
    "off": {},
    "cpu": {"cpu": "1GiB", "nvme": "0"},
    "cpu+nvme": {"cpu": "128MiB", "nvme": "4GiB"},
    "all": {"cpu": "128MiB", "nvme": "4GiB"},
}
"""Without a daemon; with all in its memory; with a memory so small that most comes from disk; and the same below a gpu tier."""
SLOTS_SHARE, PRIVATE_SHARE = 4, 2
"""In the mode "all" the gpu tier holds a quarter of the tokens that the pages hold in others, much less than a workload's;
half as many private pages are beside it, which must fit the longest sequence."""
BLOCK_TOKENS = (8, 16, 32, 64)
SEGMENT_BYTES = 64 << 20
"""The daemon's default: a gpu tier is whole segments."""
WIDTH = 140
FILL_BYTES, FILL_PAGES, FILL_SECONDS_MAX, WAIT_SECONDS = 24 << 20, 64, 30.0, 0.05


class Bench:
    """A loaded model, and fresh memory, scheduler and daemon for every measurement."""

    def __init__(self, model_path: Path, pool_tokens: int) -> None:
        self.model = load_model(model_path)
        self.name = fingerprint(self.model)
        self.vocabulary = self.model.get_input_embeddings().num_embeddings
        self._pool_tokens = pool_tokens

    def measure(self, workload: Workload, mode: str, block_tokens: int, work: Path) -> Measured:
        """Hold a workload's talks with a new engine, and a new daemon if the mode has one."""
        layout = layout_of(self.model, "float32", block_tokens)
        pages = self._pool_tokens // block_tokens
        with ExitStack() as stack:
            memory: Memory = PrivateMemory(layout, pages)
            daemon: Daemon | None = None
            if settings := MODES[mode]:
                sockets = Path(tempfile.mkdtemp(prefix="tierd-bench-"))  # a Unix socket's path must be short
                stack.callback(shutil.rmtree, sockets, ignore_errors=True)
                state = Path(tempfile.mkdtemp(prefix="state-", dir=work))
                stack.callback(shutil.rmtree, state, ignore_errors=True)
                gpu = pages // SLOTS_SHARE * layout.slot_bytes + SEGMENT_BYTES if mode == "all" else 0
                daemon = Daemon(sockets, state, work / "daemon.log", **settings, gpu=gpu // SEGMENT_BYTES * SEGMENT_BYTES)
                stack.callback(daemon.stop)
                daemon.start()
                about: dict[str, Any] = {"model": self.name, "layout": layout}
                with Client(daemon.socket, **about) as filler:
                    fill(filler, layout, size(1, 1 << 40)(settings["cpu"]))
                if mode == "all":
                    client = PageClient(daemon.socket, **about, pages_max=SLOTS_MAX, private_pages=pages // PRIVATE_SHARE)
                    fill_pages(client, gpu // layout.slot_bytes)
                    memory = TierMemory(layout, client)
                else:
                    memory = CopyingMemory(layout, pages, Client(daemon.socket, **about))
                daemon.sync()
            engine = Engine(self.model, memory, Limits(), frozenset())
            stack.callback(engine.close)
            return measure(engine, workload, daemon.cpu_seconds if daemon else lambda: 0.0)


def run(options: argparse.Namespace) -> int:
    """Measure, print tables, write reports."""
    modes = options.modes.split(",")
    if unknown := set(modes) - set(MODES):
        raise Invalid(f"bench: unknown mode {min(unknown)!r}; there are {', '.join(MODES)}")
    if options.rounds < 1 or not 0 < options.scale <= 100:
        raise Invalid(f"bench: {options.rounds} rounds at scale {options.scale}; at least 1 and up to 100 are needed")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    notes = Console(stderr=True, highlight=False)
    with ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix="bench-", dir=options.work_dir)).resolve()
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        bench = Bench(quick_to_load(options.model, work), options.pool_tokens)
        report: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "pool_tokens": options.pool_tokens}
        notes.print(describe(report["machine"]))
        cases = list(plan(bench, options, modes))
        found: dict[tuple[str, str, int], list[Measured]] = {}
        for done, (workload, mode, block_tokens) in enumerate(cases, 1):
            measured = bench.measure(workload, mode, block_tokens, work)
            found.setdefault((workload.name, mode, block_tokens), []).append(measured)
            text = f"{measured.seconds:6.1f} s, first token {measured.first_token_p50_seconds:.3f} s"
            notes.print(f"{done}/{len(cases)} {workload.name}, {mode}, blocks of {block_tokens}: {text}")
    report["results"] = [
        {"workload": name, "mode": mode, "block_tokens": block, "median": middle(rounds).to_map()}
        | {"rounds": [one.to_map() for one in rounds]}
        for (name, mode, block), rounds in found.items()
    ]
    report["paired"] = [
        paired(name, mode, rounds, found[name, "off", block]).to_map()
        for (name, mode, block), rounds in found.items()
        if mode != "off" and (name, "off", block) in found
    ]
    out = Console(width=WIDTH)
    for shown in table(report):
        out.print(shown)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.html:
        options.html.write_text(html(report, describe(report["machine"])))
    return 0


def plan(bench: Bench, options: argparse.Namespace, modes: list[str]) -> Iterator[tuple[Workload, str, int]]:
    """All measurements in order: rounds outermost, modes innermost, so that a slow minute hits all modes alike."""
    for number in range(options.rounds):
        for workload in workloads(bench.vocabulary, options.scale, seed=number):
            if options.only in (None, workload.name):
                ordered = modes if number % 2 == 0 else modes[::-1]
                yield from ((workload, mode, 16) for mode in ordered)
        if options.only is None:
            reuse = workloads(bench.vocabulary, options.scale, seed=number)[0]
            mode = "cpu" if "cpu" in modes else modes[-1]
            yield from ((reuse, mode, block_tokens) for block_tokens in BLOCK_TOKENS if block_tokens != 16)


def fill(client: Client, layout: Layout, size: int) -> None:
    """Fill the cpu tier with other blocks, as a daemon that has run for a while is: measured is what goes on then.

    An empty tier grows with every block, once in its life. That costs the zeroing of memory, and on a virtual machine whose
    hypervisor takes back what is free some 2 ms of CPU time a MiB.
    """
    blocks = FILL_BYTES // layout.block_bytes
    pool = np.ones((blocks, layout.block_bytes), np.uint8)
    for _ in range(0, size, pool.nbytes):
        client.store(os.urandom(blocks * HASH_BYTES), pool, range(blocks))


def fill_pages(client: PageClient, pages: int) -> None:
    """The same for a gpu tier of so many pages."""
    deadline = monotonic_seconds() + FILL_SECONDS_MAX
    while pages > 0:
        reserved = client.reserve(min(pages, FILL_PAGES))
        wait(client, reserved, deadline)
        names = os.urandom(len(reserved.pages) * HASH_BYTES)
        wait(client, client.commit(reserved.pages, (ROOT + names)[: len(names)], names), deadline)
        client.release(reserved.pages)
        pages -= len(reserved.pages)


def wait(client: PageClient, asked: Asked, deadline: float) -> None:
    """Until there is an answer, or for a moment where there cannot be one yet; Busy when it takes too long."""
    if monotonic_seconds() > deadline:
        raise Busy(f"the gpu tier could not be filled within {FILL_SECONDS_MAX:g} s: see the daemon's log")
    client.poll()
    while not asked.done:
        client.wait(WAIT_SECONDS)
        client.poll()


def middle(rounds: list[Measured]) -> Measured:
    """The median of every number."""
    values = {
        name: median(getattr(one, name) for one in rounds)
        for name, value in rounds[0].to_map().items()
        if isinstance(value, int | float)
    }
    tiers = {tier for one in rounds for tier in one.blocks_by_tier}
    values["blocks_by_tier"] = {tier: median(one.blocks_by_tier.get(tier, 0) for one in rounds) for tier in sorted(tiers)}
    return replace(rounds[0], **values)


def quick_to_load(model: Path, work: Path) -> Path:
    """A GGUF is dequantised once; the warm start is the same for all."""
    if (model / "config.json").exists():
        return model
    write_safetensors(model, work / "model")
    return work / "model"


def machine() -> dict[str, Any]:
    """What this runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": gibibytes,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch_threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "command": " ".join(sys.argv[1:]),
    }


def describe(found: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB, Linux {found['kernel']}, "
        f"Python {found['python']}, torch {found['torch']} with {found['torch_threads']} threads; "
        f"load {found['load_at_start']:.1f} at the start"
    )
