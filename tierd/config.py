"""Configuration: defaults < TOML file < environment < flags, each value checked where it came from.

Rule of this file: a value is right or is refused with its source, key, value and remedy; nothing is guessed or clamped.
"""

from __future__ import annotations

import os
import resource
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import Any, NoReturn

from tierd import systemd
from tierd.devices import gpu_number, split_devices
from tierd.errors import Invalid
from tierd.values import (
    GIB,
    KIB,
    MIB,
    TIB,
    boolean,
    count,
    decimal,
    devices,
    domains,
    file_mode,
    loopback,
    one_of,
    path,
    size,
    size_text,
)

PAGE_BYTES = 4096
FILE_BYTES_MAX = MIB
SOCKET_PATH_BYTES_MAX = 107
MEMORY_DESCRIPTORS, FILE_DESCRIPTORS, SESSION_DESCRIPTORS, DESCRIPTORS_SPARE = 2, 3, 5, 64
"""Of each memory segment, segment file and session (its connections and its process), and of the daemon itself."""
POLICIES = ("lru", "lfu", "chd")
"""Orders of eviction that a tier can have."""
SEGMENT_NAME_BYTES, SESSION_NAME_BYTES = 25, 73
"""The longest names of kept descriptors, each with a separator: a segment has two."""


def key(default: Any, parse: Callable[[Any], Any], live: bool = False) -> Any:
    """One key: its default as one would write it (None: it depends on the user or another key), its parser, and whether a
    running daemon can change it.
    """
    return field(metadata={"default": default, "parse": parse, "live": live})


@dataclass(frozen=True)
class Server:
    """Where the daemon lives and who may talk to it."""

    runtime_dir: Path = key(None, path)
    state_dir: Path = key(None, path)
    socket: Path = key(None, path)
    admin_socket: Path = key(None, path)
    socket_mode: int = key("0660", file_mode)
    domains: dict[str, str] = key({}, domains, live=True)


@dataclass(frozen=True)
class Gpu:
    """The tier whose slots are an engine's pages, once on each device; `bytes`, of each, is 0 when there is none."""

    bytes: int = key("0", size(64 * KIB, 1024 * TIB, zero=True))
    segment_bytes: int = key("64MiB", size(64 * KIB, 64 * GIB, PAGE_BYTES))
    device: str = key("cpu", devices)
    policy: str = key("lru", one_of(*POLICIES))

    @property
    def devices(self) -> list[str]:
        """The devices by name; none when there is no such tier."""
        return split_devices(self.device) if self.bytes else []

    @property
    def gpus(self) -> list[str]:
        """Those of them that are GPUs: all or none."""
        return [name for name in self.devices if gpu_number(name) is not None]

    @property
    def host_bytes(self) -> int:
        """How much of it is this machine's memory: nothing of a GPU's."""
        return self.bytes * (len(self.devices) - len(self.gpus))


@dataclass(frozen=True)
class Cpu:
    """The memory tier."""

    bytes: int = key("1GiB", size(64 * KIB, 1024 * TIB))
    segment_bytes: int = key("64MiB", size(64 * KIB, 64 * GIB, PAGE_BYTES))
    huge_pages: str = key("auto", one_of("auto", "off", "require"))
    policy: str = key("lru", one_of(*POLICIES))


@dataclass(frozen=True)
class Nvme:
    """The disk tier; `bytes` is 0 when there is none."""

    bytes: int = key("4GiB", size(64 * KIB, 1024 * TIB, zero=True))
    path: Path = key(None, path)
    segment_bytes: int = key("64MiB", size(64 * KIB, 64 * GIB, PAGE_BYTES))
    io_engine: str = key("auto", one_of("auto", "kvikio", "posix"))
    io_threads: int = key(8, count(1, 64))
    require_gds: bool = key(False, boolean)
    write_back: bool = key(True, boolean)
    policy: str = key("lru", one_of(*POLICIES))
    admission: str = key("everything", one_of("everything", "second-sight", "learned", "policy"))
    write_bytes_per_day: int = key("0", size(MIB, 1024 * TIB, zero=True))
    probe_seconds_max: float = key(10.0, decimal(0.1, 600))
    scrub_bytes_per_second: int = key("64MiB", size(64 * KIB, 1024 * GIB), live=True)


