"""vLLM's OpenAI-compatible server in a process of its own, on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tests.daemon.harness import http_get, readable
from tierd.clock import monotonic_seconds

START_SECONDS_MAX = 240.0


class Server:
    """Started when made; `with` waits until it serves, and ends it."""

    def __init__(self, model: Path, log: Path, transfer: dict[str, Any], *flags: str) -> None:
        self.log, self.port = log, free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--skip-tokenizer-init", "--dtype", "float32", "--block-size", "32"]
        command += ["--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20)]
        command += ["--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(transfer), *flags]
        with open(log, "ab") as out:
            self.process = subprocess.Popen(command, env=os.environ, stdout=out, stderr=out)

    def __enter__(self) -> Server:
        deadline = monotonic_seconds() + START_SECONDS_MAX
        death = os.pidfd_open(self.process.pid)
        while not self._serves():
            assert monotonic_seconds() < deadline and not readable(death, 0.1), f"no server:\n{self.log.read_text()[-8000:]}"
        os.close(death)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)

    def complete(self, prompt: list[int], max_tokens: int = 1) -> dict[str, Any]:
        """One completion of token ids."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "detokenize": False}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        assert response.status == 200, text
        answer: dict[str, Any] = json.loads(text)
        return answer

    def metrics(self) -> dict[str, float]:
        """Every sample by its name with labels."""
        _, text = http_get("127.0.0.1", self.port, "/metrics")
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[:1] not in "#")
        }

    def _serves(self) -> bool:
        try:
            return http_get("127.0.0.1", self.port, "/health")[0] == 200
        except OSError:
            return False


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
