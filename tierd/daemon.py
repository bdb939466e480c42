"""The daemon from start to stop: what is opened in order is closed in reverse.

SIGTERM drains: nothing new is taken, what was admitted is written back for at most `drain_seconds_max`, then everything closes.
A second one stops at once; nothing is lost by that but what was not yet on NVMe.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

import uvloop

from tierd import __version__, clock, history, lag, log, systemd, watchdog
from tierd.admin import Admin
from tierd.adopt import adopt
from tierd.config import KEYS, Config
from tierd.cuda import Device
from tierd.devices import gpu_number, host_id, tier_names
from tierd.endurance import Endurance
from tierd.errors import Busy, Invalid
from tierd.exporter import Exporter
from tierd.keeper import Keeper
from tierd.kept import Kept
from tierd.layout import Namespace
from tierd.metrics import Metrics
from tierd.page import page
from tierd.pinboard import Pinboard
from tierd.quotas import Quotas
from tierd.recent import Recent
from tierd.recorder import Recorder
from tierd.reload import Reloader
from tierd.scrub import Scrub
from tierd.server import Server
from tierd.service import Service
from tierd.space import Space
from tierd.status import Status
from tierd.tiers import io
from tierd.tiers.gds import Measured, measure_all
from tierd.tiers.io import cufile
from tierd.tiers.io.probe import Choice, probe
from tierd.tiers.kernels import DeviceDigests
from tierd.tiers.paths import Paths
from tierd.tiers.pins import Pins
from tierd.tiers.state import StateDirectory
from tierd.tiers.tier import DeviceTier, MemoryTier, NvmeTier, Tier
from tierd.values import MIB, size_text

logger = log.get_logger("daemon")
CLOSE_SECONDS_MAX = 60.0
"""What closing may take after the drain: transfers under way are waited for."""


def run(load: Callable[[], Config]) -> int:
    """Serve until a signal ends it; returns the process's exit code. Raises Invalid and Busy when it cannot start.

    `load` reads the configuration, now and at every reload.
    """
    config = load()
    log.configure(config.log.level, config.log.format)
    config.prepare()
    yield_to_clients()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(config, load))


def yield_to_clients() -> None:
    """Do not preempt whoever wakes us (docs/decisions/0006): a client that sends a request goes on copying meanwhile."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


