"""Structured logs on stderr: one line per change of state, as `key=value` text or as JSON; never per block."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

PLAIN = re.compile(r"[\w./:@%+,\-]+")
"""Values that need no quotes in text; others are written as JSON strings, so that nothing logged can break a line."""

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
"""The journal's, which are syslog's."""


class Logger:
    """Writes events with fields: `log.info("listening", socket=path)`; any thread may call it."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(f"tierd.{name}")

    def debug(self, event: str, **fields: Any) -> None:
        """What only a developer wants to know."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """A change of state."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something is worse than it should be, and tierd goes on."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something failed that an operator must look at."""
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """A bug: an error with the traceback of the exception being handled."""
        self._log(logging.ERROR, event, fields, exc_info=True)

    def _log(self, level: int, event: str, fields: dict[str, Any], exc_info: bool = False) -> None:
        self.logger.log(level, event, extra={"fields": fields}, exc_info=exc_info)


def get_logger(name: str) -> Logger:
    """The logger of one module, such as "server"."""
    return Logger(name)


def configure(level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:
    """Send tierd's logs to `stream` (default: stderr) and nowhere else; before, the standard library decides."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    formatter = JsonFormatter() if format == "json" else TextFormatter()
    handler.setFormatter(JournalFormatter(formatter) if is_journal(stream) else formatter)
    root = logging.getLogger("tierd")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


class TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05.678Z info server: listening socket=/run/tierd/tierd.sock pid=12`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={as_text(value)}" for key, value in fields_of(record).items())
        line = f"{stamp(record)} {record.levelname.lower()} {name_of(record)}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, event, the fields, and traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fixed = {"time": stamp(record), "level": record.levelname.lower(), "logger": name_of(record)}
        fixed["event"] = record.getMessage()
        if record.exc_info:
            fixed["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fixed | fields_of(record) | fixed, default=as_plain)


class JournalFormatter(logging.Formatter):
    """What another formatter makes of it, each line with its priority as journald takes it (sd-daemon(3)), so that
    `journalctl -p warning` finds what is at least that. The journal knows the time itself.
    """

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        priority = PRIORITIES[record.levelno]
        text = self._formatter.format(record).removeprefix(f"{stamp(record)} ")
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())


def is_journal(stream: TextIO) -> bool:
    """Whether this stream is the one that systemd has connected to its journal ($JOURNAL_STREAM: device and inode)."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def name_of(record: logging.LogRecord) -> str:
    return record.name.removeprefix("tierd.")


def stamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def as_plain(value: Any) -> str:
    """Hashes and ids in hex, everything else as it prints itself."""
    return value.hex() if isinstance(value, bytes) else str(value)


def as_text(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else as_plain(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)
