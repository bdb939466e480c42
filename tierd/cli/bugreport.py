"""Gather what somebody needs who is to help, into one archive that names nobody: versions, configuration, the doctor's
findings, status, metrics and the end of the log.

Models, trust domains, clients, namespaces, the user, the home directory and the host are replaced, each by the same word
everywhere. Nothing is sent anywhere: look through the archive, then send it yourself. What cannot be had, for example because
no daemon runs, is said in its place.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tarfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from http.client import HTTPConnection
from importlib import metadata
from pathlib import Path

from tierd import __version__, clock
from tierd.cli import config as config_command
from tierd.cli import doctor
from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config
from tierd.cli.redact import Redactor
from tierd.config import FLAGS, Config
from tierd.doctor.machine import Machine
from tierd.errors import Busy, TierdError

SECONDS_MAX = 10.0
LOG_LINES = 1000
LOG_BYTES_MAX = 1 << 20
PACKAGES = ("msgpack", "numpy", "prometheus-client", "uvloop", "xxhash", "kvikio-cu13", "torch", "triton", "vllm")


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, and where to."""
    add_config_arguments(parser, *FLAGS)
    parser.add_argument("--output", type=Path, metavar="FILE", help="the archive; default: tierd-bugreport-TIME.tar.gz, here")
    parser.add_argument("--log", type=Path, metavar="FILE", help="the daemon's log; default: the journal of tierd.service")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the archive and the files in it")


def run(options: Namespace) -> int:
    """Gather, replace, write."""
    config = load_config(options)
    parts: dict[str, Callable[[], str]] = {
        "versions.txt": versions,
        "config.toml": lambda: "\n".join(config_command.page(config, True)),
        "doctor.json": lambda: as_json({"findings": [one.to_map() for one in doctor.examine(Machine(), config)]}),
        "status.json": lambda: as_json(answer(config, "status")),
        "scrub.json": lambda: as_json(answer(config, "scrub", action="status")),
        "metrics.txt": lambda: metrics(config.metrics.socket),
        "log.txt": lambda: log(options.log),
    }
    redactor = Redactor()
    redactor.learn("domain", config.server.domains.values())
    found = {name: gathered(part) for name, part in parts.items()}
    status = json.loads(found["status.json"]) if found["status.json"].startswith("{") else {}
    found["status.json"] = as_json(redactor.value(status)) if status else found["status.json"]
    made = {name: redactor.text(text) for name, text in found.items()}
    file = options.output or Path(f"tierd-bugreport-{clock.unix_milliseconds() // 1000}.tar.gz")
    write(file, made)
    if options.json:
        print(as_json({"archive": str(file), "files": sorted(made)}))
    else:
        print(f"{file}: {', '.join(made)}\nnames are replaced; look through it before you send it (tar -xzf {file})")
    return 0


def gathered(part: Callable[[], str]) -> str:
    """A part's text, or why there is none."""
    try:
        return part()
    except (TierdError, OSError, subprocess.SubprocessError) as error:
        return f"not to be had: {error}\n"


def versions() -> str:
    """Of tierd and of what it stands on."""
    lines = [f"tierd {__version__}", f"python {sys.version.split()[0]}", f"kernel {platform.release()} {platform.machine()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines) + "\n"


def answer(config: Config, verb: str, **arguments: str) -> dict[str, object]:
    """What the daemon says."""
    return ask(config.server.admin_socket, verb, SECONDS_MAX, **arguments)


def metrics(path: Path) -> str:
    """A scrape of the Unix socket."""
    connection = HTTPConnection("localhost", timeout=SECONDS_MAX)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(SECONDS_MAX)
    try:
        connection.sock.connect(str(path))
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def log(file: Path | None) -> str:
    """The end of a file, or of the service's journal."""
    if file:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - LOG_BYTES_MAX))
            return "\n".join(stream.read().decode(errors="replace").splitlines()[-LOG_LINES:]) + "\n"
    if not shutil.which("journalctl"):
        return "not to be had: there is no journalctl here; give the log with --log\n"
    command = ["journalctl", "--unit=tierd", "--output=short-iso", "--no-hostname", "--no-pager", f"--lines={LOG_LINES}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=True).stdout


def write(file: Path, texts: dict[str, str]) -> None:
    """The archive, for its owner only."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Busy(f"{file} cannot be made ({error.strerror}): give another --output") from error
    with open(descriptor, "wb") as stream, tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, text in texts.items():
            data = text.encode()
            entry = tarfile.TarInfo(f"tierd-bugreport/{name}")
            entry.size, entry.mtime, entry.mode = len(data), clock.unix_milliseconds() // 1000, 0o600
            tar.addfile(entry, io.BytesIO(data))


def as_json(value: object) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"
