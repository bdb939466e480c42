"""Write the systemd units for the environment that this command is of, or remove them again.

For the system (as root): service, sockets, the user tierd, and a commented /etc/tierd/tierd.toml where there is none. With
--user: for your own service manager. Nothing is enabled or started; it says what to do next.
"""

from __future__ import annotations

import json
import os
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tierd.config import Config
from tierd.errors import Busy, Invalid
from tierd.units import UNITS, check_sockets, system_files, user_files

CALL_SECONDS_MAX = 30.0
SYSTEM_CONFIG, NO_CONFIG = Path("/etc/tierd/tierd.toml"), Path("/dev/null")
STATE = {"server.runtime_dir": "/run/tierd", "server.state_dir": "/var/lib/tierd"}
"""Where the system's service lives."""


class Step(NamedTuple):
    """What has just been done with a file: "wrote", "kept" or "removed"."""

    what: str
    path: Path
    note: str = ""


def add_arguments(parser: ArgumentParser) -> None:
    """For whom, where, and which way."""
    parser.add_argument("--user", action="store_true", help="for your own service manager, without root")
    parser.add_argument("--remove", action="store_true", help="stop the service and remove what was written")
    parser.add_argument("--root", type=Path, metavar="DIR", help="write below DIR, and call no service manager")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the files wrote, kept and removed")


def run(options: Namespace) -> int:
    """Install or remove."""
    if not options.user and options.root is None and os.getuid():
        raise Invalid("the system's units are root's to write: use sudo, or --user for your own service manager")
    files = {place(path, options.root): text for path, text in wanted(options).items()}
    steps = (remove if options.remove else install)(files, options.user, options.root is None)
    if options.json:
        done: dict[str, list[str]] = {"wrote": [], "kept": [], "removed": []}
        for step in steps:
            done[step.what].append(str(step.path))
        print(json.dumps(done))
        return 0
    for step in steps:
        print(f"{step.what:8} {step.path}{step.note}")
    if not options.remove:
        print(advice(options.user))
    return 0


def advice(user: bool) -> str:
    """What comes next."""
    start = f"\nstart it, now and at every boot: {' '.join(systemctl(user))} enable --now {' '.join(UNITS)}\n"
    if user:
        return start + "keep it when you log out:        loginctl enable-linger"
    return start + "let the engines of a user in:    usermod -aG tierd USER"


def wanted(options: Namespace) -> dict[Path, str]:
    """The files by their path on the machine; to remove them a configuration may be as wrong as it likes."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    file = place(home / "tierd/tierd.toml" if options.user else SYSTEM_CONFIG, options.root)
    config = Config.load(STATE, {}, NO_CONFIG if options.remove or not file.exists() else file)
    files = user_files(config, home) if options.user else system_files(config)
    texts = {path.name: (path, text) for path, text in files.items()}

    def unit(name: str) -> str:
        path, text = texts[name]
        folder = place(path.with_name(f"{name}.d"), options.root)
        return "\n".join((text, *(drop_in.read_text() for drop_in in sorted(folder.glob("*.conf")))))

    if not options.remove:
        check_sockets(config, unit)
    return files


def place(path: Path, root: Path | None) -> Path:
    return root / path.relative_to("/") if root else path


def install(files: dict[Path, str], user: bool, live: bool) -> Iterator[Step]:
    for path, text in files.items():
        if path.suffix == ".toml" and path.exists():
            yield Step("kept", path)
            continue
        same = path.exists() and path.read_text() == text
        write(path, text)
        yield Step("kept" if same else "wrote", path)
    if live:
        if not user:
            call("systemd-sysusers", "tierd.conf")
            call("systemd-tmpfiles", "--create", "tierd.conf")
        call(*systemctl(user), "daemon-reload")


def remove(files: dict[Path, str], user: bool, live: bool) -> Iterator[Step]:
    """A configuration that somebody has changed stays, as do the user tierd and all state."""
    if live and (units := [path.name for path in present(files) if path.name in UNITS]):
        call(*systemctl(user), "disable", "--now", *units)
    for path in present(files):
        if path.suffix == ".toml" and path.read_text() != files[path]:
            yield Step("kept", path, ": it was changed")
            continue
        path.unlink()
        yield Step("removed", path)
    if live:
        call(*systemctl(user), "daemon-reload")


def present(files: dict[Path, str]) -> list[Path]:
    return [path for path in files if path.exists()]


def write(path: Path, text: str) -> None:
    """Replace a file whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(text)
        fresh.chmod(0o644)
        fresh.replace(path)
    except OSError as error:
        raise Busy(f"{path} cannot be written: {error.strerror}") from error


def systemctl(user: bool) -> tuple[str, ...]:
    return ("systemctl", "--user") if user else ("systemctl",)


def call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS_MAX)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Busy(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise Busy(f"{' '.join(command)} failed: {done.stderr.strip() or done.returncode}")