@dataclass(frozen=True)
class Policy:
    """Who stays and who goes."""

    promotion_window_share: float = key(0.25, decimal(0.001, 1))
    pinned_share: float = key(0.25, decimal(0, 0.75))


@dataclass(frozen=True)
class Metrics:
    """Prometheus and health over HTTP, on a Unix socket and on loopback; `listen` is empty when the latter is off."""

    listen: str = key("127.0.0.1:9475", loopback)
    socket: Path = key(None, path)
    per_namespace: bool = key(False, boolean)


@dataclass(frozen=True)
class Log:
    """What is logged, and how it looks."""

    level: str = key("info", one_of("debug", "info", "warning", "error"), live=True)
    format: str = key("text", one_of("text", "json"), live=True)


@dataclass(frozen=True)
class Limits:
    """The most that anybody can make the daemon hold, queue or wait for."""

    sessions_max: int = key(256, count(1, 65_536))
    sessions_per_namespace_max: int = key(64, count(1, 64), live=True)
    leases_per_session_max: int = key(4096, count(1, 1 << 20))
    blocks_per_request_max: int = key(32_768, count(1, 1 << 20))
    frame_bytes_max: int = key("4MiB", size(64 * KIB, 64 * MIB))
    hello_frame_bytes_max: int = key("64KiB", size(4 * KIB, MIB))
    wait_seconds_max: float = key(10.0, decimal(0.01, 600))
    drain_seconds_max: float = key(10.0, decimal(0.01, 600), live=True)
    namespaces_max: int = key(256, count(1, 65_536), live=True)


