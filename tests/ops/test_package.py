"""What is built can be installed where nothing of tierd is, and serves there."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ops.machine import CHECKOUT, DISK, Machine, booted, until

pytestmark = [pytest.mark.package, pytest.mark.timeout(300, func_only=True)]
COMMANDS_MAX = 9
FIRST_HIT = "found 64 of 64 blocks again, every byte right"


def commands() -> list[str]:
    """What docs/quickstart.md has a newcomer type, up to the first hit."""
    block = re.search(r"^(?:    .+\n)+", (CHECKOUT / "docs/quickstart.md").read_text(), flags=re.MULTILINE)
    assert block
    return [line.strip() for line in block[0].splitlines()]


@pytest.fixture(scope="module")
def built() -> Path:
    """The folder with what `make deb` has made: wheel and sdist in `dist`, and the package."""
    subprocess.run(["make", f"PYTHON={sys.executable}", "deb"], cwd=CHECKOUT, check=True, capture_output=True, timeout=250)
    return CHECKOUT / ".build"


@pytest.fixture(scope="module")
def empty(built: Path) -> Iterator[Machine]:
    """A booted Debian that shares nothing with this machine but a folder with the package, as it lies in a checkout."""
    with booted(shared=()) as up:
        (up.disk / ".build").mkdir()
        for package in built.glob("tierd_*.deb"):
            shutil.copy(package, up.disk / ".build")
        yield up


@pytest.mark.parametrize("kind", ["tierd-*.whl", "tierd-*.tar.gz"])
def test_it_serves_from_a_fresh_environment(kind: str, built: Path, short_path: Path) -> None:
    """Wheel and sdist bring all that `tierd serve`, `tierd status` and a first hit need, and the files of the service."""
    (package,) = (built / "dist").glob(kind)
    subprocess.run([sys.executable, "-m", "venv", short_path / "venv"], check=True, timeout=60)
    tierd, python = short_path / "venv/bin/tierd", short_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True, timeout=250, capture_output=True)
    directories = ["--runtime-dir", short_path / "run", "--state-dir", short_path / "state"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(short_path), "TIERD_SOCKET": str(short_path / "run/tierd.sock")}
    said = {"cwd": short_path, "env": environment, "capture_output": True, "text": True, "timeout": 60}
    serve = [tierd, "serve", *directories, "--set", "metrics.listen="]
    with subprocess.Popen(serve, cwd=short_path, env=environment) as daemon:
        try:
            status = [tierd, "status", "--json", "--set", f"server.admin_socket={short_path / 'run/admin.sock'}"]
            until(lambda: subprocess.run(status, **said).returncode == 0, "tierd status does not answer", 30)
            assert FIRST_HIT in subprocess.run([python, CHECKOUT / "examples/first_hit.py"], **said).stdout
        finally:
            daemon.terminate()
    assert daemon.returncode == 0
    subprocess.run([tierd, "install-service", "--root", short_path / "root"], check=True, **said)
    unit = (short_path / "root/etc/systemd/system/tierd.service").read_text()
    assert f"ExecStart={tierd} serve" in unit
    assert same_files(short_path / "venv/share/tierd/dashboards")


def same_files(dashboards: Path) -> bool:
    """Whether a folder has all that an operator is told to take from `dashboards/`, as it is there."""
    folders = ("grafana", "prometheus", "provisioning")
    files = [
        CHECKOUT / "dashboards/runbook.md",
        *(one for name in folders for one in (CHECKOUT / "dashboards" / name).rglob("*.*")),
    ]
    taken = [dashboards / file.relative_to(CHECKOUT / "dashboards") for file in files]
    return len(files) > 8 and all(one.read_bytes() == file.read_bytes() for one, file in zip(taken, files, strict=True))


def test_the_debian_package_has_what_is_read_where_it_is_looked_for(built: Path, short_path: Path) -> None:
    """A man page for each command, completions for three shells, dashboards, and the runbook at the place that alerts name."""
    (package,) = built.glob("tierd_*.deb")
    subprocess.run(["dpkg-deb", "-x", package, short_path], check=True, timeout=60)
    pages = {file.name: file.read_bytes() for file in (CHECKOUT / "manual/man1").iterdir()}
    packed = {file.stem: gzip.decompress(file.read_bytes()) for file in (short_path / "usr/share/man/man1").iterdir()}
    assert packed == pages
    share = short_path / "usr/share"
    assert "complete " in (share / "bash-completion/completions/tierd").read_text()
    assert (share / "zsh/vendor-completions/_tierd").read_text().startswith("#compdef tierd")
    assert "complete -c tierd" in (share / "fish/vendor_completions.d/tierd.fish").read_text()
    assert same_files(share / "tierd/dashboards")
    rules = (share / "tierd/dashboards/prometheus/tierd-rules.yml").read_text()
    links = re.findall(r"runbook: (\S+)#(\w+)", rules)
    assert len(links) == rules.count("alert: ") > 0
    for file, section in links:
        text = (short_path / file.lstrip("/")).read_text().lower()
        assert f"\n## {section}\n" in text


def test_a_newcomer_needs_few_commands_to_a_first_hit(empty: Machine) -> None:
    """docs/quickstart.md, typed as it is; the first two were typed where there is a package index, and made the package."""
    typed = commands()
    assert len(typed) <= COMMANDS_MAX
    assert typed[:2] == ["apt-get install -y make python3-venv", "make deb"]
    for command in typed[2:]:
        said = empty.run("sh", "-c", f"cd {DISK} && {command}").stdout
    assert FIRST_HIT in said


def test_an_upgrade_keeps_memory_and_a_removal_leaves_only_what_was_asked_for(empty: Machine) -> None:
    """Blocks are hits again after the package was installed once more; removed, the units are gone; purged, all is."""
    before = json.loads(empty.run("tierd", "status", "--json").stdout)
    empty.run("sh", "-c", f"apt-get install -y --reinstall {DISK}/.build/tierd_*.deb")
    after = json.loads(empty.run("tierd", "status", "--json").stdout)
    assert before["pid"] != after["pid"]
    assert after["tiers"]["cpu"]["slots"]["ready"] == before["tiers"]["cpu"]["slots"]["ready"] > 0
    empty.run("apt-get", "remove", "-y", "tierd")
    assert empty.run("systemctl", "is-active", "tierd.service", "tierd.socket", check=False).stdout.split() == ["inactive"] * 2
    assert empty.run("sh", "-c", "ls /etc/tierd /var/lib/tierd").stdout.split("\n")[1] == "tierd.toml"
    empty.run("apt-get", "purge", "-y", "tierd")
    assert empty.run("sh", "-c", "ls -d /etc/tierd /var/lib/tierd /usr/lib/tierd", check=False).stdout == ""