async def serve(config: Config, load: Callable[[], Config]) -> int:
    """The daemon's life on a running loop."""
    started = clock.monotonic_seconds()
    serving, stop = asyncio.Event(), asyncio.Event()
    async with AsyncExitStack() as stack:
        state = StateDirectory(config.server.state_dir, config.nvme.path if config.nvme.bytes else None)
        stack.callback(state.close)
        previous = await history.begin(config.server.state_dir, clock.unix_milliseconds())
        gpus = open_gpus(config)
        pins = Pins(gpus[0]) if gpus else None
        tiers, way = open_tiers(config, state, gpus, pins)
        now = clock.unix_milliseconds()
        endurance = Endurance(config.server.state_dir, config.nvme.write_bytes_per_day, now)
        quotas = Quotas(config.server.state_dir)
        keeper = Keeper(tiers, config.nvme.io_threads, endurance)
        stack.push_async_callback(keeper.close)
        if pins:
            stack.callback(pins.close)

        def space_of(namespace: Namespace) -> Space:
            if namespace.id not in keeper.spaces:
                policies = {"gpu": config.gpu.policy, "cpu": config.cpu.policy, "nvme": config.nvme.policy}
                window_share, nvme = config.policy.promotion_window_share, config.nvme
                space = Space(namespace, tiers, window_share, nvme.write_back, policies, nvme.admission)
                space.allot(quotas.of(namespace.id))
                keeper.spaces[namespace.id] = space
            return keeper.spaces[namespace.id]

        inherited = systemd.inherited()
        data_socket, metrics_socket = (listening(inherited, name) for name in (systemd.DATA_SOCKET, systemd.METRICS_SOCKET))
        adopted = adopt(tiers, inherited, space_of, clock.unix_milliseconds())
        pinboard = Pinboard(keeper, config.server.state_dir, config.policy.pinned_share)
        pinboard.restore()
        began = clock.unix_milliseconds() / 1000
        metrics = Metrics(keeper, way, {"kept": adopted.kept, **adopted.lost}, began, config.metrics.per_namespace)
        recorder = Recorder()
        status, recent = Status(config, keeper, metrics, recorder, way), Recent(keeper, metrics)
        kept = Kept()
        stack.callback(kept.close)
        service = Service(config, keeper, metrics, kept, recorder, pinboard, space_of)

        def configure(config: Config) -> None:
            service.config = config
            scrub.bytes_per_second = config.nvme.scrub_bytes_per_second
            log.configure(config.log.level, config.log.format)

        scrub = Scrub(keeper, config.nvme.scrub_bytes_per_second)
        stack.push_async_callback(scrub.close)
        reloader = Reloader(config, load, configure)

        def health() -> tuple[bool, str]:
            if stop.is_set() or not serving.is_set():
                return False, "draining" if stop.is_set() else "starting"
            return True, f"ready\nio {way.engine} {way.path}\ngpu {way.gpu}"

        def html() -> str:
            return page(status(), list(recent.samples), health()[1].partition("\n")[0])

        loopback = Exporter(metrics.registry, health, html, config.metrics.listen, made=metrics_socket, scraped=metrics.scraped)
        exporter = open_exporter(loopback)
        stack.callback(exporter.close)
        status.metrics_address = exporter.address
        admin = Admin(config, keeper, recorder, status, scrub, quotas, pinboard, stop.set, reloader.reload)
        for space in keeper.spaces.values():
            for session in space.sessions.values():
                service.watch(session)
        server = config.server
        data = Server(server.socket, server.socket_mode, service, config.limits, admin=False, inherited=data_socket)
        control = Server(server.admin_socket, 0o600, admin, config.limits, admin=True)
        mode = server.socket_mode
        local = Exporter(metrics.registry, health, html, config.metrics.socket, socket_mode=mode, scraped=metrics.scraped)
        stack.push_async_callback(admin.close)
        await control.start()
        stack.push_async_callback(control.close)
        local.start()
        stack.callback(local.close)
        await data.start()  # last, so that who can connect finds all the rest
        stack.push_async_callback(data.close)
        background = asyncio.create_task(keeper.run())
        feeding = asyncio.create_task(watchdog.feed(keeper.mover))
        watching = asyncio.create_task(lag.watch(metrics.lag))
        noting = asyncio.create_task(recent.watch())
        pinning = asyncio.create_task(pinboard.watch())
        for task in (background, feeding, watching, noting, pinning):
            stack.callback(task.cancel)
        gc.freeze()  # what lives as long as the daemon is not worth looking through again
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, stop)
        reloading: set[asyncio.Task[None]] = set()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup, reloader, reloading)
        serving.set()
        await asyncio.to_thread(systemd.status, "serving")
        await asyncio.to_thread(systemd.ready)
        seconds = clock.monotonic_seconds() - started
        logger.info(
            "ready", version=__version__, socket=server.socket, io=way.engine, path=way.path, previous=previous, seconds=seconds
        )
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, background, pinning}, return_when=asyncio.FIRST_COMPLETED)
        for task in (background, pinning):
            if task.done():
                stopped.cancel()
                task.result()  # a bug: crash, and let the next life recover
        seconds = reloader.config.limits.drain_seconds_max
        await asyncio.to_thread(systemd.stopping, seconds + CLOSE_SECONDS_MAX)
        logger.info("draining", unwritten=keeper.unwritten())
        service.drain()
        data.leave_queue()
        deadline = clock.monotonic_seconds() + seconds
        with suppress(Busy):
            while keeper.unwritten():  # what was begun before may be committed meanwhile
                await keeper.sync(deadline)
        await pinboard.close()
    await history.end(config.server.state_dir, clock.unix_milliseconds())
    logger.info("stopped", unwritten=keeper.unwritten())
    return 0


def on_signal(stop: asyncio.Event) -> None:
    """The first signal drains, the second ends the process where it stands."""
    if stop.is_set():
        os._exit(128 + signal.SIGTERM)
    stop.set()


def on_hangup(reloader: Reloader, running: set[asyncio.Task[None]]) -> None:
    """Reload in a task of its own, which `running` keeps."""
    task = asyncio.create_task(reloader.on_signal())
    running.add(task)
    task.add_done_callback(running.discard)


