"""Metrics and health over HTTP, on loopback or a Unix socket: `/metrics` for Prometheus, `/livez` and `/readyz` for whoever
starts us, and a page at `/` for a person.

It runs in threads of its own beside the event loop, so a scraper that is slow or mad costs the daemon nothing: at most
REQUESTS_MAX requests at a time, and none longer than REQUEST_SECONDS_MAX.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from socketserver import BaseServer, TCPServer, ThreadingMixIn
from threading import Lock, Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from tierd.clock import monotonic_seconds, thread_seconds
from tierd.errors import Invalid
from tierd.listening import listen
from tierd.log import get_logger
from tierd.page import HEADERS

REQUESTS_MAX = 8
REQUEST_SECONDS_MAX = 5.0
SWEEP_SECONDS = 0.1

log = get_logger("exporter")


class Exporter:
    """Serves one registry at `listen`: "host:port" (port 0 takes a free one, then see `port`), or the path of a Unix socket,
    which gets `socket_mode`. `made` is the service manager's socket, which must be at that address.

    `ready` is asked at every `/readyz` and answers (ready, reason); `page` gives the HTML of `/`. They and the registry's
    collectors are called in the exporter's threads, not in the event loop's: they must not wait, and must not change anything.
    `scraped` is told the processor time of each scrape, in seconds.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        ready: Callable[[], tuple[bool, str]],
        page: Callable[[], str],
        listen: str | Path,
        *,
        made: socket.socket | None = None,
        socket_mode: int = 0o660,
        scraped: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.listen, self.made, self._socket_mode = listen, made, socket_mode
        self.port = 0
        self._application = application(exposition(registry, scraped), ready, page)
        self._server: BoundedServer | None = None
        self._thread: Thread | None = None

    @property
    def address(self) -> str:
        """Where it serves, as "host:port" or a path; empty when it does not."""
        if self._server is None:
            return ""
        return str(self.listen) if isinstance(self.listen, Path) else f"{self.listen.rpartition(':')[0]}:{self.port}"

    def start(self) -> None:
        """Bind and serve from now on; Invalid when the address cannot be had."""
        self._server = self._bind(self.listen)
        self._server.set_app(self._application)
        self.port = self._server.server_port
        self._thread = Thread(target=self._server.serve_forever, args=(SWEEP_SECONDS,), name="exporter", daemon=True)
        self._thread.start()
        log.info("listening", address=self.address)

    def _bind(self, address: str | Path) -> BoundedServer:
        if isinstance(address, Path):
            return BoundedServer("", 0, listen(address, self._socket_mode, "metrics.socket"))
        host, _, port = address.rpartition(":")
        if self.made and self.made.getsockname()[:2] != (host.strip("[]"), int(port or 0)):
            where = "{}:{}".format(*self.made.getsockname()[:2])
            remedy = "make ListenStream= of the unit the same, or disable it"
            raise Invalid(f"tierd-metrics.socket listens on {where}, metrics.listen = {address!r}: {remedy}")
        try:
            return BoundedServer(host.strip("[]"), int(port), self.made)
        except OSError as error:
            remedy = "set metrics.listen to another port, or to '' for no metrics"
            raise Invalid(f"metrics.listen = {address} cannot be bound ({error.strerror}): {remedy}") from error

    def close(self) -> None:
        """Stop serving; requests in progress are cut off."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.cut_off(older_than_seconds=0)
        self._server.server_close()
        if isinstance(self.listen, Path):
            self.listen.unlink(missing_ok=True)
        self._server = self._thread = None


def exposition(registry: CollectorRegistry, scraped: Callable[[float], None]) -> WSGIApplication:
    """The registry as text, whatever format and compression a scraper would also take: others cost twice the time."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        started = thread_seconds()
        body = generate_latest(registry)
        start_response("200 OK", [("Content-Type", CONTENT_TYPE_PLAIN_0_0_4), ("Content-Length", str(len(body)))])
        scraped(thread_seconds() - started)
        return [body]

    return answer


def application(metrics: WSGIApplication, ready: Callable[[], tuple[bool, str]], page: Callable[[], str]) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["REQUEST_METHOD"], environ["PATH_INFO"]:
            case "GET", "/metrics":
                return metrics(environ, start_response)
            case "GET", "/":
                html = page().encode()
                start_response("200 OK", [*HEADERS, ("Content-Length", str(len(html)))])
                return [html]
            case "GET", "/livez":
                status, text = "200 OK", "alive"
            case "GET", "/readyz":
                good, text = ready()
                status = "200 OK" if good else "503 Service Unavailable"
            case "GET", _:
                status, text = "404 Not Found", "not found: try /, /metrics, /livez or /readyz"
            case _:
                status, text = "405 Method Not Allowed", "only GET"
        body = f"{text}\n".encode()
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
        return [body]

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            return answer(environ, start_response)
        except Exception:  # A bug in a collector must be seen here and must not stop the exporter.
            log.exception("request failed", path=environ["PATH_INFO"])
            start_response("500 Internal Server Error", [("Content-Type", "text/plain"), ("Content-Length", "0")])
            return []

    return guarded


class QuietHandler(WSGIRequestHandler):
    """One request of one connection; logs nothing when all is well."""

    timeout = REQUEST_SECONDS_MAX

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("request", line=format % args)


class BoundedServer(ThreadingMixIn, WSGIServer):
    """A thread for each connection, with a limit on their number and a deadline on each. `made` is a socket that listens
    already: a Unix socket, or the service manager's.
    """

    daemon_threads = True
    request_queue_size = 64  # The library's 5 would make a burst of clients wait a second for TCP to try again.

    def __init__(self, host: str, port: int, made: socket.socket | None = None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._open: dict[socket.socket, float] = {}
        self._open_lock = Lock()
        if made is None:
            super().__init__((host, port), QuietHandler)
            return
        BaseServer.__init__(self, (host, port), QuietHandler)  # TCPServer's makes a socket, and a unit may forbid that
        self.socket = made
        self.socket.setblocking(False)
        self._bound()

    def server_bind(self) -> None:
        """As the library's own, without its look-up of our name, which may wait for a name server."""
        TCPServer.server_bind(self)
        self._bound()

    def _bound(self) -> None:
        self.server_address = self.socket.getsockname()
        local = isinstance(self.server_address, str | bytes)
        self.server_name, self.server_port = ("localhost", 0) if local else self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection; peers on a Unix socket have no address, and the library wants one."""
        request, address = super().get_request()
        return request, address if isinstance(address, tuple) else ("local", 0)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take a connection while there is room for it; others are closed at once."""
        with self._open_lock:
            room = len(self._open) < REQUESTS_MAX
            if room:
                self._open[request] = monotonic_seconds()
        return room

    def shutdown_request(self, request: Any) -> None:
        """Forget and close a connection: in its own thread when it ends, in ours when it was refused."""
        with self._open_lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called by serve_forever every SWEEP_SECONDS: a client that trickles is cut off."""
        self.cut_off(older_than_seconds=REQUEST_SECONDS_MAX)

    def cut_off(self, older_than_seconds: float) -> None:
        """Shut the connections down that are older; their threads then end by themselves."""
        now = monotonic_seconds()
        with self._open_lock:
            late = [request for request, since in self._open.items() if now - since >= older_than_seconds]
            for request in late:
                # Fails only where the peer was faster.
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke off is its client's affair."""
        log.debug("connection failed", peer=client_address)
