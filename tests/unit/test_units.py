"""The shipped systemd files, and what `tierd install-service` makes of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tierd
from tierd.cli import main
from tierd.config import KEYS, Config
from tierd.units import DESCRIPTORS_MIN, UNITS, seen, shipped

SYSTEMD = Path(__file__).parents[2] / "systemd"
EXPOSURE_TENTHS_MAX = 16
SERVICES = ["tierd.service", "user/tierd.service"]


def value(text: str, key: str) -> str:
    """Of the one line `key=value`."""
    (found,) = re.findall(rf"^{re.escape(key)}=(.*)$", text, re.MULTILINE)
    return str(found)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_shipped_unit_is_hardly_exposed_with_its_gpus() -> None:
    """At most 1.6 by `systemd-analyze security`, with access to NVIDIA's devices and to what cuFile reads."""
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_TENTHS_MAX}", "--no-pager"]
    done = subprocess.run([*command, str(SYSTEMD / "tierd.service")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    text = shipped("tierd.service")
    assert "DeviceAllow=char-nvidia* rw" in text and value(text, "DevicePolicy") == "closed"
    settings = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    assert not re.search("PrivateDevices|PrivateUsers|PrivatePIDs|ProcSubset|InaccessiblePaths|TemporaryFileSystem", settings)


def test_the_sockets_are_where_the_configuration_says() -> None:
    """By default, of root's service and of a user's."""
    config = Config.load({"--runtime-dir": "/run/tierd", "--state-dir": "/var/lib/tierd"}, {}, Path("/dev/null"), 0)
    data, metrics = shipped("tierd.socket"), shipped("tierd-metrics.socket")
    assert value(data, "ListenStream") == str(config.server.socket)
    assert value(data, "SocketMode") == KEYS["server.socket_mode"]["default"]
    assert (
        value(metrics, "ListenStream") == config.metrics.listen == value(shipped("user/tierd-metrics.socket"), "ListenStream")
    )
    assert value(shipped("user/tierd.socket"), "ListenStream") == "%t/tierd/tierd.sock"


@pytest.mark.parametrize("service", SERVICES)
def test_systemd_and_tierd_agree_on_how_much_is_kept(service: str) -> None:
    """FDSTORE, which systemd sets from 254 on, is what FileDescriptorStoreMax= says."""
    text = shipped(service)
    assert value(text, "FileDescriptorStoreMax") == str(DESCRIPTORS_MIN)
    assert f"Environment=FDSTORE={DESCRIPTORS_MIN}\n" in text


@pytest.mark.parametrize(
    ("prefix", "lines"),
    [
        ("/home/u/env", "ProtectHome=tmpfs\nBindReadOnlyPaths=/home/u/env\n"),
        ("/tmp/env", "PrivateTmp=yes\nBindReadOnlyPaths=/tmp/env\n"),
        ("/opt/env", "ProtectHome=yes\n"),
    ],
)
def test_the_service_sees_its_environment_wherever_it_is(prefix: str, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a home or among temporary files, which it sees nothing else of."""
    unit = shipped("tierd.service")
    monkeypatch.setattr(sys, "prefix", prefix)
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(tierd, "__file__", "/usr/lib/python3/tierd/__init__.py")
    text = seen(unit)
    assert lines in text
    assert text.count("BindReadOnlyPaths=") == lines.count("BindReadOnlyPaths=") == (prefix != "/opt/env")


def test_installing_twice_and_removing_leaves_nothing(tmp_path: Path) -> None:
    """All files appear under their paths with this environment's command, the second time changes nothing, then all go."""
    assert main(["install-service", "--root", str(tmp_path)]) == 0
    made = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    names = {str(path.relative_to(tmp_path)) for path in made}
    units = {f"etc/systemd/system/{name}" for name in UNITS}
    assert names == {*units, "etc/sysusers.d/tierd.conf", "etc/tmpfiles.d/tierd.conf", "etc/tierd/tierd.toml"}
    service = made[tmp_path / "etc/systemd/system/tierd.service"]
    tierd = Path(sys.executable).with_name("tierd")
    assert value(service, "ExecStart") == f"{tierd} serve --config /etc/tierd/tierd.toml"
    assert "/usr/bin/tierd" not in service
    assert main(["install-service", "--root", str(tmp_path)]) == 0
    assert made == {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["install-service", "--remove", "--root", str(tmp_path)]) == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_programs_are_told_what_was_done_with_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json`: wrote, kept and removed, each file once and nothing else."""

    def said(*more: str) -> dict[str, list[str]]:
        assert main(["install-service", "--json", "--root", str(tmp_path), *more]) == 0
        return dict(json.loads(capsys.readouterr().out))

    wrote = said()["wrote"]
    assert sorted(wrote) == sorted(str(path) for path in tmp_path.rglob("*") if path.is_file())
    (tmp_path / "etc/tierd/tierd.toml").write_text("[cpu]\n")
    (tmp_path / "etc/systemd/system/tierd.service").unlink()
    again = said()
    assert again["wrote"] == [str(tmp_path / "etc/systemd/system/tierd.service")] and len(again["kept"]) == len(wrote) - 1
    gone = said("--remove")
    assert gone["kept"] == [str(tmp_path / "etc/tierd/tierd.toml")] and len(gone["removed"]) == len(wrote) - 1


def test_a_configuration_is_the_administrators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It sizes the unit and opens its view; it is never overwritten, and not removed even where it is wrong."""
    file = tmp_path / "etc/tierd/tierd.toml"
    file.parent.mkdir(parents=True)
    text = '[cpu]\nbytes = "64GiB"\nsegment_bytes = "8MiB"\n[nvme]\npath = "/mnt/nvme0/tierd"\n'
    file.write_text(text)
    assert main(["install-service", "--root", str(tmp_path)]) == 0
    service = (tmp_path / "etc/systemd/system/tierd.service").read_text()
    assert value(service, "FileDescriptorStoreMax") == str(2 * 8192 + 256)
    assert "Environment=FDSTORE=16640\n" in service
    assert value(service, "ReadWritePaths") == "-/mnt/nvme0/tierd"
    assert "d /mnt/nvme0/tierd 0700 tierd tierd -\n" in (tmp_path / "etc/tmpfiles.d/tierd.conf").read_text()
    file.write_text(text + "nonsense = 1\n")
    assert main(["install-service", "--root", str(tmp_path)]) == 2
    assert main(["install-service", "--remove", "--root", str(tmp_path)]) == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert f"kept     {file}: it was changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "key", "configured", "unit", "said"),
    [
        ("server", "socket", "/run/tierd/other.sock", "tierd.socket", "ListenStream"),
        ("server", "socket_mode", "0600", "tierd.socket", "SocketMode"),
        ("metrics", "listen", "127.0.0.1:9999", "tierd-metrics.socket", "ListenStream"),
    ],
)
def test_a_socket_that_the_daemon_would_refuse_is_refused_at_once(
    section: str, key: str, configured: str, unit: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written, and both values are said; with a drop-in that makes the unit the same it installs."""
    file = tmp_path / "etc/tierd/tierd.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'[{section}]\n{key} = "{configured}"\n')
    assert main(["install-service", "--root", str(tmp_path)]) == 2
    error, shipped_value = capsys.readouterr().err, value(shipped(unit), said)
    assert f"{section}.{key} = '{configured}' in {file}, but {unit} has {said}={shipped_value}" in error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    drop_in = tmp_path / f"etc/systemd/system/{unit}.d/override.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(f"[Socket]\n{said}=\n{said}={configured}\n")
    assert main(["install-service", "--root", str(tmp_path)]) == 0
    assert main(["install-service", "--root", str(tmp_path), "--remove"]) == 0


def test_a_users_service_lies_in_the_users_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units in systemd/user, without users, groups or system paths in them."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/u/.config")
    assert main(["install-service", "--user", "--root", str(tmp_path)]) == 0
    names = {str(path.relative_to(tmp_path / "home/u/.config")) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {*(f"systemd/user/{name}" for name in UNITS), "tierd/tierd.toml"}
    text = "".join((tmp_path / "home/u/.config/systemd/user" / name).read_text() for name in UNITS)
    assert not re.search(r"^(User|Group|SocketUser|SocketGroup)=|/run/tierd|/var/lib", text, re.MULTILINE)
