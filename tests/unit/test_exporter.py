"""The exporter over real HTTP: what it serves, and that nobody can hang it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric

from tierd import exporter
from tierd.errors import Invalid
from tierd.exporter import Exporter


class State:
    """What the daemon would know of itself."""

    ready = (True, "ready")

    def __call__(self) -> tuple[bool, str]:
        return self.ready


def greeting() -> str:
    """What a person sees in a browser."""
    return "<h1>hello</h1>"


@pytest.fixture
def state() -> State:
    """A daemon that is ready."""
    return State()


@pytest.fixture
def served(state: State) -> Iterator[Exporter]:
    """A running exporter with one counter at 3."""
    registry = CollectorRegistry()
    Counter("tierd_example_blocks", "An example.", registry=registry).inc(3)
    with_port = Exporter(registry, state, greeting, "127.0.0.1:0")
    with_port.start()
    yield with_port
    with_port.close()


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """Status and body of one request."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def answers_again(port: int) -> bool:
    """Whether one of many requests is answered: a cut-off connection makes room a moment after its client sees it."""
    for _ in range(1000):
        with suppress(ConnectionError):
            return get(port, "/livez")[0] == 200
    return False


def test_metrics_are_served(served: Exporter) -> None:
    """The registry's series are there in Prometheus' format."""
    status, body = get(served.port, "/metrics")
    assert status == 200
    assert "tierd_example_blocks_total 3.0" in body


def test_a_scraper_that_takes_other_formats_gets_plain_text_too(served: Exporter) -> None:
    """What Prometheus itself asks for, OpenMetrics and gzip, would cost the daemon twice the time."""
    wanted = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "Accept-Encoding": "gzip"}
    connection = HTTPConnection("127.0.0.1", served.port, timeout=5)
    connection.request("GET", "/metrics", headers=wanted)
    response = connection.getresponse()
    assert (response.getheader("Content-Type") or "").startswith("text/plain; version=0.0.4")
    assert response.getheader("Content-Encoding") is None
    assert response.read().startswith(b"# HELP ")
    connection.close()


def test_a_unix_socket_is_served_replaced_when_dead_and_left_to_who_lives(tmp_path: Path) -> None:
    """It has the mode that it was given; a second daemon is told the key to change; what a dead one left is replaced."""
    path = tmp_path / "metrics.sock"
    first, second = (Exporter(CollectorRegistry(), State(), greeting, path, socket_mode=0o600) for _ in range(2))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    first.start()
    try:
        assert (first.address, path.stat().st_mode & 0o777) == (str(path), 0o600)
        with pytest.raises(Invalid, match=r"another daemon listens on .*set another metrics\.socket"):
            second.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(path))
            client.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
            assert b"200 OK" in client.recv(4096)
    finally:
        first.close()
    second.close()
    assert not path.exists()


def test_health_follows_the_daemon(served: Exporter, state: State) -> None:
    """`/readyz` answers with the daemon's own reason; `/livez` says only that the process is there."""
    assert get(served.port, "/readyz") == (200, "ready\n")
    state.ready = (False, "recovering: 3 of 8 segments")
    assert get(served.port, "/readyz") == (503, "recovering: 3 of 8 segments\n")
    assert get(served.port, "/livez") == (200, "alive\n")


def test_other_paths_and_methods_are_refused(served: Exporter) -> None:
    """There is nothing else to see, and nothing to change."""
    assert get(served.port, "/page")[0] == 404
    assert get(served.port, "/metrics/../secret")[0] == 404
    assert get(served.port, "/metrics", "POST")[0] == 405


def test_a_failing_collector_is_an_error_of_that_request_only() -> None:
    """A bug in one series must not take health down with it."""

    class Broken:
        """A collector with a bug."""

        def describe(self) -> list[Metric]:
            return []

        def collect(self) -> Any:
            raise ZeroDivisionError

    registry = CollectorRegistry()
    registry.register(Broken())
    broken = Exporter(registry, State(), greeting, "127.0.0.1:0")
    broken.start()
    try:
        assert get(broken.port, "/metrics")[0] == 500
        assert get(broken.port, "/livez")[0] == 200
    finally:
        broken.close()


def test_a_port_in_use_is_refused_with_the_remedy(served: Exporter) -> None:
    """The second daemon on a port says which key to change."""
    second = Exporter(CollectorRegistry(), State(), greeting, f"127.0.0.1:{served.port}")
    with pytest.raises(Invalid, match=rf"metrics\.listen = 127\.0\.0\.1:{served.port} cannot be bound .*another port"):
        second.start()
    second.close()


def test_ipv6_loopback_works() -> None:
    """`[::1]:0` is as good as 127.0.0.1."""
    six = Exporter(CollectorRegistry(), State(), greeting, "[::1]:0")
    try:
        six.start()
    except Invalid as error:
        pytest.skip(f"no IPv6 here: {error}")
    with socket.create_connection(("::1", six.port), timeout=5) as connection:
        connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert b"200 OK" in connection.recv(4096)
    six.close()


def test_silent_connections_are_cut_off_and_make_room(served: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that say nothing fill the exporter only until their deadline; more than that are closed at once."""
    monkeypatch.setattr(exporter, "REQUEST_SECONDS_MAX", 0.3)
    address = ("127.0.0.1", served.port)
    silent = [socket.create_connection(address, timeout=5) for _ in range(exporter.REQUESTS_MAX)]
    with socket.create_connection(address, timeout=5) as refused:
        assert refused.recv(1) == b""
    for connection in silent:
        assert connection.recv(1) == b""
        connection.close()
    assert answers_again(served.port)


def test_closing_ends_connections_and_frees_the_port(served: Exporter) -> None:
    """A half-open request does not hold up the end, and the address can be bound again at once."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as half:
        half.sendall(b"GET /metr")
        assert get(served.port, "/livez")[0] == 200
        served.close()
        assert half.recv(1) == b""
    again = Exporter(CollectorRegistry(), State(), greeting, f"127.0.0.1:{served.port}")
    again.start()
    again.close()


def test_a_socket_of_the_service_manager_is_served_and_stays_open(state: State) -> None:
    """Whoever connected before there was a daemon is answered by it; after its end others wait in the manager's queue."""
    with socket.create_server(("127.0.0.1", 0)) as managers:
        port = managers.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as early:
            early.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
            mine = Exporter(CollectorRegistry(), state, greeting, f"127.0.0.1:{port}", made=managers.dup())
            mine.start()
            assert early.recv(100).startswith(b"HTTP/1.0 200 OK")
        mine.close()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


@pytest.mark.parametrize("listen", ["", "127.0.0.1:9475"])
def test_a_socket_elsewhere_than_configured_is_refused(listen: str, state: State) -> None:
    """Both addresses and the remedy are named."""
    with socket.create_server(("127.0.0.1", 0)) as managers:
        port = managers.getsockname()[1]
        with pytest.raises(Invalid, match=f"listens on 127.0.0.1:{port}, metrics.listen = '{listen}': make ListenStream="):
            Exporter(CollectorRegistry(), state, greeting, listen, made=managers).start()


def test_a_person_gets_a_page_that_may_load_and_run_nothing(served: Exporter) -> None:
    """HTML at `/`, with a policy that forbids a browser everything but its style; no browser keeps it."""
    connection = HTTPConnection("127.0.0.1", served.port, timeout=5)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"<h1>hello</h1>")
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    assert "default-src 'none'" in str(response.getheader("Content-Security-Policy"))
    assert response.getheader("Cache-Control") == "no-store"
    connection.close()
    assert get(served.port, "/", "POST")[0] == 405
