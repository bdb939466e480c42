"""The audit log of a running daemon: who asked, and who was denied."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import GREETING, Daemon, Wire
from tierd.errors import Busy, Invalid
from tierd.server import REQUESTS_WAITING_MAX

NOBODY = 65_534


def entries(daemon: Daemon) -> list[dict[str, Any]]:
    """The lines of the audit log so far."""
    lines = [json.loads(line) for line in daemon.log.splitlines()]
    return [line for line in lines if line["logger"] == "audit"]


@contextmanager
def user(uid: int) -> Iterator[None]:
    """Be another user: the kernel tells whom a socket is connected by when it is."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def audited(start: Start) -> Daemon:
    """A daemon that logs JSON."""
    daemon: Daemon = start(log_format="json")
    return daemon


def test_what_an_operator_changes_is_logged_with_who_and_what_came_of_it(audited: Daemon) -> None:
    """A sync and a reload, as root; status, which only reads, is not worth a line at `info`."""
    audited.ask("sync", deadline_ms=5000)
    audited.ask("reload")
    audited.status()
    found = [(line["event"], line["verb"], line["outcome"], line["uid"]) for line in entries(audited)]
    assert found == [("admin", "sync", "done", os.getuid()), ("admin", "reload", "done", os.getuid())]
    assert {line["pid"] for line in entries(audited)} == {os.getpid()}


def test_an_operation_that_fails_is_logged_with_the_reason(audited: Daemon) -> None:
    """A reload of a file that went wrong."""
    audited.stop()
    file = audited.folder / "tierd.toml"
    file.write_text("")
    audited.flags += ["--config", str(file)]
    audited.start()
    file.write_text("[log]\nlevle = 1\n")
    with pytest.raises(Invalid):
        audited.ask("reload")
    last = entries(audited)[-1]
    assert (last["verb"], last["outcome"]) == ("reload", "invalid") and "log.levle" in last["reason"]


def test_a_request_that_is_refused_because_too_many_wait_has_begun_nothing(audited: Daemon) -> None:
    """It is answered busy, as the audit log says; the others go on, and nothing is left of it that would be missed later."""
    with Wire(audited.admin) as wire:
        wire.ask("record")
        numbers = [wire.request(verb) for verb in ["record"] * REQUESTS_WAITING_MAX + ["sync"]]
        with pytest.raises(Busy, match="256 requests of this connection wait"):
            wire.reply(numbers[-1])
        last = entries(audited)[-1]
        assert (last["verb"], last["outcome"]) == ("sync", "busy")
        assert wire.reply(numbers[0])["events"] == []


def test_the_admin_socket_is_its_own_and_for_its_user_only(audited: Daemon) -> None:
    """Mode 0600, apart from the data socket, which takes none of its verbs."""
    assert audited.admin.stat().st_mode & 0o777 == 0o600
    assert audited.socket.stat().st_mode & 0o777 == 0o660
    with Wire(audited.socket) as wire, pytest.raises(Invalid, match="unknown on this socket"):
        wire.ask("reload")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_what_another_user_may_not_have_is_denied_and_logged(make: Start) -> None:
    """The admin socket, even where its mode would let one in, and a domain that is another's."""
    daemon = make(log_format="json", server_socket_mode="0666")
    daemon.folder.parent.chmod(0o755)
    daemon.start()
    daemon.admin.chmod(0o666)
    with user(NOBODY), Wire(daemon.admin) as wire:
        assert "not uid 65534" in wire.receive()["message"]
    with user(NOBODY), Wire(daemon.socket) as wire, pytest.raises(Invalid, match="domain 'theirs' is not open to uid 65534"):
        wire.ask("hello", **{**GREETING, "domain": "theirs"})
    found = [line for line in entries(daemon) if line["outcome"] == "denied"]
    assert [(line["event"], line["level"], line["uid"]) for line in found] == [("denied", "warning", NOBODY)] * 2
    assert "admin socket" in found[0]["reason"] and "theirs" in found[1]["reason"]