def listening(inherited: dict[str, list[int]], name: str) -> socket.socket | None:
    """The listening socket of that name among inherited descriptors, taken from them; None when there is none."""
    first, *others = inherited.pop(name, [-1])
    if others:
        raise Invalid(f"{1 + len(others)} sockets are passed as {name!r}, there can be one: one ListenStream= in its unit")
    return socket.socket(fileno=first) if first >= 0 else None


def open_exporter(exporter: Exporter) -> Exporter:
    """Start to serve metrics, if they are wanted; a taken address that nobody chose is no reason not to serve blocks."""
    try:
        if exporter.listen or exporter.made:
            exporter.start()
    except Invalid as error:
        if exporter.made or exporter.listen != KEYS["metrics.listen"]["default"]:
            raise
        logger.warning("no metrics and no health checks", reason=str(error))
    return exporter


def open_tiers(config: Config, state: StateDirectory, gpus: list[Device], pins: Pins | None) -> tuple[list[Tier], io.Io]:
    """The configured tiers, and how NVMe is reached. `gpus`: of the gpu tiers; `pins`: what registers cpu with them."""
    gpu, cpu, nvme = config.gpu, config.cpu, config.nvme
    names, sizes = tier_names(gpu.devices), (gpu.bytes, gpu.segment_bytes)
    tiers: list[Tier] = [DeviceTier(name, *sizes, device) for name, device in zip(names, gpus, strict=False)]
    if not gpus:  # pages lie side by side in an engine's memory: no rounding to huge ones
        tiers += [MemoryTier(name, *sizes, device=host_id(device)) for name, device in zip(names, gpu.devices, strict=True)]
    tiers.append(MemoryTier("cpu", cpu.bytes, cpu.segment_bytes, cpu.huge_pages, pins))
    if not nvme.bytes:
        return tiers, io.Io("none", "none")
    choice = probe(state.nvme_path, nvme.io_engine, nvme.probe_seconds_max, nvme.io_threads)
    path = "direct" if choice.direct else "buffered"
    logger.info("io engine", engine=choice.engine, path=path, reason=choice.reason)
    engine = io.make(choice.engine, nvme.io_threads)
    paths = open_paths(config, state, choice, gpus) if gpus else Paths(choice.engine)
    tiers.append(NvmeTier(nvme.bytes, nvme.segment_bytes, state, engine, paths))
    return tiers, io.Io(choice.engine, path, paths.gpu)


def open_paths(config: Config, state: StateDirectory, choice: Choice, gpus: list[Device]) -> Paths:
    """The ways between GPUs and NVMe that work; raises Invalid if GPUDirect Storage is required and does not."""
    nvme = config.nvme
    found = Measured(None, (f"the io engine is {choice.engine} ({choice.reason}), it needs kvikio",))
    if choice.engine == "kvikio":
        found = measure_all(state.nvme_path, config.gpu.gpus, nvme.io_threads, nvme.probe_seconds_max)
    if found.speeds is None and nvme.require_gds:
        raise Invalid(f"nvme.require_gds = true, but GPUDirect Storage does not work at {state.nvme_path}: {found}")
    logger.info("gpudirect storage", works=found.speeds is not None, found=str(found))
    if not found.speeds:
        return Paths(choice.engine, gpus[0])
    cufile.start()
    return Paths(choice.engine, gpus[0], found.speeds, open_kernels(gpus, found.doubt))


def open_kernels(gpus: list[Device], doubt: str) -> dict[int, DeviceDigests]:
    """What computes digests on GPUs, by their numbers; none where there is a doubt, or a GPU takes no kernels."""
    if not doubt:
        try:
            return {device.number: DeviceDigests(device) for device in gpus}
        except OSError as error:
            doubt = str(error)
    logger.warning("digests of what goes straight are computed in host memory", reason=doubt)
    return {}


def open_gpus(config: Config) -> list[Device]:
    """The GPUs of the gpu tiers: only where there are some a driver is loaded. Raises Invalid where one cannot serve."""
    devices, want = [], config.gpu.bytes
    for name in config.gpu.gpus:
        device = Device(gpu_number(name) or 0)
        if want > device.total_bytes:
            have = size_text(device.total_bytes // MIB * MIB)
            raise Invalid(f"gpu.bytes = {size_text(want)} is over the memory of {name} ({device.name}), {have}: set it lower")
        logger.info("gpu", device=name, name=device.name, granularity=device.granularity)
        devices.append(device)
    return devices
