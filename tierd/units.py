"""The systemd files for one environment: what is shipped in `systemd/`, with the paths and limits of this machine.

The shipped files are complete and used as they are where tierd is /usr/bin/tierd; here a few of their lines are made to fit.
Rule of this file: it makes texts, and writes nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import tierd
from tierd.config import Config
from tierd.errors import Invalid

UNITS = ("tierd.service", "tierd.socket", "tierd-metrics.socket")
DESCRIPTORS_MIN = 4096
SHIPPED_COMMAND, SHIPPED_STATE = "/usr/bin/tierd", Path("/var/lib/tierd")
SAID_TWICE = (
    ("server.socket", "tierd.socket", "ListenStream"),
    ("server.socket_mode", "tierd.socket", "SocketMode"),
    ("metrics.listen", "tierd-metrics.socket", "ListenStream"),
)
"""Keys of the configuration, and where a socket unit says the same."""
HOMES = tuple(map(Path, ("/home", "/root", "/run/user")))
"""What ProtectHome= hides."""
TEMPORARY = Path("/tmp"), Path("/var/tmp")
"""What PrivateTmp= hides."""


def shipped(name: str) -> str:
    """A file of `systemd/`: of the checkout, or where a wheel has put it."""
    checkout, installed = Path(tierd.__file__).parents[1] / "systemd", Path(sys.prefix, "share/tierd/systemd")
    return ((checkout if (checkout / "tierd.service").exists() else installed) / name).read_text()


def system_files(config: Config) -> dict[Path, str]:
    """What the system's manager needs, by path; the last one is the administrator's, and never replaced."""
    units = Path("/etc/systemd/system")
    files = {units / name: shipped(name) for name in UNITS}
    service, directories = fitted(files[units / "tierd.service"], config), shipped("tmpfiles.conf")
    if config.nvme.bytes and not config.nvme.path.is_relative_to(SHIPPED_STATE):
        strict = "ProtectSystem=strict\n"
        service = service.replace(strict, f"{strict}ReadWritePaths=-{config.nvme.path}\n")
        directories += f"d {config.nvme.path} 0700 tierd tierd -\n"
    files[units / "tierd.service"] = seen(service)
    files[Path("/etc/sysusers.d/tierd.conf")] = shipped("sysusers.conf")
    files[Path("/etc/tmpfiles.d/tierd.conf")] = directories
    files[Path("/etc/tierd/tierd.toml")] = shipped("tierd.toml")
    return files


def user_files(config: Config, home: Path) -> dict[Path, str]:
    """What a user's own manager needs; `home` is the directory of the user's configuration."""
    units = home / "systemd/user"
    files = {units / name: shipped(f"user/{name}") for name in UNITS}
    files[units / "tierd.service"] = fitted(files[units / "tierd.service"], config)
    files[home / "tierd/tierd.toml"] = shipped("tierd.toml")
    return files


def check_sockets(config: Config, unit: Callable[[str], str]) -> None:
    """Raise Invalid where a socket unit (its text with its drop-ins behind it, by name) is not as configured: the daemon would
    refuse to start.
    """
    for dotted, name, key in SAID_TWICE:
        configured, said = str(config.describe()[dotted]), setting(unit(name), key).replace("%t/", "/run/")
        if configured and configured != said:
            raise Invalid(
                f"{dotted} = {configured!r} in {config.file}, but {name} has {key}={said}, and the daemon would refuse to "
                f"start: remove that key, or first give the unit the same (systemctl edit {name}: [Socket], {key}=, "
                f"{key}={configured})"
            )


def setting(unit: str, key: str) -> str:
    """What a unit says of a key: the values since the last empty one, which takes back those before it."""
    values = re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)
    while "" in values:
        values = values[values.index("") + 1 :]
    return " ".join(values if key == "ListenStream" else values[-1:])


def fitted(service: str, config: Config) -> str:
    """The unit with this environment's command, and room for all descriptors that this configuration may have kept."""
    command = Path(sys.executable).with_name("tierd")
    if not os.access(command, os.X_OK):
        raise Invalid(f"{command} is not there: run install-service by the tierd of the environment that shall serve")
    for path in (command, config.nvme.path):
        if any(letter in str(path) for letter in " \t\n\"'\\%$"):
            raise Invalid(f"{path}: systemd reads some letter of this path as its own: use another one")
    most = max(DESCRIPTORS_MIN, config.descriptors_kept)
    service = service.replace(SHIPPED_COMMAND, str(command))
    for key in ("FileDescriptorStoreMax=", "Environment=FDSTORE="):
        service = service.replace(f"{key}{DESCRIPTORS_MIN}\n", f"{key}{most}\n")
    return service


def seen(service: str) -> str:
    """The unit with this environment in its sight, where that lies below somebody's home, or where temporary files are."""
    prefixes = {Path(path) for path in (sys.prefix, sys.base_prefix, Path(tierd.__file__).parents[1])}
    for folders, hides, shows in (
        (HOMES, "ProtectHome=yes", "ProtectHome=tmpfs"),
        (TEMPORARY, "PrivateTmp=yes", "PrivateTmp=yes"),
    ):
        if within := sorted(str(path) for path in prefixes if any(folder in path.parents for folder in folders)):
            service = service.replace(f"{hides}\n", f"{shows}\nBindReadOnlyPaths={' '.join(within)}\n")
    return service
