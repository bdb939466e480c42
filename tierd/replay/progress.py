"""A bar on stderr for a person who waits; for anybody else nothing."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any


class Progress:
    """A context in which `show` moves the bar."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = self._stack.enter_context(Bar(console=Console(stderr=True), transient=True))
            self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def show(self, what: str, done: int, total: int) -> None:
        """What is going on, and how far it has come."""
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total)
