"""The daemon from start to stop: what is opened in order is closed in reverse.

SIGTERM drains: nothing new is taken, what was admitted is written back for at most `drain_seconds_max`, then everything closes.
A second one stops at once; nothing is lost by that but what was not yet on NVMe.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from contextlib import AsyncExitStack, suppress

import uvloop

from tierd import __version__, clock, history, lag, log, systemd
from tierd.admin import Admin
from tierd.adopt import adopt
from tierd.config import KEYS, Config
from tierd.errors import Busy, Invalid
from tierd.exporter import Exporter
from tierd.keeper import Keeper
from tierd.layout import Namespace
from tierd.metrics import Metrics
from tierd.server import Server
from tierd.service import Service
from tierd.space import Space
from tierd.tiers import io
from tierd.tiers.io.probe import probe
from tierd.tiers.state import StateDirectory
from tierd.tiers.tier import MemoryTier, NvmeTier, Tier

logger = log.get_logger("daemon")


def run(config: Config) -> int:
    """Serve until a signal ends it; returns the process's exit code. Raises Invalid and Busy when it cannot start."""
    log.configure(config.log.level, config.log.format)
    config.prepare()
    yield_to_clients()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(config))


def yield_to_clients() -> None:
    """Do not preempt whoever wakes us (docs/decisions/0006): a client that sends a request goes on copying meanwhile."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


async def serve(config: Config) -> int:
    """The daemon's life on a running loop."""
    started = clock.monotonic_seconds()
    serving, stop = asyncio.Event(), asyncio.Event()
    async with AsyncExitStack() as stack:
        state = StateDirectory(config.server.state_dir, config.nvme.path if config.nvme.bytes else None)
        stack.callback(state.close)
        previous = await history.begin(config.server.state_dir, clock.unix_milliseconds())
        tiers, path = open_tiers(config, state)
        keeper = Keeper(tiers, config.nvme.io_threads)
        stack.push_async_callback(keeper.close)

        def space_of(namespace: Namespace) -> Space:
            if namespace.id not in keeper.spaces:
                policy = config.policy
                space = Space(namespace, tiers, policy.promotion_window_share, config.nvme.write_back)
                keeper.spaces[namespace.id] = space
            return keeper.spaces[namespace.id]

        adopted = adopt(tiers, systemd.inherited(), space_of, clock.unix_milliseconds())
        began = clock.unix_milliseconds() / 1000
        metrics = Metrics(keeper, path, {"kept": adopted.kept, **adopted.lost}, began, config.metrics.per_namespace)
        service = Service(config, keeper, metrics, space_of)

        def health() -> tuple[bool, str]:
            if stop.is_set() or not serving.is_set():
                return False, "draining" if stop.is_set() else "starting"
            return True, f"ready\nio {path[0]} {path[1]}"

        exporter = open_exporter(Exporter(metrics.registry, health, config.metrics.listen, scraped=metrics.scraped))
        stack.callback(exporter.close)
        admin = Admin(config, keeper, metrics, path, exporter.address, stop.set)
        for space in keeper.spaces.values():
            for session in space.sessions.values():
                service.watch(session)
        server = config.server
        data = Server(server.socket, server.socket_mode, service, config.limits, admin=False)
        control = Server(server.admin_socket, 0o600, admin, config.limits, admin=True)
        local = Exporter(metrics.registry, health, config.metrics.socket, server.socket_mode, metrics.scraped)
        await control.start()
        stack.push_async_callback(control.close)
        local.start()
        stack.callback(local.close)
        await data.start()  # last, so that who can connect finds all the rest
        stack.push_async_callback(data.close)
        background, watching = asyncio.create_task(keeper.run()), asyncio.create_task(lag.watch(metrics.lag))
        for task in (background, watching):
            stack.callback(task.cancel)
        gc.freeze()  # what lives as long as the daemon is not worth looking through again
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, stop)
        serving.set()
        systemd.ready()
        seconds = clock.monotonic_seconds() - started
        logger.info(
            "ready", version=__version__, socket=server.socket, io=path[0], path=path[1], previous=previous, seconds=seconds
        )
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, background}, return_when=asyncio.FIRST_COMPLETED)
        if background.done():
            stopped.cancel()
            background.result()  # a bug: crash, and let the next life recover
        systemd.stopping()
        logger.info("draining", unwritten=keeper.unwritten())
        service.drain()
        deadline = clock.monotonic_seconds() + config.limits.drain_seconds_max
        with suppress(Busy):
            while keeper.unwritten():  # what was begun before may be committed meanwhile
                await keeper.sync(deadline)
    await history.end(config.server.state_dir, clock.unix_milliseconds())
    logger.info("stopped", unwritten=keeper.unwritten())
    return 0


def on_signal(stop: asyncio.Event) -> None:
    """The first signal drains, the second ends the process where it stands."""
    if stop.is_set():
        os._exit(128 + signal.SIGTERM)
    stop.set()


def open_exporter(exporter: Exporter) -> Exporter:
    """Start to serve metrics, if they are wanted; a taken address that nobody chose is no reason not to serve blocks."""
    try:
        if exporter.listen:
            exporter.start()
    except Invalid as error:
        if exporter.listen != KEYS["metrics.listen"]["default"]:
            raise
        logger.warning("no metrics and no health checks", reason=str(error))
    return exporter


def open_tiers(config: Config, state: StateDirectory) -> tuple[list[Tier], tuple[str, str]]:
    """The configured tiers, and which io engine and path NVMe is reached by."""
    gpu, cpu, nvme = config.gpu, config.cpu, config.nvme
    tiers: list[Tier] = [MemoryTier("cpu", cpu.bytes, cpu.segment_bytes, cpu.huge_pages)]
    if gpu.bytes:  # its pages lie side by side in an engine's memory: no rounding to huge ones
        tiers.insert(0, MemoryTier("gpu", gpu.bytes, gpu.segment_bytes, "off"))
    if not nvme.bytes:
        return tiers, ("none", "none")
    choice = probe(state.nvme_path, nvme.io_engine, nvme.probe_seconds_max, nvme.io_threads)
    path = "direct" if choice.direct else "buffered"
    logger.info("io engine", engine=choice.engine, path=path, reason=choice.reason)
    tiers.append(NvmeTier(nvme.bytes, nvme.segment_bytes, state, io.make(choice.engine, nvme.io_threads)))
    return tiers, (choice.engine, path)
