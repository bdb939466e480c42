"""Where no systemd can be booted, its tests are skipped and say why; where one is up, whatever goes wrong in it is a failure.

The tools are scripts here: what they do is what the real ones do on machines that will not have a container.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ops.machine import CHECKOUT, TOOLS, booted

UP = "sleep 60 & wait"
"""A container: the script's child is what it takes for its init."""
MADE = 'for root; do :; done; mkdir "$root"'
"""An empty root: the last argument is where."""
ENTERED = 'case "$*" in *is-system-running) echo running;; esac'
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as containers do")
Tools = Callable[..., None]


@pytest.fixture
def tools(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """Puts scripts in the place of the tools that boot a machine, all well but those that are given."""
    monkeypatch.setenv("PATH", f"{short_path / 'bin'}:/usr/bin:/bin")
    (short_path / "bin").mkdir()

    def install(**scripts: str) -> None:
        given = {name.replace("_", "-"): script for name, script in scripts.items()}
        for name, script in ({"mmdebstrap": MADE, "systemd-nspawn": UP, "nsenter": ENTERED} | given).items():
            file = short_path / "bin" / name
            file.write_text(f"#!/bin/sh\n{script}\n")
            file.chmod(0o755)

    return install


def reason(root: Path) -> str:
    """Why a test that wants a machine is skipped."""
    with pytest.raises(pytest.skip.Exception) as skipped, booted(root=root):
        pass
    return str(skipped.value)


def test_no_tools_skip_all_tests_of_the_service(short_path: Path) -> None:
    """pytest itself ends well, with the reason and the remedy in its summary."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "systemd", "tests/ops/test_user.py"]
    done = subprocess.run(command, cwd=CHECKOUT, env={"PATH": str(short_path)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{', '.join(TOOLS)} not found: apt-get install mmdebstrap systemd-container" in done.stdout
    assert "1 skipped" in done.stdout


@needs_root
def test_who_is_not_root_is_skipped(short_path: Path, tools: Tools) -> None:
    """The tools are there, and may not be used."""
    tools()
    short_path.chmod(0o777)
    os.seteuid(65534)
    try:
        assert "only root can boot a container" in reason(short_path / "root")
    finally:
        os.seteuid(0)


@needs_root
def test_a_root_that_cannot_be_fetched_skips_and_leaves_nothing(short_path: Path, tools: Tools) -> None:
    """There is no network: mmdebstrap ends with an error after it has begun."""
    tools(mmdebstrap=f"{MADE}; echo 'E: Could not resolve deb.debian.org' >&2; exit 1")
    assert "mmdebstrap cannot make a root, it ended with 1: E: Could not resolve" in reason(short_path / "root")
    assert [path.name for path in short_path.iterdir()] == ["bin"]


@needs_root
def test_a_root_that_takes_for_ever_skips(short_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network swallows everything: what was started is ended with all its children."""
    monkeypatch.setattr("tests.ops.machine.MAKE_SECONDS_MAX", 0.3)
    tools(mmdebstrap=f"{MADE}; sleep 60; exit 0")
    assert "mmdebstrap cannot make a root, not within 0.3 s" in reason(short_path / "root")
    assert [path.name for path in short_path.iterdir()] == ["bin"]


@needs_root
def test_a_container_that_is_not_permitted_skips(short_path: Path, tools: Tools) -> None:
    """systemd-nspawn ends at once, and says why."""
    tools(systemd_nspawn="echo 'Failed to clone: Operation not permitted' >&2; exit 1")
    assert "systemd-nspawn ended with 1: Failed to clone: Operation not permitted" in reason(short_path / "root")


@needs_root
@pytest.mark.parametrize("nspawn", ["echo Freezing execution.; exec sleep 60", f"echo Freezing execution.; {UP}"])
def test_a_boot_that_does_not_come_up_skips(
    nspawn: str, short_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an init, or with one that says nothing: after a while that is enough, and nothing of it is left."""
    monkeypatch.setattr("tests.ops.machine.BOOT_SECONDS_MAX", 0.5)
    tools(systemd_nspawn=nspawn, nsenter="exit 1")
    assert "the machine does not come up within 0.5 s: Freezing execution." in reason(short_path / "root")
    assert sorted(path.name for path in short_path.iterdir()) == ["bin", "root"]


@needs_root
def test_a_machine_that_cannot_run_a_service_skips(short_path: Path, tools: Tools) -> None:
    """It is up, but the interpreter is not one for it, or its systemd may not make a sandbox."""
    tools(nsenter=f"{ENTERED}; case \"$*\" in *systemd-run*) echo 'status=226/NAMESPACE' >&2; exit 226;; esac")
    assert "cannot run" in reason(short_path / "root") and "226/NAMESPACE" in reason(short_path / "root")


@needs_root
def test_what_goes_wrong_in_a_machine_that_is_up_is_a_failure(short_path: Path, tools: Tools) -> None:
    """No skip hides that the service cannot be installed."""
    tools(nsenter=f'{ENTERED}; case "$*" in *install-service) exit 3;; esac')
    with (
        pytest.raises(AssertionError, match="install-service ended with 3"),
        booted(root=short_path / "root") as machine,
    ):
        machine.run(str(machine.tierd), "install-service")