@dataclass(frozen=True)
class Config:
    """Everything that can be set. Made by `load`; `file` is the TOML file that was read, if any."""

    server: Server
    gpu: Gpu
    cpu: Cpu
    nvme: Nvme
    policy: Policy
    metrics: Metrics
    log: Log
    limits: Limits
    file: Path | None = None
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where each key that is not left at its default was set, by `section.key`."""

    @classmethod
    def load(
        cls,
        flags: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
        file: Path | None = None,
        uid: int | None = None,
    ) -> Config:
        """The configuration of this process, or Invalid with the source, key, value and remedy of the first mistake.

        `flags` maps "section.key" or one of FLAGS to text; `environ` and `uid` default to the process's own; `file`
        defaults to the user's or the system's file where there is one.
        """
        environ = os.environ if environ is None else environ
        uid = os.getuid() if uid is None else uid
        file = file or default_file(environ, uid)
        values = {dotted: parse_value("default", dotted, item["default"]) for dotted, item in KEYS.items()}
        sources: dict[str, str] = {}
        for given in (from_file(file), from_environment(environ), from_flags(flags or {})):
            for source, dotted, value in given:
                values[dotted] = parse_value(source, dotted, value)
                sources[dotted] = source
        fill_paths(values, environ, uid)
        check_together(values, sources)
        made: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for dotted, (section, name) in SPLIT.items():
            made[section][name] = values[dotted]
        return cls(**{name: SECTIONS[name](**keys) for name, keys in made.items()}, file=file, origins=sources)

    def reloaded(self, fresh: Config) -> tuple[Config, list[str], list[str]]:
        """This configuration with what a running daemon can take over from another one, the names of keys that have changed by
        that, and the names of those that differ still: they need a restart.
        """
        ours, theirs = self.describe(), fresh.describe()
        differ = [dotted for dotted in KEYS if ours[dotted] != theirs[dotted]]
        changed = [dotted for dotted in differ if KEYS[dotted]["live"]]
        taken: dict[str, dict[str, Any]] = {}
        for section, name in (SPLIT[dotted] for dotted in changed):
            taken.setdefault(section, {})[name] = getattr(getattr(fresh, section), name)
        sections = {section: replace(getattr(self, section), **values) for section, values in taken.items()}
        return replace(self, **sections), changed, [dotted for dotted in differ if dotted not in changed]

    def describe(self) -> dict[str, Any]:
        """Every key as `section.key` with its value as one would write it, for logs and for `tierd status`."""
        plain = {dotted: getattr(getattr(self, section), name) for dotted, (section, name) in SPLIT.items()}
        return {dotted: as_written(dotted, value) for dotted, value in plain.items()}

    def prepare(self) -> None:
        """Create the directories and raise the soft limit of descriptors; Invalid when a directory is unsafe, or this machine
        cannot hold the memory tiers or give as many descriptors as may be needed.
        """
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.cpu.bytes + self.gpu.host_bytes > memory_bytes:
            have, want = size_text(memory_bytes // MIB * MIB), size_text(self.cpu.bytes)
            beside = f" and gpu.bytes = {size_text(self.gpu.host_bytes)}" if self.gpu.host_bytes else ""
            raise Invalid(f"cpu.bytes = {want}{beside} is over this machine's memory of {have}: set it lower")
        self._check_descriptors()
        # Other users must be able to reach root's sockets, whose own mode says who may connect.
        make_directory("server.runtime_dir", self.server.runtime_dir, 0o755 if os.getuid() == 0 else 0o700)
        make_directory("server.state_dir", self.server.state_dir, 0o700)
        if self.nvme.bytes:
            make_directory("nvme.path", self.nvme.path, 0o700)

    @property
    def memory_segments(self) -> int:
        """How many memory segments there can be."""
        return len(self.gpu.devices) * (self.gpu.bytes // self.gpu.segment_bytes) + self.cpu.bytes // self.cpu.segment_bytes

    @property
    def descriptors_kept(self) -> int:
        """How many descriptors a service manager may have to keep: two of each memory segment, one of each session."""
        return 2 * self.memory_segments + self.limits.sessions_max

    def _check_descriptors(self) -> None:
        sessions, segments = self.limits.sessions_max, self.memory_segments
        files = self.nvme.bytes // self.nvme.segment_bytes
        needed = MEMORY_DESCRIPTORS * segments + FILE_DESCRIPTORS * files + SESSION_DESCRIPTORS * sessions + DESCRIPTORS_SPARE
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        what = f"{segments} memory segments, {files} files and {sessions} sessions"
        remedy = "larger segments (segment_bytes), or a lower limits.sessions_max"
        if needed > most:
            raise Invalid(
                f"{what} need {needed} descriptors, the limit is {most}: raise it (LimitNOFILE=, ulimit -Hn), or {remedy}"
            )
        if not systemd.can_store():
            return
        kept, names_bytes = self.descriptors_kept, 2 * segments * SEGMENT_NAME_BYTES + sessions * SESSION_NAME_BYTES
        if kept > (most := systemd.descriptors_max()):
            managers = "FileDescriptorStoreMax=, which tierd install-service writes; tierd hold --descriptors-max"
            raise Invalid(
                f"{what} are {kept} descriptors to keep, the manager keeps {most}: raise that ({managers}), or {remedy}"
            )
        if names_bytes > systemd.NAMES_BYTES_MAX:
            most = systemd.NAMES_BYTES_MAX
            raise Invalid(f"names of {what} take {names_bytes} bytes, a daemon can be started with {most}: {remedy}")


SECTIONS: dict[str, type[Any]] = {
    "server": Server,
    "gpu": Gpu,
    "cpu": Cpu,
    "nvme": Nvme,
    "policy": Policy,
    "metrics": Metrics,
    "log": Log,
    "limits": Limits,
}
KEYS: dict[str, Mapping[str, Any]] = {f"{name}.{k.name}": k.metadata for name, s in SECTIONS.items() for k in fields(s)}
SPLIT = {dotted: (dotted.partition(".")[0], dotted.partition(".")[2]) for dotted in KEYS}
VARIABLES = {f"TIERD_{dotted.replace('.', '_').upper()}": dotted for dotted in KEYS}
FLAGS = {
    "--socket": "server.socket",
    "--runtime-dir": "server.runtime_dir",
    "--state-dir": "server.state_dir",
    "--gpu-bytes": "gpu.bytes",
    "--cpu-bytes": "cpu.bytes",
    "--nvme-bytes": "nvme.bytes",
}


# Sources: each yields (where from, section.key, value).


def from_file(file: Path | None) -> Iterator[tuple[str, str, Any]]:
    if file is None:
        return
    try:
        with open(file, "rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise Invalid(f"{file}: is over the maximum of {size_text(FILE_BYTES_MAX)}: give the right file with --config")
        document = tomllib.loads(data.decode())
    except OSError as error:
        raise Invalid(f"{file}: cannot be read ({error.strerror}): give another file with --config") from error
    except ValueError as error:
        raise Invalid(f"{file}: is not TOML in UTF-8: {error}; correct it there") from error
    for section, table in document.items():
        if section not in SECTIONS or not isinstance(table, dict):
            unknown(str(file), section, table)
        for name, value in table.items():
            yield str(file), f"{section}.{name}", value


def from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    ours = tuple(f"TIERD_{section.upper()}_" for section in SECTIONS)
    for variable, value in environ.items():
        if variable in VARIABLES:
            yield f"environment variable {variable}", VARIABLES[variable], value
        elif variable.startswith("TIERD_"):
            # Other names are not ours to judge (TIERD_SOCKET is the client's, orchestrators set TIERD_PORT).
            near = get_close_matches(variable, VARIABLES, 1, 0.85)
            if near or variable.startswith(ours):
                hint = f"did you mean {near[0]}?" if near else "its name must be TIERD_<SECTION>_<KEY>; unset it"
                raise Invalid(f"environment variable {variable} = {value!r} is no key of tierd: {hint}")


def from_flags(flags: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for name, value in flags.items():
        dotted = FLAGS.get(name, name)
        is_path = dotted in KEYS and KEYS[dotted]["parse"] is path
        source = f"flag {name}" if name in FLAGS else "flag --set"
        yield source, dotted, os.path.abspath(value) if is_path and value else value


def parse_value(source: str, dotted: str, value: Any) -> Any:
    if dotted not in KEYS:
        unknown(source, dotted, value)
    if value is None:
        return None
    try:
        return KEYS[dotted]["parse"](value)
    except ValueError as error:
        raise Invalid(f"{source}: {dotted} = {value!r} {error}") from None


def unknown(source: str, dotted: str, value: Any) -> NoReturn:
    section = dotted.partition(".")[0]
    if near := get_close_matches(dotted, [*KEYS, *SECTIONS], 1, 0.7):
        hint = f"did you mean {near[0]}?"
    elif section in SECTIONS:
        hint = f"the keys of [{section}] are {', '.join(k.name for k in fields(SECTIONS[section]))}"
    else:
        hint = f"the sections are {', '.join(SECTIONS)}"
    raise Invalid(f"{source}: {dotted} = {value!r} is no key of tierd: {hint}")


# Defaults that depend on the user, and rules over several keys.


def default_file(environ: Mapping[str, str], uid: int) -> Path | None:
    """The user's own file before the system's; None when there is neither. Root uses the system's only."""
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    candidates = [Path(home, "tierd/tierd.toml")] if uid else []
    return next((file for file in [*candidates, Path("/etc/tierd/tierd.toml")] if file.exists()), None)


