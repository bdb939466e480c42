"""Record what engines ask of a running daemon, as a trace for `tierd replay`, until Ctrl-C or for a given time.

The trace has times, lengths, keyed hashes of blocks and why turns ended: nothing of a prompt, and nothing to try a guess with.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import IO, Any, cast

from tierd.cli.admin import AdminSocket
from tierd.cli.options import add_config_arguments, load_config
from tierd.cli.status import NAMESPACE_CHARACTERS
from tierd.clock import monotonic_seconds
from tierd.errors import Busy, Invalid
from tierd.replay.writer import TraceWriter

ANSWER_SECONDS_MAX = 15.0
FINISH_SECONDS_MAX = 10.0
"""How long what has come before the end is still fetched."""
KEY_BYTES = 32


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, where to, and how long."""
    parser.add_argument("trace", type=Path, metavar="FILE", help="the trace, a new file; compressed if it ends in .gz")
    parser.add_argument("--namespace", default="", metavar="HEX", help="as `tierd status` shows it (default: the first used)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long (default: until Ctrl-C)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_config_arguments(parser, "--runtime-dir")


def run(options: Namespace) -> int:
    """Say what was recorded; a file in which nothing is does not stay."""
    namespace = parse_namespace(options.namespace)
    path = load_config(options).server.admin_socket
    with AdminSocket(path, ANSWER_SECONDS_MAX) as admin, stop_signals() as stop:
        recording = Recording(admin, namespace, options.trace)
        try:
            recording.follow(stop, monotonic_seconds() + options.seconds)
        finally:
            print(json.dumps(recording.outcome()) if options.json else recording.summary())
    return 0


class Recording:
    """What has come so far, and the file that it is written to."""

    def __init__(self, admin: AdminSocket, namespace: bytes, trace: Path) -> None:
        self._admin, self._namespace, self._trace = admin, namespace, trace
        self._reply = admin.ask("record", namespace=namespace)
        self._writer: TraceWriter | None = None

    def follow(self, stop: Event, until: float) -> None:
        """Write until `stop` is set or the time is over, and then what came before that; the file is whole in any case."""
        with new_file(self._trace) as out:
            print("recording; Ctrl-C ends it", file=sys.stderr, flush=True)
            try:
                while not stop.is_set() and monotonic_seconds() < until:
                    self._fetch(out)
                until = monotonic_seconds() + FINISH_SECONDS_MAX
                self._fetch(out)
                while self._reply["left"] and monotonic_seconds() < until:
                    self._fetch(out)
            finally:
                if self._writer:
                    self._writer.close()
                if not (self._writer and self._writer.requests):
                    self._trace.unlink()

    def _fetch(self, out: IO[bytes]) -> None:
        self._reply = reply = self._admin.ask("record", namespace=self._namespace)
        if reply["events"] and not self._writer:
            self._writer = TraceWriter(out, os.urandom(KEY_BYTES), reply["block_tokens"])
        for now, hashes, turn, conversation in reply["events"]:
            assert self._writer
            if turn is None:
                self._writer.asked(now, hashes)
            else:
                self._writer.ended(hashes, turn, conversation)

    def outcome(self) -> dict[str, Any]:
        """What is in the file, and what is not, as numbers."""
        reply, writer = self._reply, self._writer
        return {
            "namespace": reply["namespace"].hex(),
            "requests": writer.requests if writer else 0,
            "blocks": writer.blocks if writer else 0,
            "block_tokens": reply["block_tokens"],
            "missed": reply["missed"],
            "elsewhere": reply["elsewhere"],
        }

    def summary(self) -> str:
        """The same for people."""
        reply, lines = self._reply, ["nothing was asked for"]
        if (writer := self._writer) and writer.requests:
            name = reply["namespace"].hex()[:NAMESPACE_CHARACTERS]
            asked = f"{writer.requests:,} requests for {writer.blocks:,} blocks of {reply['block_tokens']} tokens"
            lines = [f"{asked}, namespace {name}: {self._trace}"]
        if missed := reply["missed"]:
            lines.append(f"{missed:,} requests are missing: they came too fast, or behind blocks that are not there any more")
        if elsewhere := reply["elsewhere"]:
            lines.append(f"{elsewhere:,} messages were for other namespaces: choose one with --namespace")
        return "\n".join(lines)


def parse_namespace(text: str) -> bytes:
    """The beginning of a namespace's id."""
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise Invalid(f"--namespace {text!r} is no id, nor the beginning of one: `tierd status` shows them") from error


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file for its owner alone that was not there before, compressed by its name; Busy when it cannot be written on."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise Invalid(f"{path} cannot be made ({error.strerror}): give the path of a new file") from error
    try:
        with ExitStack() as stack:
            out: IO[bytes] = stack.enter_context(open(descriptor, "wb"))
            if path.suffix == ".gz":
                out = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=out, mode="wb", mtime=0)))
            yield out
    except OSError as error:
        raise Busy(f"{path} cannot be written ({error.strerror}): what is in it up to there is right") from error


@contextmanager
def stop_signals() -> Iterator[Event]:
    """An event that SIGINT and SIGTERM set, instead of ending the process in the middle of a line."""
    stop = Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
