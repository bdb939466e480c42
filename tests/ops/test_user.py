"""A user's own service, under a user's own systemd, without root."""

from __future__ import annotations

import pytest

from tests.ops.machine import Machine

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(120, func_only=True)]
HOME, RUNTIME = "/home/alice", "/run/user/1234"
# Without logind nobody sets the manager's runtime directory, and homes of others hide the interpreter that we share.
MANAGER = f"[Service]\nPAMName=\nEnvironment=XDG_RUNTIME_DIR={RUNTIME}\n"
ALICE = ("setpriv", "--reuid=alice", "--regid=alice", "--init-groups", "env", f"HOME={HOME}", f"XDG_RUNTIME_DIR={RUNTIME}")


@pytest.fixture
def alice(machine: Machine) -> Machine:
    """A user with a running service manager of her own."""
    machine.run("useradd", "--create-home", "--uid=1234", "alice")
    machine.run("chmod", "o+x", "/root")
    machine.run("mkdir", "-p", "/run/systemd/system/user@.service.d")
    machine.write("/run/systemd/system/user@.service.d/test.conf", MANAGER)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "user@1234.service")
    return machine


def test_a_user_installs_runs_and_removes_a_service_of_her_own(alice: Machine) -> None:
    """Started, reloaded and restarted by her own manager at her own socket; removed, nothing of it is left."""
    tierd, systemctl = (*ALICE, str(alice.tierd)), (*ALICE, "systemctl", "--user")
    alice.run(*tierd, "install-service", "--user")
    alice.run(*systemctl, "enable", "--now", "tierd.socket", "tierd-metrics.socket", "tierd.service")
    assert f"socket   {RUNTIME}/tierd/tierd.sock" in alice.run(*tierd, "status").stdout
    alice.run(*systemctl, "reload", "tierd.service")
    alice.run(*systemctl, "restart", "tierd.service")
    assert "metrics  http://127.0.0.1:9475/metrics" in alice.run(*tierd, "status").stdout
    alice.run(*tierd, "install-service", "--user", "--remove")
    assert alice.run(*systemctl, "is-active", "tierd.service", "tierd.socket", check=False).stdout.split() == ["inactive"] * 2
    assert alice.run("find", f"{HOME}/.config", "-type", "f").stdout == ""
