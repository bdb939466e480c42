"""A real Prometheus on loopback that scrapes what it is given every second, with the shipped rules."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from select import select
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from tierd.clock import monotonic_seconds

SHIPPED = Path(__file__).parents[2] / "dashboards/prometheus"
READY_SECONDS_MAX = 60.0
POLL_SECONDS = 0.2
RATE_INTERVAL = "10s"
"""In place of Grafana's $__rate_interval, at a scrape a second."""

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: apt-get install prometheus)"
)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)


class Prometheus:
    """A server in `folder`; `targets` are "host:port" by the name that they have as instance."""

    def __init__(self, folder: Path, targets: dict[str, str]) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        config = yaml.safe_load((SHIPPED / "scrape.yml").read_text())
        config["global"] = {"evaluation_interval": "1s"}
        config["rule_files"] = [str(SHIPPED / name) for name in config["rule_files"]]
        (job,) = config["scrape_configs"]
        job["scrape_interval"] = job["scrape_timeout"] = "1s"
        job["static_configs"] = [{"targets": [at], "labels": {"instance": name}} for name, at in targets.items()]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        command = ["prometheus", f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/data"]
        command += [f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn", "--query.lookback-delta=10s"]
        with open(self.folder / "log", "wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait_until(self._is_ready, "Prometheus does not start", READY_SECONDS_MAX)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        assert self._process is not None and self._process.poll() is None, (self.folder / "log").read_text()
        with suppress(OSError):
            return self._get("/-/ready")[0] == 200
        return False

    def ask(self, path: str, **arguments: Any) -> Any:
        """The data that its API answers."""
        status, text = self._get(f"/api/v1/{path}?{urlencode(arguments)}")
        answer = json.loads(text)
        assert (status, answer["status"]) == (200, "success"), f"{arguments}: {text}"
        return answer["data"]

    def series(self, expression: str, end: float, seconds: float) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Labels and points (Unix seconds, finite value) of an expression in Grafana's terms over the last `seconds`."""
        for variable, value in (("$__rate_interval", RATE_INTERVAL), ("$job", ".+"), ("$instance", ".+")):
            expression = expression.replace(variable, value)
        found = self.ask("query_range", query=expression, start=end - seconds, end=end, step=1)["result"]
        return [
            (row["metric"], [(at, float(value)) for at, value in row["values"] if math.isfinite(float(value))]) for row in found
        ]

    def now(self) -> float:
        """Its clock, in Unix seconds."""
        return float(self.ask("query", query="time()")["result"][0])

    def names(self) -> set[str]:
        """Every series that it has."""
        return set(self.ask("label/__name__/values"))

    def alerts(self) -> dict[tuple[str, str], str]:
        """State (pending, firing) of alerts by name and instance."""
        found = self.ask("alerts")["alerts"]
        return {(alert["labels"]["alertname"], alert["labels"].get("instance", "")): alert["state"] for alert in found}

    def wait_until(self, so: Callable[[], Any], complaint: str, seconds: float) -> None:
        """Ask again and again until it is so."""
        deadline = monotonic_seconds() + seconds
        while not so():
            assert monotonic_seconds() < deadline, complaint
            select([], [], [], POLL_SECONDS)

    def _get(self, path: str) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def promtool(*arguments: str, folder: Path = SHIPPED) -> Sequence[str]:
    """Run it where the shipped files are; returns the lines that it printed."""
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()