def fill_paths(values: dict[str, Any], environ: Mapping[str, str], uid: int) -> None:
    runtime = values["server.runtime_dir"] = values["server.runtime_dir"] or default_runtime_dir(environ, uid)
    state = values["server.state_dir"] = values["server.state_dir"] or default_state_dir(environ, uid)
    values["server.socket"] = values["server.socket"] or runtime / "tierd.sock"
    values["server.admin_socket"] = values["server.admin_socket"] or runtime / "admin.sock"
    values["metrics.socket"] = values["metrics.socket"] or runtime / "metrics.sock"
    values["nvme.path"] = values["nvme.path"] or state / "nvme"


def default_runtime_dir(environ: Mapping[str, str], uid: int) -> Path:
    if os.path.isabs(environ.get("RUNTIME_DIRECTORY", "")):  # of a unit that has RuntimeDirectory=
        return Path(environ["RUNTIME_DIRECTORY"])
    if uid == 0:
        return Path("/run/tierd")
    if os.path.isabs(environ.get("XDG_RUNTIME_DIR", "")):
        return Path(environ["XDG_RUNTIME_DIR"], "tierd")
    fallback = Path(f"/tmp/tierd-{uid}")
    # Anybody can create this name in /tmp before us, and sockets of theirs in it.
    if fallback.is_symlink() or (fallback.exists() and fallback.stat().st_uid != uid):
        raise Invalid(f"{fallback} does not belong to uid {uid}: set XDG_RUNTIME_DIR or give --runtime-dir")
    return fallback


