"""`tierd bugreport`: all that helps, and nobody's name."""

from __future__ import annotations

import json
import pwd
import socket
import tarfile
from pathlib import Path

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import hashes_of
from tierd.cli import FAILED, OK
from tierd.cli.redact import Redactor

MODEL, CLIENT, DOMAIN = "acme/secret-llm 7b", "engine of mallory", "red team"
FILES = ["config.toml", "doctor.json", "log.txt", "metrics.txt", "scrub.json", "status.json", "versions.txt"]


def read(archive: Path) -> dict[str, str]:
    """The files of an archive by their names."""
    with tarfile.open(archive) as tar:
        return {member.name.removeprefix("tierd-bugreport/"): tar.extractfile(member).read().decode() for member in tar}  # type: ignore[union-attr]


def test_a_report_has_all_that_helps_and_nobodys_name(start: Start, tmp_path: Path) -> None:
    """Numbers stay; models, domains, clients, namespaces and the host do not, in any file."""
    daemon = start(metrics_per_namespace="true", server_domains=f"0={DOMAIN}")
    archive = tmp_path / "report.tar.gz"
    with daemon.peer(model=MODEL, client=CLIENT) as peer, daemon.peer(model="m", client="e"):
        assert peer.store(hashes_of(1, 30)) == 30
        namespaces = [space["id"] for space in daemon.status()["namespaces"]]
        flags = ["--output", str(archive), "--log", str(daemon.log_file), "--set", f"server.domains=0={DOMAIN}"]
        done = daemon.run("bugreport", "--json", *flags)
    assert (done.returncode, done.stderr) == (OK, "")
    assert json.loads(done.stdout) == {"archive": str(archive), "files": FILES}
    assert archive.stat().st_mode & 0o777 == 0o600
    found = read(archive)
    assert sorted(found) == FILES
    for name, text in found.items():
        for secret in (MODEL, CLIENT, DOMAIN, *(one[:16] for one in namespaces)):
            assert secret not in text, f"{name} has {secret!r}"
    status = json.loads(found["status.json"])
    assert status["pid"] == daemon.pid and status["tiers"]["cpu"]["slots"]["ready"] == 30
    assert [space["id"] for space in status["namespaces"]] == ["namespace-1", "namespace-2"]
    assert 'namespace="namespace-1"' in found["metrics.txt"] and "namespace=namespace-2 " in found["log.txt"]
    assert [space["model"] for space in status["namespaces"]] == ["model-1", "model-2"]
    assert {space["domain"] for space in status["namespaces"]} == {"domain-1"}
    assert 'session client="client-1" ' in found["log.txt"] and "client=client-2 " in found["log.txt"]
    assert 'model="model-1"' in found["metrics.txt"] and "tierd_index_blocks 30.0" in found["metrics.txt"]
    assert "domains" in found["config.toml"] and "tierd 0." in found["versions.txt"]


def test_without_a_daemon_it_says_so_in_its_place(make: Start, tmp_path: Path) -> None:
    """The rest is there, and a file that exists is not overwritten."""
    daemon, archive = make(), tmp_path / "report.tar.gz"
    flags = ["--output", str(archive), "--log", str(tmp_path / "none")]
    assert daemon.run("bugreport", *flags).returncode == OK
    found = read(archive)
    assert found["status.json"].startswith("not to be had: no daemon at ")
    assert found["log.txt"].startswith("not to be had: ") and '"findings"' in found["doctor.json"]
    again = daemon.run("bugreport", *flags)
    assert again.returncode == FAILED and "give another --output" in again.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('session client="a b" pid=7 namespace=00ff', 'session client="client-1" pid=7 namespace=namespace-1'),
        ("domain 'red' is not open", "domain 'domain-1' is not open"),
        ("the domain is shut", "the domain is shut"),
        ('{"model": "m", "blocks": 5}', '{"model": "model-1", "blocks": 5}'),
        ('x{domain="d",model="m"} 3.0', 'x{domain="domain-1",model="model-1"} 3.0'),
        ("client=e client=e client=f", "client=client-1 client=client-1 client=client-2"),
    ],
)
def test_fields_of_logs_metrics_and_json_are_replaced(text: str, expected: str) -> None:
    """Whatever their notation; one name is one word, and numbers are nobody's."""
    assert Redactor().text(text) == expected


def test_the_host_and_the_home_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they are in a path or a sentence."""
    monkeypatch.setattr(socket, "gethostname", lambda: "mallorys-box")
    monkeypatch.setenv("HOME", "/home/u")
    said = Redactor().text("mallorys-box: /home/u/state cannot be made on (mallorys-box)")
    assert said == "host: ~/state cannot be made on (host)"


def test_who_asks_by_sudo_is_replaced_and_the_host_without_its_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The admin socket lets in root, so most reports are made so: it is not root's name that must not be in them."""
    monkeypatch.setattr(socket, "gethostname", lambda: "mallorys-box.example.org")
    monkeypatch.setenv("SUDO_USER", "nobody")
    home = pwd.getpwnam("nobody").pw_dir
    said = Redactor().text(f"mallorys-box tierd: {home}/tierd.toml of nobody is read on mallorys-box.example.org")
    assert said == "host tierd: ~/tierd.toml of user is read on host"


def test_a_name_that_was_learned_is_replaced_in_running_text() -> None:
    """As a word, not as a part of another one."""
    redactor = Redactor()
    redactor.learn("domain", ["red", "ab"])
    assert redactor.text("domain 'red' is not open; redo ab") == "domain 'domain-1' is not open; redo ab"
