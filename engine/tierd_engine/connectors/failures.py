"""Every failure is a miss, also those that nobody thought of."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def said_not_raised(log: logging.Logger, what: str) -> Iterator[None]:
    """Log what is raised inside, and go on behind: an engine that waits for `what` must hear that it has ended."""
    try:
        yield
    except Exception:
        log.exception("a %s failed and counts as a miss", what)