def default_state_dir(environ: Mapping[str, str], uid: int) -> Path:
    if os.path.isabs(environ.get("STATE_DIRECTORY", "")):
        return Path(environ["STATE_DIRECTORY"])
    if uid == 0:
        return Path("/var/lib/tierd")
    if os.path.isabs(environ.get("XDG_STATE_HOME", "")):
        return Path(environ["XDG_STATE_HOME"], "tierd")
    if os.path.isabs(environ.get("HOME", "")):
        return Path(environ["HOME"], ".local/state/tierd")
    raise Invalid("neither XDG_STATE_HOME nor HOME says where state belongs: give --state-dir")


def check_together(values: dict[str, Any], sources: dict[str, str]) -> None:
    def named(dotted: str) -> str:
        return f"{dotted} = {as_written(dotted, values[dotted])} ({sources.get(dotted, 'default')})"

    def refuse_over(small: str, large: str, factor: int = 1, note: str = "") -> None:
        if values[small] * factor > values[large]:
            raise Invalid(f"{named(small)}{note} is over {named(large)}: lower the first or raise the second")

    on_gpus = values["gpu.device"].startswith("cuda") and values["gpu.bytes"]
    if values["nvme.require_gds"] and not (on_gpus and values["nvme.bytes"]):
        remedy = "set gpu.device = 'cuda:0', gpu.bytes and nvme.bytes, or require nothing"
        raise Invalid(f"{named('nvme.require_gds')} needs a gpu tier on a GPU and an nvme tier: {remedy}")
    refuse_over("cpu.segment_bytes", "cpu.bytes")
    for tier in ("gpu", "nvme"):
        if values[f"{tier}.bytes"]:
            refuse_over(f"{tier}.segment_bytes", f"{tier}.bytes")
    refuse_over("limits.hello_frame_bytes_max", "limits.frame_bytes_max")
    # A request carries 32 bytes of hash a block; one more for each leaves ample room for the rest of its frame.
    refuse_over("limits.blocks_per_request_max", "limits.frame_bytes_max", 33, " times 33 bytes")
    sockets = ("server.socket", "server.admin_socket", "metrics.socket")
    for dotted in sockets:
        if (length := len(os.fsencode(values[dotted]))) > SOCKET_PATH_BYTES_MAX:
            remedy = f"a socket's path has at most {SOCKET_PATH_BYTES_MAX}: set a shorter server.runtime_dir"
            raise Invalid(f"{named(dotted)} has {length} bytes, {remedy}")
    if values["nvme.admission"] == "policy" and values["nvme.policy"] != "chd":
        remedy = "only chd knows what to turn away: set nvme.policy = chd, or another admission"
        raise Invalid(f"{named('nvme.admission')} with {named('nvme.policy')}: {remedy}")
    for one, other in combinations(sockets, 2):
        if values[one] == values[other]:
            raise Invalid(f"{named(one)} is also {named(other)}: give them different names")


def as_written(dotted: str, value: Any) -> Any:
    """A value in the form in which the example file has it: sizes with units, modes in octal, paths as text."""
    if isinstance(value, int) and isinstance(KEYS[dotted]["default"], str):
        return f"{value:04o}" if KEYS[dotted]["parse"] is file_mode else size_text(value)
    return str(value) if isinstance(value, Path) else value


def make_directory(dotted: str, directory: Path, mode: int) -> None:
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise Invalid(f"{dotted} = {directory} cannot be made ({error.strerror}): set another path") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o002:
        owner = f"belongs to uid {found.st_uid} with mode {found.st_mode & 0o7777:04o}"
        raise Invalid(f"{dotted} = {directory} {owner}: it must be uid {os.getuid()}'s, and not writable by others")
